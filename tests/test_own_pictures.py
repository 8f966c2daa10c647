"""Any images, any classes and any weights to start from, through whole scripts."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, ThinResNet
from PIL import Image, ImageDraw
from test_dataset_helpers import write_classes, write_image, write_mixed_folder

import dataset_helpers
import train_stl_after_ssl

CLASSES = ["cat", "dog", "zebra"]


@pytest.fixture
def zoo(tmp_path):
    """14 training and 4 test images of each class, and 24 images without labels."""
    folder = tmp_path / "zoo"
    write_classes(folder / "train", CLASSES, 14)
    write_classes(folder / "test", CLASSES, 4, seed=1)
    for i in range(24):
        write_image(folder / f"unlabelled/{i}.png", (2, i))
    return folder


@pytest.fixture
def flags(zoo, tmp_path):
    """Flags of both training scripts that make a run take a second."""
    # fmt: off
    return [
        "--data-dir", zoo, "--image-size", 36, "--batch-size", 8, "--epochs", 1,
        "--device", "cpu", "--weights-dir", tmp_path / "weights",
        "--observations-dir", tmp_path / "observations",
    ]
    # fmt: on


def load(path):
    return torch.load(path, weights_only=True)


# ---- PretrainingTrainer ---------------------------------------------------------------------
def test_every_image_of_a_folder_is_used(call, flags, tmp_path):
    write_mixed_folder(tmp_path / "mixed/unlabelled")
    data = ("--data-dir", tmp_path / "mixed", "--batch-size", 16)
    outcome = call("pirl_stl_train_test", *flags, *data, "--only-train")
    assert outcome.status == 0, outcome.err
    assert "40 training images" in outcome.out
    assert outcome.out.count("note: 1 files") == 1


def test_unreadable_images_are_named_at_once(call, flags, zoo):
    for i in range(12):
        (zoo / f"unlabelled/{i}.png").write_bytes(b"no image")
    outcome = call("pirl_stl_train_test", *flags, "--only-train")
    assert outcome.is_one_line_error("and 2 more")
    named = set()
    for i in range(24):
        if re.search(rf"unlabelled/{i}\.png \(", outcome.err):
            named.add(i)
    assert len(named) == 10
    assert named < set(range(12))


def test_images_that_do_not_fit_in_memory(call, flags, monkeypatch):
    free = 24 * 3 * 50 * 50
    monkeypatch.setattr(dataset_helpers, "free_memory", lambda device: free)
    for side in (51, 96):
        outcome = call(
            "pirl_stl_train_test", *flags, "--image-size", side, "--only-train"
        )
        assert outcome.is_one_line_error(
            f"24 images of {side} × {side}",
            "smaller --image-size",
            "fewer images",
            "0.00018 GB",
        )
    outcome = call("train_stl_after_ssl", *flags, "--image-size", 51)
    assert outcome.is_one_line_error("42 images of 51 × 51", "smaller --image-size")

    run = ("--image-size", 50, "--only-train", "--knn-every", 0)
    assert call("pirl_stl_train_test", *flags, *run).status == 0

    monkeypatch.setattr(dataset_helpers, "free_memory", lambda device: 1000)
    run = ("--experiment-name", "new", "--only-train")
    outcome = call("pirl_stl_train_test", *flags, *run)
    assert outcome.is_one_line_error("fewer images")


# ---- Classes -------------------------------------------------------------------------
def test_classes_by_name(call, flags, zoo, tmp_path, monkeypatch):
    drawn = []
    shown = {}  # the texts of a picture, by the name of its file
    draw_text = ImageDraw.ImageDraw.text
    save_picture = train_stl_after_ssl.save_picture

    def recorded_text(draw, place, text, *rest, **options):
        drawn.append(text)
        draw_text(draw, place, text, *rest, **options)

    def recorded_save(picture, path):
        shown[path.name] = set(drawn)  # since the picture before
        drawn.clear()
        save_picture(picture, path)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded_text)
    monkeypatch.setattr(train_stl_after_ssl, "save_picture", recorded_save)
    (zoo / "train/notes.txt").write_text("")
    (zoo / "class_names.txt").write_text("airplane\nbird\n")  # of another data set

    run = ("--experiment-name", "l", "--neighbours", tmp_path / "n.png")
    outcome = call("train_stl_after_ssl", *flags, *run)
    assert outcome.status == 0, outcome.err
    assert "3 classes" in outcome.out
    assert "note: 1 files" in outcome.out

    for path in (tmp_path / "n.png", tmp_path / "observations/l_confusion.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 200
    assert shown.keys() == {"n.png", "l_confusion.png"}
    for names in shown.values():
        assert names >= set(CLASSES)

    model = load(tmp_path / "weights/l.pt")
    assert model["classes"] == CLASSES
    assert model["softmax_layer"]["weight"].shape[0] == 3


def test_a_class_of_the_test_images_alone(call, flags, zoo):
    shutil.copytree(zoo / "test/cat", zoo / "test/lion")
    outcome = call("train_stl_after_ssl", *flags, "--experiment-name", "m")
    assert outcome.is_one_line_error("test/lion")


@pytest.mark.parametrize(
    "names",
    [
        [f"kind {i}" for i in range(2)],
        [f"kind {i}" for i in range(12)],
        [f"kind {i}" for i in range(60)],
        [str(i) for i in range(1, 11)],
    ],
    ids=["2", "12", "60", "ten numbers"],
)
def test_few_and_many_classes_and_ten_numbers(call, flags, zoo, tmp_path, names):
    for split in ("train", "test"):
        shutil.rmtree(zoo / split)
        write_classes(zoo / split, names, 8 if len(names) < 30 else 4)
    animals = [f"animal {i}" for i in range(10)]
    (zoo / "class_names.txt").write_text("\n".join(animals))

    outcome = call("train_stl_after_ssl", *flags)
    assert outcome.status == 0, outcome.err
    model = load(tmp_path / "weights/e1_pirl_sup_.pt")
    numbered = "kind 0" not in names
    assert model["classes"] == (animals if numbered else names)


# ---- Test images ---------------------------------------------------------------------
def test_without_test_images_only_validation_is_reported(call, flags, zoo):
    shutil.rmtree(zoo / "test")
    outcome = call("train_stl_after_ssl", *flags, "--full-fine-tune")
    assert outcome.status == 0, outcome.err
    for row in ("Only softmax layer is fine tuned", "Full model is fine tuned"):
        lines = [line for line in outcome.out.splitlines() if line.startswith(row)]
        assert len(lines) == 1
        assert re.fullmatch(r".* \| [\d.]+% \| none", lines[0])


def test_an_empty_folder_of_test_images(call, flags, zoo, tmp_path):
    shutil.rmtree(zoo / "test")
    (zoo / "test").mkdir()
    outcome = call("train_stl_after_ssl", *flags, "--experiment-name", "l")
    assert outcome.is_one_line_error(zoo / "test", "holds no images")
    assert not (tmp_path / "weights/l.ckpt").exists(), "before training"


# ---- Sizes, weights and systems ------------------------------------------------------
@pytest.mark.parametrize(
    ("side", "dimension"),
    [
        (128, 64),
        # The whole network: on AVX-512, torch 2.11's oneDNN writes beyond its memory in
        # backward with the thin one's 8 channels at this size.
        pytest.param(224, 512, marks=[pytest.mark.slow, pytest.mark.full_trunk]),
    ],
)
def test_other_sizes(call, flags, zoo, tmp_path, side, dimension):
    flags = [*flags, "--image-size", side]
    assert call("pirl_stl_train_test", *flags, "--experiment-name", "p").status == 0

    run = ("--experiment-name", "l", "--pirl-model-name", "p", "--full-fine-tune")
    tuned = call("train_stl_after_ssl", *flags, *run)
    assert tuned.status == 0, tuned.err

    out = tmp_path / "f.npz"
    files = ("--model", tmp_path / "weights/l.pt", "--images", zoo / "test")
    assert call("extract_features", *files, "--out", out).status == 0
    assert np.load(out)["features"].shape == (12, dimension)


def test_weights_to_start_from(call, flags, tmp_path):
    """A finished model of either script, a checkpoint, and torchvision's weights."""
    weights = tmp_path / "weights"
    imagenet = tmp_path / "imagenet.pth"
    assert call("pirl_stl_train_test", *flags, "--experiment-name", "p").status == 0
    torch.manual_seed(0)
    torch.save(ThinResNet().state_dict(), imagenet)

    # What the flag is given, and the file that it means.
    starts = [
        ("p", weights / "p.pt"),
        (weights / "p.ckpt", weights / "p.ckpt"),
        (imagenet, imagenet),
        ("l0", weights / "l0.pt"),
    ]
    parameters = [name for name, _ in ThinResNet().named_parameters()]
    for i, (given, path) in enumerate(starts):
        run = ("--experiment-name", f"l{i}", "--pirl-model-name", given)
        outcome = call("train_stl_after_ssl", *flags, *run)
        assert outcome.status == 0, outcome.err
        assert f"using trunk of {path}" in outcome.out

        tuned = load(weights / f"l{i}.pt")["trunk"]
        content = load(path)
        trunk = content.get("trunk", content)
        for name in parameters:
            if not name.startswith("fc."):
                assert torch.equal(tuned[name], trunk[name]), name

    run = ("--warm-start", "--pirl-model-name", imagenet, "--experiment-name", "w")
    outcome = call("pirl_stl_train_test", *flags, *run, "--lr", 0)
    assert outcome.status == 0, outcome.err
    warm = load(weights / "w.pt")["trunk"]["conv1.weight"]
    assert torch.equal(warm, load(imagenet)["conv1.weight"])


# It runs several scripts as if they were on another system.
OTHER_SYSTEM = """
import builtins, io, json, os, sys

sys.modules["fcntl"] = None
del os.sched_getaffinity
os.process_cpu_count = os.cpu_count  # of later versions; it would use the former


def without_proc(path, *rest, plain=open, **options):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "No such file or directory", path)
    return plain(path, *rest, **options)


builtins.open = io.open = without_proc

import models
from conftest import SCRIPTS, ThinResNet
from runtime.script import run_script

models.TRUNKS["res18"] = ThinResNet
for sys.argv in json.loads(sys.argv[1]):
    run_script(SCRIPTS[sys.argv[0]].main)
"""


@pytest.mark.slow
def test_every_script_runs_without_what_only_linux_has(flags, raw_dir, tmp_path):
    data = tmp_path / "data"
    run = (*flags, "--data-dir", data)
    pretrain = ("pirl_stl_train_test", *run, "--experiment-name", "p")
    fine_tune = ("train_stl_after_ssl", *run, "--experiment-name", "l")
    model = tmp_path / "weights/l.pt"
    commands = [
        ("stl10_data_load", "--raw-dir", raw_dir, "--data-dir", data),
        pretrain,
        (*pretrain, "--resume", "--epochs", 2),
        (*fine_tune, "--pirl-model-name", "p", "--full-fine-tune"),
        ("extract_features", "--model", model, "--images", data / "test"),
        ("pictures", "--data-dir", data, "--out", tmp_path / "jigsaw.png"),
    ]
    text = json.dumps([[str(part) for part in command] for command in commands])
    environment = dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", OTHER_SYSTEM, text],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "features.npz")["features"].shape == (40, 64)
    assert (tmp_path / "jigsaw.png").exists()
