"""Features and predictions of any images by any of the trained networks."""

import csv
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image

import hubconf
import pirl_stl_train_test
import train_stl_after_ssl
from dataset_helpers import list_images, load_images
from evaluation import trunk_features

CLASSES = ["cat", "dog", "zebra"]


def write_image(path, seed, size=(48, 48)):
    """A smooth random picture, in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def zoo(tmp_path):
    """14 training and 4 test images of each class, and 24 images without labels."""
    folder = tmp_path / "zoo"
    for seed, (split, count) in enumerate({"train": 14, "test": 4}.items()):
        for label, name in enumerate(CLASSES):
            for i in range(count):
                path = folder / split / name / f"IMG {i}.jpg"
                write_image(path, (seed, label, i))
    for i in range(24):
        write_image(folder / f"unlabelled/{i}.png", (2, i))
    return folder


@pytest.fixture
def flags(zoo, tmp_path):
    """Flags of both training scripts that make a run take a second."""
    return [
        *("--data-dir", zoo, "--image-size", 36, "--batch-size", 8, "--epochs", 1),
        *("--device", "cpu", "--weights-dir", tmp_path / "weights"),
        *("--observations-dir", tmp_path / "observations"),
    ]


@pytest.fixture
def extract(call, zoo, tmp_path):
    """extract(*arguments) runs the script on the test images."""

    def extract(*arguments):
        return call(
            "extract_features",
            *("--images", zoo / "test"),
            *("--weights-dir", tmp_path / "weights", "--device", "cpu"),
            *arguments,
        )

    return extract


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_features_and_predictions(call, flags, extract, tmp_path):
    labelled = call(
        "train_stl_after_ssl", *flags, "--experiment-name", "l", "--full-fine-tune"
    )
    assert labelled.status == 0, labelled.err

    outcome = extract("--batch-size", 8, "--model", "l", "--out", tmp_path / "f.npz")
    assert outcome.status == 0, outcome.err
    found = np.load(tmp_path / "f.npz")
    assert found["features"].dtype == np.float32
    assert found["features"].shape == (12, 64)
    assert found["classes"].tolist() == CLASSES

    # The images are those of the test, so the accuracy must be that of the table.
    predicted = found["classes"][found["probabilities"].argmax(1)]
    true_classes = [name.split("/")[0] for name in found["names"]]
    share = np.mean(predicted == true_classes)
    saved = torch.load(tmp_path / "weights/l.pt", weights_only=True)
    _, accuracy = saved["results"]["full"]
    assert f"{share:.2%}" == f"{accuracy:.2%}"
    assert f"| {share:.2%}\n" in labelled.out

    outcome = extract("--batch-size", 8, "--model", "l", "--out", tmp_path / "p.csv")
    assert outcome.status == 0, outcome.err
    rows = read_csv(tmp_path / "p.csv")
    assert [row["class"] for row in rows] == predicted.tolist()
    assert [row["name"] for row in rows] == found["names"].tolist()
    probabilities = [float(row["probability"]) for row in rows]
    np.testing.assert_allclose(probabilities, found["probabilities"].max(1), 1e-6)


def test_the_files_of_both_scripts_and_what_they_lack(call, flags, extract, tmp_path):
    l_run = (*flags, "--experiment-name", "l", "--full-fine-tune")
    assert call("train_stl_after_ssl", *l_run).status == 0
    assert call("pirl_stl_train_test", *flags, "--experiment-name", "p").status == 0
    found = {}
    for model in ("l", "l.ckpt", "p", "p.ckpt"):
        out = tmp_path / f"{model}.npz"
        outcome = extract("--batch-size", 8, "--model", model, "--out", out)
        assert outcome.status == 0, outcome.err
        found[model] = np.load(out)
    for name in found["l"].files:
        same = found["l.ckpt"][name] == found["l"][name]
        assert same.all(), "the finished run's checkpoint is the model"
    assert sorted(found["p"].files) == ["features", "names"]
    assert found["p"]["features"].shape == (12, 64)

    outcome = extract("--model", "p", "--out", tmp_path / "p.csv")
    assert outcome.is_one_line_error("no softmax layer")
    assert extract("--model", "nowhere").is_one_line_error("nowhere")
    outcome = extract("--model", "l", "--out", "features.txt")
    assert outcome.is_one_line_error(".npz", status=2)
    assert extract("--model", "").is_one_line_error("--model", status=2)


def test_a_single_image(call, flags, extract, zoo, tmp_path):
    run = (*flags, "--experiment-name", "l")
    assert call("train_stl_after_ssl", *run).status == 0
    assert extract("--model", "l", "--out", tmp_path / "all.npz").status == 0
    of_all = np.load(tmp_path / "all.npz")

    image = zoo / "test/dog/IMG 2.jpg"
    out = tmp_path / "one.npz"
    outcome = extract("--model", "l", "--images", image, "--out", out)
    assert outcome.status == 0, outcome.err
    assert "1 images" in outcome.out
    of_one = np.load(out)
    assert of_one["names"].tolist() == ["IMG 2.jpg"]
    row = of_all["names"].tolist().index("dog/IMG 2.jpg")
    for name in ("features", "probabilities"):
        np.testing.assert_allclose(of_one[name][0], of_all[name][row], 1e-3, 1e-5)

    out = tmp_path / "one.csv"
    outcome = extract("--model", "l", "--images", image, "--out", out)
    assert outcome.status == 0, outcome.err
    assert [row["name"] for row in read_csv(out)] == ["IMG 2.jpg"]

    text = tmp_path / "notes.txt"
    text.write_text("no image")
    outcome = extract("--model", "l", "--images", text)
    assert outcome.is_one_line_error("cannot read", text)
    outcome = extract("--model", "l", "--images", tmp_path / "nowhere.png")
    assert outcome.is_one_line_error("nowhere.png")
    assert not (tmp_path / "features.npz").exists()


def test_features_by_a_run_in_training(call, flags, extract, tmp_path, monkeypatch):
    """Both scripts are left in the third step, with a checkpoint of the second."""
    flags = (*flags, "--experiment-name", "exp", "--checkpoint-minutes", 0)

    def interrupt_third_step(trainer_class):
        steps = []
        train_step = trainer_class.train_step

        def interrupted(*arguments):
            steps.append(1)
            if len(steps) == 3:
                raise KeyboardInterrupt
            return train_step(*arguments)

        monkeypatch.setattr(trainer_class, "train_step", interrupted)

    def features_of_checkpoint():
        outcome = extract("--model", "exp", "--out", tmp_path / "f.npz")
        assert outcome.status == 0, outcome.err
        found = np.load(tmp_path / "f.npz")
        assert np.isfinite(found["features"]).all()
        assert found["features"].std(0).max() > 0
        return found

    interrupt_third_step(pirl_stl_train_test.PretrainingTrainer)
    assert call("pirl_stl_train_test", *flags).status == 130
    features_of_checkpoint()
    (tmp_path / "weights/exp.ckpt").unlink()

    interrupt_third_step(train_stl_after_ssl.FineTuningTrainer)
    assert call("train_stl_after_ssl", *flags, "--full-fine-tune").status == 130
    found = features_of_checkpoint()
    assert found["probabilities"].shape == (12, 3)
    np.testing.assert_allclose(found["probabilities"].sum(1), 1, 1e-5)


def test_file_names_of_another_encoding(call, flags, extract, zoo, tmp_path):
    """As old archives leave them: Linux allows any bytes."""
    run = (*flags, "--experiment-name", "l")
    assert call("train_stl_after_ssl", *run).status == 0
    name = b"caf\xe9.jpg"
    folder = zoo / "test/cat"
    (folder / "IMG 0.jpg").rename(folder / os.fsdecode(name))
    for out in ("f.npz", "p.csv"):
        assert extract("--model", "l", "--out", tmp_path / out).status == 0
    names = np.load(tmp_path / "f.npz")["names"]
    assert os.fsdecode(b"cat/" + name) in names
    assert b"\ncat/" + name + b"," in (tmp_path / "p.csv").read_bytes()


def test_the_image_size_of_the_flag_counts(call, flags, extract, zoo, tmp_path):
    """The training's is 36."""
    assert call("train_stl_after_ssl", *flags, "--experiment-name", "l").status == 0
    out = tmp_path / "f.npz"
    assert extract("--model", "l", "--image-size", 64, "--out", out).status == 0

    trunk, _ = hubconf.trunk(tmp_path / "weights/l.pt")
    files = list_images(zoo / "test")
    images, _ = load_images(files, 64, torch.device("cpu"), "images")
    expected = trunk_features(trunk, images, 128)
    np.testing.assert_allclose(np.load(out)["features"], expected, 1e-4, 1e-5)


@pytest.mark.full_trunk
def test_features_by_torchvision_s_weights(extract, tmp_path):
    """Which of its ResNets it is need not be said; no flag could."""
    file = tmp_path / "resnet34.pth"
    torch.save(torchvision.models.resnet34().state_dict(), file)
    out = tmp_path / "f.npz"
    outcome = extract("--model", file, "--image-size", 36, "--out", out)
    assert outcome.status == 0, outcome.err
    assert np.load(out)["features"].shape == (12, 512)


@pytest.mark.full_trunk
@pytest.mark.parametrize(
    "stem", ["imagenet", pytest.param("small", marks=pytest.mark.slow)]
)
def test_the_readme_s_snippet(call, flags, tmp_path, monkeypatch, stem):
    """It gives the features that extract_features.py gives."""
    readme = (ROOT / "README.md").read_text()
    snippet = re.search(r"## Use the trunk\n\n((?:    .*\n|\n)+)", readme)[1]
    lines = snippet.splitlines(keepends=True)
    code = "".join(line.removeprefix("    ") for line in lines)
    # A reader is in the repository's folder.
    code = code.replace('"."', repr(str(ROOT)))
    code += "\nimport numpy; numpy.save('own.npy', features.numpy())\n"

    run = (*flags, "--experiment-name", "exp", "--stem", stem, "--knn-every", 0)
    outcome = call("pirl_stl_train_test", *run)
    assert outcome.status == 0, outcome.err
    write_image(tmp_path / "pictures/cat.jpg", 5, (60, 60))
    shutil.copy(tmp_path / "pictures/cat.jpg", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(code, {})

    out = tmp_path / "f.npz"
    arguments = (
        *("--model", tmp_path / "weights/exp.pt"),
        *("--images", tmp_path / "pictures"),
        *("--out", out),
    )
    assert call("extract_features", *arguments).status == 0
    ours = np.load(out)["features"]
    np.testing.assert_allclose(np.load(tmp_path / "own.npy"), ours, 1e-3, 1e-3)
