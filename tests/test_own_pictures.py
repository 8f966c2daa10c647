"""Any folder of images, any classes, any weights to start from; features of them."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, ThinResNet18
from PIL import Image, ImageDraw

import dataset_helpers as dh
import pirl_stl_train_test as pirl
import train_stl_after_ssl

FORMATS = [("JPEG", ".jpg"), ("PNG", ".PNG"), ("BMP", ".bmp"), ("TIFF", ".tif"), ("WEBP", ".webp"), ("PPM", ".ppm")]
SIZES = [(96, 96), (300, 200), (50, 120), (64, 64)]


def write_image(path, seed, size=(48, 48)):
    """A smooth random picture, in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)


def write_classes(folder, classes, count, seed=0):
    for label, name in enumerate(classes):
        for i in range(count):
            write_image(folder / name / f"IMG {i}.jpg", (seed, label, i))


@pytest.fixture
def zoo(tmp_path):
    """Three classes, 14 training and 4 test images of each, and 24 images without labels."""
    write_classes(tmp_path / "zoo/train", ["cat", "dog", "zebra"], 14)
    write_classes(tmp_path / "zoo/test", ["cat", "dog", "zebra"], 4, seed=1)
    for i in range(24):
        write_image(tmp_path / f"zoo/unlabelled/{i}.png", (2, i))
    return tmp_path / "zoo"


@pytest.fixture
def flags(zoo, tmp_path):
    folders = ["--weights-dir", tmp_path / "weights", "--observations-dir", tmp_path / "observations"]
    return ["--data-dir", zoo, "--image-size", 36, "--batch-size", 8, "--epochs", 1, "--device", "cpu", *folders]


def test_every_image_of_a_folder_is_used(call, tmp_path, capsys):
    folder = tmp_path / "unlabelled"
    for i in range(40):
        _, ending = FORMATS[i % 6]
        write_image(folder / ("" if i % 3 else "deep/er") / f"odd näme ({i}){ending}", i, SIZES[i % 4])
    (folder / "notes.txt").write_text("no image")
    write_image(folder / ".hidden.png", 99)
    write_image(folder / ".thumbnails/1.png", 99)
    files = dh.image_files(folder)
    assert len(files) == 40
    assert capsys.readouterr().out.count("note: 1 files") == 1
    numbers = [int(re.search(r"\((\d+)\)", file.name)[1]) for file in files]
    assert numbers == sorted(numbers, key=lambda i: (i % 3 != 0, i)), "folders first, numbers in their order"
    outcome = call(
        *("pirl_stl_train_test", "--data-dir", tmp_path, "--only-train", "--image-size", 36, "--batch-size", 16),
        *("--epochs", 1, "--device", "cpu", "--weights-dir", tmp_path / "w", "--observations-dir", tmp_path / "o"),
    )
    assert outcome.status == 0, outcome.err
    assert "40 training images" in outcome.out
    folder.rename(tmp_path / "unlabeled")
    assert dh.unlabelled_folder(tmp_path) == tmp_path / "unlabeled"


def test_links_are_followed_and_what_is_no_file_is_counted(tmp_path, capsys):
    write_image(tmp_path / "elsewhere/1.png", 1)
    write_image(tmp_path / "photos/2.png", 2)
    (tmp_path / "photos/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "photos/pipe.png")  # reading it would wait for ever
    files = dh.image_files(tmp_path / "photos")
    assert [str(file.relative_to(tmp_path / "photos")) for file in files] == ["2.png", "more/1.png"]
    assert "note: 2 files" in capsys.readouterr().out


def test_natural_order():
    names = ["10.png", "9.png", "a2", "a10", "1/3.png", "01.png", "B", "a"]
    assert sorted(names, key=dh.natural) == ["01.png", "1/3.png", "9.png", "10.png", "B", "a", "a2", "a10"]


@pytest.mark.parametrize("side", [96, 48, 128])
@pytest.mark.parametrize(("size", "name"), [((300, 200), "a.jpg"), ((96, 96), "a.png"), ((50, 120), "a.png")])
def test_images_are_resized_and_cropped_as_pillow_does(tmp_path, size, name, side):
    write_image(tmp_path / name, 3, size)
    with Image.open(tmp_path / name) as image:
        scale = side / min(size)
        wide, high = (side if edge == min(size) else int(edge * scale) for edge in size)
        image = image.resize((wide, high), Image.Resampling.BICUBIC) if size != (side, side) else image
        left, top = round((wide - side) / 2), round((high - side) / 2)
        expected = np.asarray(image.crop((left, top, left + side, top + side)))
    assert (dh.read_image(tmp_path / name, side) == expected.transpose(2, 0, 1)).all()


def test_photographs_of_a_turned_camera_stand_upright(tmp_path):
    image = Image.fromarray(np.repeat(np.repeat(np.uint8([[0, 255]]), 48, 0), 24, 1)).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = 6  # the top of the picture is on its right
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    read = dh.read_image(tmp_path / "a.jpg", 48)
    assert read[:, :20].mean() < 20
    assert read[:, 28:].mean() > 235


def test_classes_by_name(call, flags, zoo, tmp_path, monkeypatch):
    drawn, shown, text, save = [], {}, ImageDraw.ImageDraw.text, train_stl_after_ssl.save_picture

    def recorded(draw, place, line, *rest, **options):
        drawn.append(line)
        text(draw, place, line, *rest, **options)

    def saved(picture, path):
        shown[path.name] = {*drawn}  # since the picture before
        drawn.clear()
        save(picture, path)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded)
    monkeypatch.setattr(train_stl_after_ssl, "save_picture", saved)
    (zoo / "train/notes.txt").write_text("")
    (zoo / "class_names.txt").write_text("airplane\nbird\n")  # of another data set
    outcome = call("train_stl_after_ssl", *flags, "--experiment-name", "l", "--neighbours", tmp_path / "n.png")
    assert outcome.status == 0, outcome.err
    assert "3 classes" in outcome.out
    assert "note: 1 files" in outcome.out
    with Image.open(tmp_path / "n.png") as picture, Image.open(tmp_path / "observations/l_confusion.png") as matrix:
        assert min(picture.size + matrix.size) > 200
    assert shown.keys() == {"n.png", "l_confusion.png"}
    assert all(names >= {"cat", "dog", "zebra"} for names in shown.values())
    state = torch.load(tmp_path / "weights/l.pt", weights_only=True)
    assert state["classes"] == ["cat", "dog", "zebra"]
    assert state["softmax_layer"]["weight"].shape[0] == 3
    _, labels, classes, _ = dh.load_labelled(zoo / "train", 36, torch.device("cpu"))
    assert classes == ["cat", "dog", "zebra"]
    assert labels.tolist() == [0, 1, 2] * 14, "in the order of the files' names"
    shutil.copytree(zoo / "test/cat", zoo / "test/lion")
    assert call("train_stl_after_ssl", *flags, "--experiment-name", "m").is_one_line_error("test/lion")


@pytest.mark.parametrize("names", [[f"kind {i}" for i in range(n)] for n in (2, 12, 60)] + [[*map(str, range(1, 11))]])
def test_few_and_many_classes_and_ten_numbers(call, flags, zoo, tmp_path, names):
    for split in ("train", "test"):
        shutil.rmtree(zoo / split)
        write_classes(zoo / split, names, 8 if len(names) < 30 else 4)
    (zoo / "class_names.txt").write_text("\n".join(f"animal {i}" for i in range(10)))
    outcome = call("train_stl_after_ssl", *flags)
    assert outcome.status == 0, outcome.err
    state = torch.load(tmp_path / "weights/e1_pirl_sup_.pt", weights_only=True)
    assert state["classes"] == (names if "kind 0" in names else [f"animal {i}" for i in range(10)])


def test_without_test_images_only_validation_is_reported(call, flags, zoo):
    shutil.rmtree(zoo / "test")
    outcome = call("train_stl_after_ssl", *flags, "--full-fine-tune")
    assert outcome.status == 0, outcome.err
    for row in ("Only softmax layer is fine tuned", "Full model is fine tuned"):
        (line,) = [line for line in outcome.out.splitlines() if line.startswith(row)]
        assert re.fullmatch(r".* \| [\d.]+% \| none", line)


@pytest.mark.parametrize("side", [128, pytest.param(224, marks=pytest.mark.slow)])
def test_other_sizes(call, flags, zoo, tmp_path, side):
    flags = [*flags, "--image-size", side]
    assert call("pirl_stl_train_test", *flags, "--experiment-name", "p").status == 0
    tuned = call("train_stl_after_ssl", *flags, "--experiment-name", "l", "--pirl-model-name", "p", "--full-fine-tune")
    assert tuned.status == 0, tuned.err
    out = tmp_path / "f.npz"
    command = ("extract_features", "--model", tmp_path / "weights/l.pt", "--images", zoo / "test", "--out", out)
    assert call(*command).status == 0
    assert np.load(out)["features"].shape == (12, 64)


def test_unreadable_images_are_named_at_once(call, flags, zoo):
    for i in range(12):
        (zoo / f"unlabelled/{i}.png").write_bytes(b"no image")
    outcome = call("pirl_stl_train_test", *flags, "--only-train")
    assert outcome.is_one_line_error("and 2 more")
    named = {i for i in range(24) if re.search(rf"unlabelled/{i}\.png \(", outcome.err)}
    assert len(named) == 10
    assert named < set(range(12))


def test_images_that_do_not_fit_in_memory(call, flags, monkeypatch):
    monkeypatch.setattr(dh, "free_memory", lambda device: 24 * 3 * 50**2)
    for side in (51, 96):
        outcome = call("pirl_stl_train_test", *flags, "--image-size", side, "--only-train")
        assert outcome.is_one_line_error(f"24 images of {side} × {side}", "--image-size 50 or smaller", "0.00018 GB")
    outcome = call("train_stl_after_ssl", *flags, "--image-size", 51)
    assert outcome.is_one_line_error("42 images of 51 × 51", "--image-size 37 or smaller")
    monkeypatch.setattr(dh, "free_memory", lambda device: 1000)
    assert call("pirl_stl_train_test", *flags, "--only-train").is_one_line_error("fewer images")
    monkeypatch.setattr(dh, "free_memory", lambda device: 24 * 3 * 50**2)
    assert call("pirl_stl_train_test", *flags, "--image-size", 50, "--only-train", "--knn-every", 0).status == 0


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

import run_helpers as rh
from conftest import SCRIPTS, ThinResNet18
import models
models.TRUNKS["res18"] = ThinResNet18
for sys.argv in json.loads(sys.argv[1]):
    rh.run_script(SCRIPTS[sys.argv[0]].main)
"""


@pytest.mark.slow
def test_every_script_runs_without_what_only_linux_has(flags, raw_dir, tmp_path):
    run = (*flags, "--data-dir", tmp_path / "data")
    commands = [
        ("stl10_data_load", "--raw-dir", raw_dir, "--data-dir", tmp_path / "data"),
        ("pirl_stl_train_test", *run, "--experiment-name", "p"),
        ("pirl_stl_train_test", *run, "--experiment-name", "p", "--resume", "--epochs", 2),
        ("train_stl_after_ssl", *run, "--experiment-name", "l", "--pirl-model-name", "p", "--full-fine-tune"),
        ("extract_features", "--model", tmp_path / "weights/l.pt", "--images", tmp_path / "data/test"),
    ]
    text = json.dumps([[*map(str, command)] for command in commands])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    command = [sys.executable, "-c", OTHER_SYSTEM, text]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "features.npz")["features"].shape == (40, 64)


def test_a_system_without_proc(monkeypatch):
    def nothing(path, *_):
        raise FileNotFoundError(path)

    assert 10**8 < dh.free_memory(torch.device("cpu")) < 10**14
    monkeypatch.setattr(Path, "read_text", nothing)
    assert dh.free_memory(torch.device("cpu")) == float("inf")


def test_too_few_images(call, flags, zoo):
    for file in list((zoo / "unlabelled").iterdir())[3:]:
        file.unlink()
    run = (*flags, "--batch-size", 3, "--only-train")
    assert call("pirl_stl_train_test", *run, "--experiment-name", "three").status == 0
    next((zoo / "unlabelled").iterdir()).unlink()
    for size in (1, 2):
        assert call("pirl_stl_train_test", *run, "--batch-size", size).is_one_line_error("2 training images")


def test_an_empty_folder_of_test_images(call, flags, zoo, tmp_path):
    shutil.rmtree(zoo / "test")
    (zoo / "test").mkdir()
    outcome = call("train_stl_after_ssl", *flags, "--experiment-name", "l")
    assert outcome.is_one_line_error(zoo / "test", "holds no images")
    assert not (tmp_path / "weights/l.ckpt").exists(), "before training"


def test_labels_that_pretraining_cannot_use_are_a_note(call, flags, zoo):
    for name in ("dog", "zebra"):
        shutil.rmtree(zoo / "train" / name)
    outcome = call("pirl_stl_train_test", *flags)
    assert outcome.status == 0, outcome.err
    assert "note: no nearest-neighbour accuracy" in outcome.out


def test_weights_to_start_from(call, flags, tmp_path):
    """A finished model of either script, a checkpoint, and torchvision's own weights."""
    weights = tmp_path / "weights"
    assert call("pirl_stl_train_test", *flags, "--experiment-name", "p").status == 0
    torch.manual_seed(0)
    torch.save(ThinResNet18().state_dict(), tmp_path / "imagenet.pth")
    for i, start in enumerate(("p", weights / "p.ckpt", tmp_path / "imagenet.pth", "l0")):
        outcome = call("train_stl_after_ssl", *flags, "--experiment-name", f"l{i}", "--pirl-model-name", start)
        assert outcome.status == 0, outcome.err
        assert re.search("using trunk of .*(p.pt|p.ckpt|imagenet.pth|l0.pt)", outcome.out)
        tuned = torch.load(weights / f"l{i}.pt", weights_only=True)["trunk"]
        path = {"p": weights / "p.pt", "l0": weights / "l0.pt"}.get(start, start)
        state = torch.load(path, weights_only=True)
        state = state.get("trunk") or {
            k.removeprefix("trunk."): v for k, v in state.get("run", {"model": state})["model"].items()
        }
        for name, _ in ThinResNet18().named_parameters():
            assert name.startswith("fc.") or torch.equal(tuned[name], state[name]), name
    warm = ("--warm-start", "--pirl-model-name", tmp_path / "imagenet.pth", "--experiment-name", "w", "--lr", 0)
    outcome = call("pirl_stl_train_test", *flags, *warm)
    assert outcome.status == 0, outcome.err
    started = torch.load(weights / "w.pt", weights_only=True)["trunk"]["conv1.weight"]
    assert torch.equal(started, torch.load(tmp_path / "imagenet.pth", weights_only=True)["conv1.weight"])


def test_more_epochs_for_a_finished_run(call, flags, tmp_path):
    run = [*flags, "--experiment-name", "p"]
    assert call("pirl_stl_train_test", *run).status == 0
    outcome = call("pirl_stl_train_test", *run, "--epochs", 2, "--resume")
    assert outcome.status == 0, outcome.err
    assert "note: the learning rate is 0" in outcome.out
    assert "--tmax-for-cos-decay 2 would" in outcome.out
    rows = torch.load(tmp_path / "weights/p.pt", weights_only=True)["rows"]
    assert [row["epoch"] for row in rows] == [1, 2]
    assert rows[1]["learning_rate"] == 0
    assert call("pirl_stl_train_test", *run, "--epochs", 3, "--tmax-for-cos-decay", 3, "--resume").status == 0
    assert torch.load(tmp_path / "weights/p.pt", weights_only=True)["rows"][2]["learning_rate"] > 0


def test_compile_without_a_compiler(call, flags, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert call("pirl_stl_train_test", *flags, "--compile").is_one_line_error("C++ compiler", "g++")


@pytest.mark.parametrize("script", sorted(file.stem for file in ROOT.glob("*.py") if "__main__" in file.read_text()))
def test_an_old_python_is_one_line(script):
    """datetime.UTC, ExceptionGroup and tomllib are among what Python 3.11 brought."""
    old = "import builtins, datetime, sys; sys.version_info = (3, 10, 0); sys.modules['tomllib'] = None"
    code = f"{old}; del datetime.UTC, builtins.ExceptionGroup; import {script}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this is Python")
    assert len(done.stderr.splitlines()) == 1


def test_features_and_predictions(call, flags, zoo, tmp_path):
    labelled = call("train_stl_after_ssl", *flags, "--experiment-name", "l", "--full-fine-tune")
    assert labelled.status == 0, labelled.err
    command = ["extract_features", "--images", zoo / "test", "--weights-dir", tmp_path / "weights", "--batch-size", 8]
    assert call(*command, "--model", "l", "--out", tmp_path / "f.npz").status == 0
    found = np.load(tmp_path / "f.npz")
    assert found["features"].dtype == np.float32
    assert found["features"].shape == (12, 64)
    predicted = found["classes"][found["probabilities"].argmax(1)]
    right = [name.split("/")[0] == label for name, label in zip(found["names"], predicted, strict=True)]
    accuracy = torch.load(tmp_path / "weights/l.pt", weights_only=True)["results"]["full"][1]
    assert f"{np.mean(right):.2%}" == f"{accuracy:.2%}"
    assert f"| {np.mean(right):.2%}\n" in labelled.out
    assert call(*command, "--model", "l", "--out", tmp_path / "p.csv").status == 0
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == predicted.tolist()
    assert [row["name"] for row in rows] == found["names"].tolist()
    np.testing.assert_allclose([float(row["probability"]) for row in rows], found["probabilities"].max(1), 1e-6)
    assert call("pirl_stl_train_test", *flags, "--experiment-name", "p").status == 0
    for model in ("p", "p.ckpt", "l.ckpt"):
        assert call(*command, "--model", model, "--out", tmp_path / "g.npz").status == 0
    again = np.load(tmp_path / "g.npz")
    assert all((again[name] == found[name]).all() for name in found.files), "the finished run's checkpoint is the model"
    assert call(*command, "--model", "p", "--out", tmp_path / "p.csv").is_one_line_error("no softmax layer")
    assert call(*command, "--model", "nowhere").is_one_line_error("nowhere")
    assert call(*command, "--model", "l", "--out", "features.txt").is_one_line_error(".npz", status=2)


def test_features_by_a_run_in_training(call, flags, zoo, tmp_path, monkeypatch):
    """Pretraining and fine-tuning are left in the third step, with a checkpoint of the second."""
    flags = (*flags, "--experiment-name", "exp", "--checkpoint-minutes", 0)
    command = ("extract_features", "--images", zoo / "test", "--weights-dir", tmp_path / "weights")
    for script, run_class, more in (
        ("pirl_stl_train_test", pirl.Pretraining, ()),
        ("train_stl_after_ssl", train_stl_after_ssl.FineTuning, ("--full-fine-tune",)),
    ):
        steps = []

        def interrupted(run, *arguments, steps=steps, step=run_class.step):
            steps.append(1)
            if len(steps) == 3:
                raise KeyboardInterrupt
            return step(run, *arguments)

        monkeypatch.setattr(run_class, "step", interrupted)
        assert call(script, *flags, *more).status == 130
        assert call(*command, "--model", "exp", "--out", tmp_path / "f.npz").status == 0
        found = np.load(tmp_path / "f.npz")
        assert np.isfinite(found["features"]).all()
        assert found["features"].std(0).max() > 0
        (tmp_path / "weights/exp.ckpt").unlink()
    assert found["probabilities"].shape == (12, 3)
    np.testing.assert_allclose(found["probabilities"].sum(1), 1, 1e-5)


def test_file_names_of_another_encoding(call, flags, zoo, tmp_path):
    """As old archives leave them: Linux allows any bytes."""
    assert call("train_stl_after_ssl", *flags, "--experiment-name", "l").status == 0
    name = b"caf\xe9.jpg"
    (zoo / "test/cat/IMG 0.jpg").rename(zoo / "test/cat" / os.fsdecode(name))
    command = ("extract_features", "--model", tmp_path / "weights/l.pt", "--images", zoo / "test", "--out")
    for out in ("f.npz", "p.csv"):
        assert call(*command, tmp_path / out).status == 0
    assert os.fsdecode(b"cat/" + name) in np.load(tmp_path / "f.npz")["names"]
    assert b"\ncat/" + name + b"," in (tmp_path / "p.csv").read_bytes()


@pytest.mark.full_trunk
def test_features_by_torchvision_s_weights(call, flags, zoo, tmp_path):
    """Which of its ResNets it is need not be said; no flag could."""
    torch.save(torchvision.models.resnet34().state_dict(), tmp_path / "resnet34.pth")
    command = ("extract_features", "--images", zoo / "test", "--image-size", 36, "--out", tmp_path / "f.npz")
    outcome = call(*command, "--model", tmp_path / "resnet34.pth")
    assert outcome.status == 0, outcome.err
    assert np.load(tmp_path / "f.npz")["features"].shape == (12, 512)


@pytest.mark.full_trunk
@pytest.mark.parametrize("stem", ["imagenet", pytest.param("small", marks=pytest.mark.slow)])
def test_the_readme_s_snippet(call, flags, zoo, tmp_path, stem):
    """It gives the features that extract_features.py gives."""
    code = re.search(r"## Use the trunk\n\n((?:    .*\n|\n)+)", (ROOT / "README.md").read_text())[1]
    outcome = call("pirl_stl_train_test", *flags, "--experiment-name", "exp", "--stem", stem)
    assert outcome.status == 0, outcome.err
    write_image(tmp_path / "pictures/cat.jpg", 5, (60, 60))
    shutil.copy(tmp_path / "pictures/cat.jpg", tmp_path)
    code = "".join(line.removeprefix("    ") for line in code.splitlines(keepends=True))
    code += "\nimport numpy; numpy.save('own.npy', features.numpy())\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    command = ("--model", tmp_path / "weights/exp.pt", "--images", tmp_path / "pictures", "--out", tmp_path / "f.npz")
    assert call("extract_features", *command).status == 0
    np.testing.assert_allclose(np.load(tmp_path / "own.npy"), np.load(tmp_path / "f.npz")["features"], 1e-3, 1e-3)
