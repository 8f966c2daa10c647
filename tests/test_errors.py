"""Bad input gets one line on standard error, and nothing that was there is lost.

The status is 1, or 2 for usage.
"""

import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import start

import evaluation
import pirl_stl_train_test
import train_stl_after_ssl

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
        ("--pirl-model-name", "x"),
        ("--warm-start", "True", "--epochs", 2, "--cont-epoch", 3),
    ],
)
def test_values_out_of_range(call, tiny, flags):
    assert call("pirl_stl_train_test", *tiny, *flags).is_one_line_error(status=2)


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
@pytest.mark.parametrize(
    "flag", ["--data-dir", "--weights-dir", "--observations-dir", "--pirl-model-name"]
)
def test_an_empty_text_is_no_path(call, tiny, script, flag):
    outcome = call(script, *tiny, flag, "")
    assert outcome.is_one_line_error(flag, "empty", status=2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_every_default_in_groups(call, script):
    outcome = call(script, "--help")
    assert outcome.status == 0
    assert "default: 128" in outcome.out or script == "stl10_data_load"
    assert "default: None" not in outcome.out
    if script == "pirl_stl_train_test":
        for group in ("files", "machine", "images", "network", "loss", "training"):
            assert f"\n{group}:\n" in outcome.out


# ---- Data ----------------------------------------------------------------------------
@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_data_that_is_not_there(call, tiny, tmp_path, script):
    outcome = call(script, *tiny, "--data-dir", tmp_path / "nothing")
    assert outcome.is_one_line_error("nothing", "stl10_data_load.py")


@pytest.mark.parametrize("script", TRAINING_SCRIPTS)
def test_empty_split(call, tiny, own_data, script):
    for folder in ("unlabelled", "train"):
        shutil.rmtree(own_data / folder)
        (own_data / folder).mkdir()
    outcome = call(script, *tiny, "--data-dir", own_data)
    assert outcome.is_one_line_error("holds no images")


@pytest.mark.parametrize(
    ("script", "folder"),
    [("pirl_stl_train_test", "unlabelled"), ("train_stl_after_ssl", "train/4")],
)
def test_a_folder_that_cannot_be_read(
    call, tiny, own_data, monkeypatch, script, folder
):
    """As the kernel would say it: root may read any folder."""
    scandir = os.scandir

    def refuse(path):
        if Path(path) == own_data / folder:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        outcome = call(script, *tiny, "--data-dir", own_data)
    assert outcome.is_one_line_error(own_data / folder, "Permission denied")


@pytest.mark.parametrize(
    ("script", "name", "flag"),
    [
        ("pirl_stl_train_test", "unlabelled/3.png", "--only-train"),
        ("train_stl_after_ssl", "train/4/3.png", "--full-fine-tune"),
    ],
)
@pytest.mark.parametrize("kind", ["empty", "text", "cut", "bomb"])
def test_bad_images_are_named(call, tiny, own_data, script, name, flag, kind):
    image = own_data / name
    good = image.read_bytes()
    width_and_height = (60000).to_bytes(4, "big") * 2
    bad = {
        "empty": b"",
        "text": b"no image",
        "cut": good[:500],
        "bomb": good[:16] + width_and_height + good[24:],
    }
    image.write_bytes(bad[kind])
    outcome = call(script, *tiny, "--data-dir", own_data, flag)
    assert outcome.is_one_line_error(image)


def test_numbers_that_do_not_go_with_the_images(call, tiny):
    outcome = call("pirl_stl_train_test", *tiny, "--count-negatives", 70)
    assert outcome.is_one_line_error("70", "69")
    outcome = call("pirl_stl_train_test", *tiny, "--batch-size", 71)
    assert outcome.is_one_line_error("71", "70")
    outcome = call("train_stl_after_ssl", *tiny, "--batch-size", 61)
    assert outcome.is_one_line_error("61", "50")


# ---- Weights -------------------------------------------------------------------------
class Evil:
    def __reduce__(self):
        return os.system, ("echo evil",)


def write_bad_weights(folder):
    """Files that are no weights of ours; their names."""
    folder.mkdir()
    trunk = {"conv1.weight": torch.zeros(1)}
    contents = {
        "other": {"kind": "PIRL weights", "trunk": trunk, "settings": {}},
        "none": {"kind": "PIRL weights", "trunk": trunk, "settings": None},
        "foreign": {"kind": "something else"},
        "list": [1, 2],
        "code": {"kind": "PIRL weights", "trunk": Evil()},
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pt")

    whole = (folder / "other.pt").read_bytes()
    (folder / "cut.pt").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.pt").write_bytes(b"")
    (folder / "text.pt").write_text("no checkpoint")
    return [*contents, "cut", "empty", "text"]


def test_weights_that_cannot_be_used(call, tiny, tmp_path):
    names = write_bad_weights(tmp_path / "weights")
    assert len(names) == 8
    for name in names:
        outcome = call("train_stl_after_ssl", *tiny, "--pirl-model-name", name)
        assert outcome.is_one_line_error(f"{name}.pt")
        warm = ("--warm-start", "--pirl-model-name", f"{name}.pt")
        outcome = call("pirl_stl_train_test", *tiny, *warm)
        assert outcome.is_one_line_error(f"{name}.pt")
    outcome = call("train_stl_after_ssl", *tiny, "--pirl-model-name", "nowhere")
    assert outcome.is_one_line_error("nowhere")


def test_a_checkpoint_of_other_images_or_labels(call, tiny, own_data):
    """The number of images is unchanged, so only the checksum differs."""
    run = (*tiny, "--data-dir", own_data, "--epochs", 1, "--experiment-name")
    resume = ("train_stl_after_ssl", *run, "l", "--resume")
    assert call("train_stl_after_ssl", *run, "l").status == 0
    image = own_data / "test/1/0.png"
    pixels = image.read_bytes()
    shutil.copy(own_data / "test/2/1.png", image)
    assert call(*resume).is_one_line_error(
        "l.ckpt was made from other images", "--data-dir"
    )
    image.write_bytes(pixels)
    # The same pixels in the same order, with another label of one.
    (own_data / "train/1/0.png").rename(own_data / "train/2/0.png")
    assert call(*resume).is_one_line_error(
        "l.ckpt was made from other images", "--data-dir"
    )

    assert call("pirl_stl_train_test", *run, "p").status == 0
    shutil.copy(own_data / "unlabelled/3.png", own_data / "unlabelled/4.png")
    outcome = call("pirl_stl_train_test", *run, "p", "--resume")
    assert outcome.is_one_line_error("p.ckpt was made from other images")


def test_weights_of_another_architecture(call, tiny):
    run = ("--epochs", 1, "--experiment-name", "exp")
    assert call("pirl_stl_train_test", *tiny, *run).status == 0

    run = ("--model-type", "res34", "--pirl-model-name", "exp")
    outcome = call("train_stl_after_ssl", *tiny, *run)
    assert outcome.is_one_line_error("exp.pt", "--model-type")
    warm = ("--warm-start", "--pirl-model-name", "exp", "--experiment-name", "new")
    outcome = call("pirl_stl_train_test", *tiny, *warm, "--non-linear-head")
    assert outcome.is_one_line_error("exp.pt")


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


@pytest.mark.parametrize("picture", ["", ".", "..", "/", "folder"])
def test_a_picture_that_cannot_be_written_is_refused_before_training(
    call, tiny, tmp_path, picture
):
    (tmp_path / "folder").mkdir()
    if picture == "folder":
        picture = tmp_path / "folder"
    run = ("--experiment-name", "exp", "--neighbours", picture)
    outcome = call("train_stl_after_ssl", *tiny, *run)
    assert outcome.is_one_line_error("--neighbours", status=2)
    assert not (tmp_path / "weights/exp.pt").exists()


# ---- Signals -------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_signals(tiny, tmp_path, number, status):
    """Processes of test_checkpoints.py and test_progress.py get them, too."""
    run = ("--epochs", 500, "--experiment-name", "exp", "--checkpoint-minutes", 0)
    process = start("tests/thin_script", "pirl_stl_train_test", *tiny, *run)
    checkpoint = tmp_path / "weights/exp.ckpt"
    deadline = time.monotonic() + 60
    while not checkpoint.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)

    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status, err
    assert "--resume True" in out
    assert err == ""
    assert torch.load(checkpoint, weights_only=True)["training"]["step"] >= 1


# ---- Divergence ----------------------------------------------------------------------
def lose_weights(trainer):
    trainer.model.trunk.conv1.weight.data[0] = float("nan")


@pytest.mark.parametrize("broken", ["loss", "weights"])
@pytest.mark.parametrize(
    ("script", "trainer_class", "more", "steps_per_epoch"),
    [
        (
            "pirl_stl_train_test",
            pirl_stl_train_test.PretrainingTrainer,
            ("--knn-every", 0),
            5,
        ),
        (
            "pirl_stl_train_test",
            pirl_stl_train_test.PretrainingTrainer,
            ("--knn-every", 0, "--loss", "nce"),
            5,
        ),
        (
            "train_stl_after_ssl",
            train_stl_after_ssl.FineTuningTrainer,
            ("--full-fine-tune",),
            4,
        ),
    ],
    ids=["pretraining", "nce", "fine-tuning"],
)
def test_a_run_that_diverges_keeps_its_last_checkpoint(
    call,
    tiny,
    tmp_path,
    monkeypatch,
    script,
    trainer_class,
    more,
    steps_per_epoch,
    broken,
):
    """In the third step of the second epoch the weights are lost.

    That is before the loss sees them, or after.
    """
    train_step = trainer_class.train_step
    calls = []
    run = (*tiny, "--experiment-name", "exp", "--checkpoint-minutes", 0, *more)

    def poisoned(trainer, *arguments):
        calls.append(1)
        now = len(calls) == steps_per_epoch + 3
        if now and broken == "loss":
            lose_weights(trainer)
        totals = train_step(trainer, *arguments)
        if now:
            lose_weights(trainer)
        return totals

    with monkeypatch.context() as patch:
        patch.setattr(trainer_class, "train_step", poisoned)
        outcome = call(script, *run)
    assert outcome.is_one_line_error("epoch 2, step 3 or before", "lr", "exp.ckpt")
    checkpoint = torch.load(tmp_path / "weights/exp.ckpt", weights_only=True)
    assert checkpoint["training"]["step"] == 2
    assert not (tmp_path / "weights/exp.pt").exists()

    assert call(script, *run, "--resume").status == 0


def test_a_softmax_layer_that_is_not_finite(call, tiny, monkeypatch):
    trunk_features = evaluation.trunk_features

    def lost_features(*arguments):
        return trunk_features(*arguments) * float("nan")

    monkeypatch.setattr(evaluation, "trunk_features", lost_features)
    outcome = call("train_stl_after_ssl", *tiny)
    assert outcome.is_one_line_error("epoch 1", "--lr")
