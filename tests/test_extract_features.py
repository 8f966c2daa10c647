"""Features and predictions of any images by any of the trained networks."""

import csv
import os
import re

import numpy as np
import pytest
import torch
from conftest import ThinResNet
from PIL import Image
from test_dataset_helpers import write_image

import extract_features
import pirl_stl_train_test
import train_stl_after_ssl
from augmentations import PIXEL_MEAN, PIXEL_STD
from dataset_helpers import read_image

CLASSES = ["ant", "Bee, wild", "10", "café"]
SIDE = 40
# Names whose natural order is not the alphabetical one, in the natural order.
NAMES = ["1.png", "2.jpg", "3.bmp", "9/1.png", "9/2.png", "9/10.webp", "10.png"]
NAMES += ["11.tif", "a 2.png", "a 10.png", "a, b.png", "cat/1.png", "dog/1.png"]


@pytest.fixture
def photos(tmp_path):
    """The folder of NAMES, of several sizes."""
    folder = tmp_path / "photos"
    for seed, name in enumerate(NAMES):
        write_image(folder / name, seed, (40 + 3 * seed, 70 - 2 * seed))
    return folder


@pytest.fixture
def network(photos):
    """A trunk with batch-norm statistics of its own, and a softmax layer.

    The layer tells the photographs from each other, to give them several classes.
    """
    torch.manual_seed(0)
    trunk = ThinResNet()
    trunk.fc = torch.nn.Identity()
    for module in trunk.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
    softmax_layer = torch.nn.Linear(64, len(CLASSES))
    network = torch.nn.ModuleDict({"trunk": trunk, "softmax_layer": softmax_layer})
    network.eval()
    features, _ = by_hand(network, [photos / name for name in NAMES])
    features = torch.from_numpy(features)
    with torch.no_grad():
        softmax_layer.weight.normal_(0, 0.3 / features.std(0).mean())
        softmax_layer.bias.copy_(-features.mean(0) @ softmax_layer.weight.T)
    return network


@pytest.fixture
def extract(call, network, photos, tmp_path):
    """extract(*arguments) runs the script on the photographs.

    "l" is the network of fine-tuning, "p" one of pretraining.
    """
    content = {
        "trunk": network["trunk"].state_dict(),
        "settings": {"model_type": "res18", "stem": "imagenet", "image_size": SIDE},
    }
    (tmp_path / "weights").mkdir()
    torch.save(content, tmp_path / "weights/p.pt")
    content["softmax_layer"] = network["softmax_layer"].state_dict()
    content.update(classes=CLASSES, class_folders=["1", "2", "3", "4"])
    torch.save(content, tmp_path / "weights/l.pt")

    def extract(*arguments):
        return call(
            "extract_features",
            *("--images", photos, "--weights-dir", tmp_path / "weights"),
            *("--device", "cpu", *arguments),
        )

    return extract


@torch.no_grad()
def by_hand(network, files, side=SIDE):
    """(features, probabilities), computed image by image."""
    features = []
    for file in files:
        pixels = read_image(file, side) / 255
        mean, std = np.reshape([PIXEL_MEAN, PIXEL_STD], (2, 3, 1, 1))
        image = torch.from_numpy((pixels - mean) / std).float()
        features.append(network["trunk"](image[None])[0])
    features = torch.stack(features)
    return features.numpy(), network["softmax_layer"](features).softmax(1).numpy()


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def close(a, b):
    np.testing.assert_allclose(a, b, 1e-3, 1e-5)
    return True


# ---- Rows ----------------------------------------------------------------------------
def test_every_row_is_that_of_its_name(extract, network, photos, tmp_path, monkeypatch):
    """Blocks of 5 and batches of 2: the last of each is smaller."""
    monkeypatch.setattr(extract_features, "BLOCK", 5)
    run = ("--model", "l", "--batch-size", 2)
    outcome = extract(*run, "--out", tmp_path / "new/f.npz")
    assert outcome.status == 0, outcome.err
    assert f"{len(NAMES)} images, 64 features each" in outcome.out
    found = np.load(tmp_path / "new/f.npz")
    features, probabilities = by_hand(network, [photos / name for name in NAMES])
    assert found["names"].tolist() == NAMES
    assert found["features"].dtype == found["probabilities"].dtype == np.float32
    assert close(found["features"], features)
    assert close(found["probabilities"], probabilities)
    assert found["classes"].tolist() == CLASSES
    assert os.listdir(tmp_path / "new") == ["f.npz"], "and no scratch files"

    assert extract(*run, "--out", tmp_path / "p.csv").status == 0
    rows = read_csv(tmp_path / "p.csv")
    assert [row["name"] for row in rows] == NAMES
    best = probabilities.argmax(1)
    assert len(set(best.tolist())) > 1
    assert [row["class"] for row in rows] == [CLASSES[label] for label in best]
    confidence = [float(row["probability"]) for row in rows]
    assert close(confidence, probabilities.max(1))

    assert extract("--model", "p", "--out", tmp_path / "p.npz").status == 0
    trunk_alone = np.load(tmp_path / "p.npz")
    assert sorted(trunk_alone.files) == ["features", "names"]
    assert close(trunk_alone["features"], features)


def test_files_that_cannot_be_read_are_left_out_and_named(
    extract, network, photos, tmp_path, monkeypatch
):
    """A whole block of them, some of another, and more than are named."""
    monkeypatch.setattr(extract_features, "BLOCK", 3)
    bad = [*NAMES[1:2], *NAMES[3:10], *NAMES[11:]]
    for name in bad:
        (photos / name).write_bytes(b"no image")
    good = [name for name in NAMES if name not in bad]

    outcome = extract("--model", "l", "--out", tmp_path / "f.npz")
    assert outcome.is_one_line_error("10 files cannot be read", "repair or remove them")
    places = [outcome.err.find(f"{photos / name}: it is no image") for name in bad]
    assert places == sorted(places)
    assert places[0] > 0
    assert "more" not in outcome.err
    assert f"wrote {tmp_path / 'f.npz'}: 3 images" in outcome.out
    found = np.load(tmp_path / "f.npz")
    features, probabilities = by_hand(network, [photos / name for name in good])
    assert found["names"].tolist() == good
    assert close(found["features"], features)
    assert close(found["probabilities"], probabilities)

    out = tmp_path / "p.csv"
    assert extract("--model", "l", "--out", out).status == 1
    assert [row["name"] for row in read_csv(out)] == good

    for name in NAMES:
        (photos / name).write_bytes(b"no image")
    for nothing in (tmp_path / "nothing.npz", tmp_path / "nothing.csv"):
        outcome = extract("--model", "l", "--out", nothing)
        assert outcome.is_one_line_error("13 files cannot be read", "and 3 more")
        assert not nothing.exists()


def test_a_single_image(extract, network, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = ("--model", "l", "--images", photos / "9/10.webp")
    outcome = extract(*run)
    assert outcome.status == 0, outcome.err
    assert "wrote features.npz: 1 images" in outcome.out
    found = np.load("features.npz")
    assert found["names"].tolist() == ["10.webp"]
    assert close(found["features"], by_hand(network, [photos / "9/10.webp"])[0])

    assert extract("--model", "l", "--images", "photos/2.jpg").status == 0
    assert np.load("features.npz")["names"].tolist() == ["2.jpg"]


def test_file_names_of_another_encoding(extract, photos, tmp_path):
    """As old archives leave them: Linux allows any bytes."""
    name = b"caf\xe9.jpg"
    (photos / "2.jpg").rename(photos / os.fsdecode(name))
    for out in ("f.npz", "p.csv"):
        assert extract("--model", "l", "--out", tmp_path / out).status == 0
    assert os.fsdecode(name) in np.load(tmp_path / "f.npz")["names"]
    assert b"\n" + name + b"," in (tmp_path / "p.csv").read_bytes()


def test_the_image_size_of_the_flag_counts(extract, network, photos, tmp_path):
    """The training's is 40."""
    out = tmp_path / "f.npz"
    outcome = extract("--model", "l", "--image-size", 64, "--out", out)
    assert outcome.status == 0, outcome.err
    assert "was trained with --image-size 40, 64 is used" in outcome.out
    expected, _ = by_hand(network, [photos / name for name in NAMES], 64)
    assert close(np.load(out)["features"], expected)


def test_what_cannot_work_is_said_before_images_are_read(extract, photos, tmp_path):
    images = ("--images", tmp_path / "nowhere")
    outcome = extract("--model", "p", "--out", tmp_path / "p.csv", *images)
    assert outcome.is_one_line_error("p.pt has no softmax layer", "--out features.npz")
    defaults = extract_features.parse_args(["--model", "l", "--images", "i"])
    assert str(defaults.weights_dir) == "weights"
    assert extract("--model", "none", *images).is_one_line_error("no model none")
    assert extract("--model", "l", *images).is_one_line_error("nowhere does not exist")
    outcome = extract("--model", "l", "--out", "features.txt")
    assert outcome.is_one_line_error(".npz or .csv", status=2)
    outcome = extract("--model", "l", "--queries", photos)
    assert outcome.is_one_line_error("--queries needs --neighbours", status=2)
    assert sorted(os.listdir(tmp_path)) == ["photos", "weights"]


def test_rows_are_kept_beside_the_result(extract, photos, tmp_path, monkeypatch):
    """The system's folder for temporary files may be in memory. A link is followed."""
    rows = []
    append = extract_features.RowsOnDisk.append

    def recorded(self, values):
        append(self, values)
        rows.append((self.path.parent.parent, os.path.getsize(self.path)))

    monkeypatch.setattr(extract_features.RowsOnDisk, "append", recorded)
    assert extract_features.BLOCK * 3 * 224**2 < 100e6, "bytes of images at a time"
    monkeypatch.setattr(extract_features, "BLOCK", 4)
    (tmp_path / "disk").mkdir()
    (tmp_path / "f.npz").symlink_to(tmp_path / "disk/f.npz")
    assert extract("--model", "p", "--out", tmp_path / "f.npz").status == 0
    sizes = [4 * 64 * count for count in (4, 8, 12, 13)]
    assert rows == [(tmp_path / "disk", size) for size in sizes]
    assert (tmp_path / "f.npz").is_symlink()
    assert os.listdir(tmp_path / "disk") == ["f.npz"]


# ---- Neighbours ----------------------------------------------------------------------
@pytest.fixture
def drawn(monkeypatch):
    """The arguments of each picture of neighbours."""
    pictures = []
    draw = extract_features.neighbour_picture

    def recorded(queries, found, query_texts, found_texts):
        pictures.append((queries, found, query_texts, found_texts))
        return draw(queries, found, query_texts, found_texts)

    monkeypatch.setattr(extract_features, "neighbour_picture", recorded)
    return pictures


def nearest_by_hand(searched, query, names, without=None):
    """(cosine, name), the most similar first."""
    lengths = np.linalg.norm(searched, axis=1) * np.linalg.norm(query)
    pairs = zip(searched @ query / lengths, names, strict=True)
    return sorted((pair for pair in pairs if pair[1] != without), reverse=True)


def assert_neighbours(outcome, picture, query_files, query_names, expected, photos):
    """The printed lines, and the picture: both of what was computed by hand."""
    queries, found, query_texts, found_texts = picture
    lines = [
        line for line in outcome.out.splitlines() if re.match(r".*: 1\.0|.*: 0\.", line)
    ]
    assert len(lines) == len(queries) == len(query_names)
    for row, name in enumerate(query_names):
        pairs = expected[row][:8]
        similar = [f"{cosine:.3f} {other}" for cosine, other in pairs]
        assert lines[row] == f"{name}: {', '.join(similar)}"
        assert found_texts[row] == [text.split()[0] for text in similar]
        assert query_texts[row] == name.split("/")[-1]
        assert (queries[row].numpy() == read_image(query_files[row], SIDE)).all()
        for image, (_, other) in zip(found[row], pairs, strict=True):
            assert (image.numpy() == read_image(photos / other, SIDE)).all(), other


def test_the_neighbours_of_the_images_themselves(
    extract, network, photos, tmp_path, drawn, monkeypatch
):
    """Duplicates come first, each of the other, and no image is its own neighbour."""
    monkeypatch.setattr(extract_features, "SEARCHED_ROWS", 4)
    monkeypatch.setattr(extract_features, "SHOWN_QUERIES", 4)
    image = Image.open(photos / "1.png")
    image.save(photos / "zoo.bmp")
    image.save(photos / "12.jpg", quality=98)
    names = [*NAMES[:8], "12.jpg", *NAMES[8:], "zoo.bmp"]

    out = tmp_path / "n.png"
    outcome = extract("--model", "l", "--neighbours", out)
    assert outcome.status == 0, outcome.err
    features, _ = by_hand(network, [photos / name for name in names])
    query_names = [names[row] for row in (0, 5, 9, 14)]
    expected = [
        nearest_by_hand(features, features[names.index(name)], names, name)
        for name in query_names
    ]
    assert [name for _, name in expected[0][:2]] == ["zoo.bmp", "12.jpg"]
    files = [photos / name for name in query_names]
    assert_neighbours(outcome, drawn[0], files, query_names, expected, photos)
    with Image.open(out) as picture:
        assert picture.format == "PNG"
    assert not (tmp_path / "features.npz").exists(), "nobody has asked for it"


def test_the_neighbours_of_other_images(extract, network, photos, tmp_path, drawn):
    """One of them is among the images too, one cannot be read, 20 are shown."""
    folder = tmp_path / "queries"
    for number in range(1, 24):
        write_image(folder / f"q{number}.png", 100 + number, (40, 45))
    (folder / "q2.png").write_bytes((photos / "a 2.png").read_bytes())
    (folder / "q10.png").write_bytes(b"no image")
    (photos / "3.bmp").write_bytes(b"no image")

    flags = ("--neighbours", tmp_path / "n.png", "--out", tmp_path / "f.npz")
    outcome = extract("--model", "p", *flags, "--queries", folder)
    assert outcome.is_one_line_error(
        "2 files cannot be read", f"{photos / '3.bmp'}: ", f"{folder / 'q10.png'}: "
    )
    names = [name for name in NAMES if name != "3.bmp"]
    query_names = [f"q{number}.png" for number in range(1, 21) if number != 10]
    query_files = [folder / name for name in query_names]
    features, _ = by_hand(network, [photos / name for name in names])
    query_features, _ = by_hand(network, query_files)
    expected = [nearest_by_hand(features, query, names) for query in query_features]
    assert f"q2.png: 1.000 a 2.png, {expected[1][1][0]:.3f}" in outcome.out
    assert_neighbours(outcome, drawn[0], query_files, query_names, expected, photos)
    assert np.load(tmp_path / "f.npz")["names"].tolist() == names


def test_few_images_have_few_neighbours(extract, photos, tmp_path, drawn):
    run = ("--model", "l", "--neighbours", tmp_path / "n.png")
    assert extract(*run, "--images", photos / "9").status == 0
    assert drawn[0][1].shape[:2] == (3, 2)
    outcome = extract(*run, "--images", photos / "2.jpg", "--queries", photos)
    assert outcome.status == 0, outcome.err
    assert drawn[1][1].shape[:2] == (13, 1)
    outcome = extract(*run, "--images", photos / "2.jpg")
    assert outcome.is_one_line_error("holds one readable image only")


# ---- Networks ------------------------------------------------------------------------
def test_predictions_are_those_of_the_results_table(
    call, tiny, extract, data_dir, tmp_path
):
    run = ("--experiment-name", "exp", "--full-fine-tune")
    labelled = call("train_stl_after_ssl", *tiny, *run)
    assert labelled.status == 0, labelled.err
    out = tmp_path / "f.npz"
    run = ("--model", "exp", "--images", data_dir / "test")
    outcome = extract(*run, "--out", out)
    assert outcome.status == 0, outcome.err
    found = np.load(out)
    predicted = found["classes"][found["probabilities"].argmax(1)]
    true_classes = [name.split("/")[0] for name in found["names"]]
    accuracy = np.mean(predicted == true_classes)
    saved = torch.load(tmp_path / "weights/exp.pt", weights_only=True)
    assert accuracy == pytest.approx(saved["results"]["full"][1])


def test_features_by_a_run_in_training(call, tiny, extract, tmp_path, monkeypatch):
    """Both scripts are left in the third step, with a checkpoint of the second."""

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
        assert "exp.ckpt is a checkpoint" in outcome.out
        found = np.load(tmp_path / "f.npz")
        assert np.isfinite(found["features"]).all()
        assert found["features"].std(0).max() > 0
        return found

    flags = (*tiny, "--experiment-name", "exp", "--checkpoint-minutes", 0)
    interrupt_third_step(pirl_stl_train_test.PretrainingTrainer)
    assert call("pirl_stl_train_test", *flags).status == 130
    features_of_checkpoint()
    (tmp_path / "weights/exp.ckpt").unlink()

    interrupt_third_step(train_stl_after_ssl.FineTuningTrainer)
    assert call("train_stl_after_ssl", *flags, "--full-fine-tune").status == 130
    assert features_of_checkpoint()["probabilities"].shape == (13, 10)


@pytest.mark.slow
@pytest.mark.full_trunk
def test_from_pretraining_to_features_at_the_largest_size(
    call, tiny, extract, tmp_path
):
    """The whole network: on AVX-512, torch 2.11's oneDNN writes beyond its memory in
    backward with the thin one's 8 channels at this size."""
    flags = [*tiny, "--epochs", 1, "--image-size", 224, "--experiment-name"]
    assert call("pirl_stl_train_test", *flags, "p2").status == 0
    run = ("--pirl-model-name", "p2", "--full-fine-tune")
    outcome = call("train_stl_after_ssl", *flags, "l2", *run)
    assert outcome.status == 0, outcome.err
    assert extract("--model", "l2", "--out", tmp_path / "f.npz").status == 0
    assert np.load(tmp_path / "f.npz")["features"].shape == (13, 512)
