"""Bad input gets one line on standard error, and nothing that was there is lost.

The status is 1, or 2 for usage.
"""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPTS = ["stl10_data_load", "pirl_stl_train_test", "train_stl_after_ssl"]
TRAINING_SCRIPTS = SCRIPTS[1:]


@pytest.fixture
def own_data(data_dir, tmp_path):
    """A copy of the image folders that a test may damage."""
    return shutil.copytree(data_dir, tmp_path / "own")


# ---- Usage ---------------------------------------------------------------------------
@pytest.mark.parametrize("script", SCRIPTS)
def test_usage_errors(call, script):
    outcome = call(script, "--no-such-flag")
    assert outcome.is_one_line_error("--no-such-flag", status=2)
    flag_without_value = "--url" if script == "stl10_data_load" else "--seed"
    outcome = call(script, flag_without_value)
    assert outcome.is_one_line_error("--help", status=2)


@pytest.mark.parametrize(
    "flags",
    [
        ("--batch-size", 0),
        ("--epochs", "1.5"),
        ("--epochs", "1e2"),
        ("--lr", "-1"),
        ("--lr", "nan"),
        ("--temp-parameter", 0),
        ("--beta", 1),
        ("--loss-weight", 1.1),
        ("--model-type", "res101"),
        ("--only-train", "maybe"),
        ("--experiment-name", "../x"),
        ("--experiment-name", "x\ny"),
        ("--epochs", "9" * 400),
        ("--device", "mps"),
        ("--no-such\nflag",),
        ("--image-size", 20),
        ("--cont-epoch", 3),
        ("--warm-start", "True", "--epochs", 2, "--cont-epoch", 3),
    ],
)
def test_values_out_of_range(call, tiny, flags):
    assert call("pirl_stl_train_test", *tiny, *flags).is_one_line_error(status=2)


def test_help_has_groups(call):
    outcome = call("pirl_stl_train_test", "--help")
    for group in ("run", "images", "pretext task and loss", "machine"):
        assert f"\n{group}:\n" in outcome.out


# ---- Data ----------------------------------------------------------------------------
@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_empty_split(call, tiny, own_data, script):
    for folder in ("unlabelled", "train"):
        shutil.rmtree(own_data / folder)
        (own_data / folder).mkdir()
    outcome = call(script, *tiny, "--data-dir", own_data)
    assert outcome.is_one_line_error("holds no images")


@pytest.mark.parametrize(
    ("script", "folder"),
    [("pirl_stl_train_test", "unlabelled/deep"), ("train_stl_after_ssl", "train/4")],
)
def test_a_folder_that_cannot_be_read(
    call, tiny, own_data, monkeypatch, script, folder
):
    """As the kernel would say it: root may read any folder."""
    (own_data / folder).mkdir(exist_ok=True)
    scandir = os.scandir

    def refuse(path):
        if Path(path) == own_data / folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        outcome = call(script, *tiny, "--data-dir", own_data)
    assert outcome.is_one_line_error(own_data / folder, "Permission denied")


def test_bad_images_are_named_together(call, tiny, own_data):
    """Ten of them, in natural order, however each is damaged."""
    bad = []
    for number in (3, 13, 23, 33, 43, 53):
        bad.append(own_data / f"train/4/{number}.png")
        bad.append(own_data / f"train/5/{number + 1}.png")
    width_and_height = (60000).to_bytes(4, "big") * 2
    whole = [image.read_bytes() for image in bad]
    for n, (image, good) in enumerate(zip(bad, whole, strict=True)):
        bomb = good[:16] + width_and_height + good[24:]
        image.write_bytes([b"", b"no image", good[:500], bomb][n % 4])

    outcome = call("train_stl_after_ssl", *tiny, "--data-dir", own_data)
    assert outcome.is_one_line_error("and 2 more: repair or remove them")
    places = [outcome.err.find(f"{image} (") for image in bad]
    assert -1 not in places[:10]
    assert places[:10] == sorted(places[:10])
    assert places[10:] == [-1, -1]

    bad[0].write_bytes(whole[0])
    bad[1].write_bytes(whole[1])
    outcome = call("train_stl_after_ssl", *tiny, "--data-dir", own_data)
    assert outcome.is_one_line_error(f"{bad[-1]} (")
    assert "more:" not in outcome.err


def test_numbers_that_do_not_go_with_the_images(call, tiny):
    outcome = call("pirl_stl_train_test", *tiny, "--count-negatives", 70)
    assert outcome.is_one_line_error("70", "69")
    outcome = call("pirl_stl_train_test", *tiny, "--batch-size", 71)
    assert outcome.is_one_line_error("71", "70")
    outcome = call("train_stl_after_ssl", *tiny, "--batch-size", 61)
    assert outcome.is_one_line_error("61", "50")


# ---- Weights -------------------------------------------------------------------------
def write_bad_weights(folder):
    """Files that are no weights of ours; their names."""
    folder.mkdir()
    trunk = {"conv1.weight": torch.zeros(1)}
    contents = {
        "other": {"kind": "PIRL weights", "trunk": trunk, "settings": {}},
        "none": {"kind": "PIRL weights", "trunk": trunk, "settings": None},
        "foreign": {"kind": "something else"},
        "list": [1, 2],
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")

    whole = (folder / "other.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("no checkpoint")
    return [*contents, "cut", "empty", "text"]


def test_weights_that_cannot_be_used(call, tiny, tmp_path):
    for name in write_bad_weights(tmp_path / "weights"):
        outcome = call("train_stl_after_ssl", *tiny, "--pirl-model-name", name)
        assert outcome.is_one_line_error(f"{name}.pt")
        assert "weights_only" not in outcome.err
        warm = ("--pirl-model-name", f"{name}.pt")
        outcome = call("pirl_stl_train_test", *tiny, *warm)
        assert outcome.is_one_line_error(f"{name}.pt")
    outcome = call("train_stl_after_ssl", *tiny, "--pirl-model-name", "")
    assert outcome.is_one_line_error("it is empty", status=2)


# ---- The system ----------------------------------------------------------------------
def test_errors_of_the_system_that_nobody_thought_of(call, tiny, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for flag in ("--data-dir", "--weights-dir"):
        outcome = call("pirl_stl_train_test", *tiny, flag, tmp_path / "loop")
        assert outcome.is_one_line_error("loop")


def test_cuda_that_is_not_there(call, tiny):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    outcome = call("pirl_stl_train_test", *tiny, "--device", "cuda")
    assert outcome.is_one_line_error("--device cpu")


def test_a_folder_that_cannot_be_made(call, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ("--weights-dir", tmp_path / "file/weights")
    outcome = call("pirl_stl_train_test", *tiny, *flags)
    assert outcome.is_one_line_error("file/weights")
    for flag in ("--weights-dir", "--observations-dir"):
        outcome = call("pirl_stl_train_test", *tiny, flag, tmp_path / "file")
        assert outcome.is_one_line_error("file", "File exists")


def test_too_little_free_disk_for_the_images(call, raw_dir, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=5_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    data = tmp_path / "data"
    outcome = call("stl10_data_load", "--raw-dir", raw_dir, "--data-dir", data)
    assert outcome.is_one_line_error("data has 5 MB", "make room")
    assert not list(data.rglob("*.png"))
