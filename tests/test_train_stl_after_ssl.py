"""Fine-tuning: both stages, what is written, resumption, and testing alone."""

import csv
import os
import re
import shutil
import signal
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import ThinResNet
from PIL import Image
from records import (
    checkpoint,
    parts_of,
    same,
    signal_in,
    table,
    weights,
)
from test_linear_probe import knn_by_hand
from torch import nn

import models
import train_stl_after_ssl
from dataset_helpers import read_image
from pictures import confusion_picture, save_picture
from runtime import loop
from train_stl_after_ssl import FineTuningTrainer

TABLE_HEADER = (
    "Fine tuning strategy | Val Classification Accuracy | Test Classification Accuracy"
)
# Images of each class. The folders are in natural order, with a name for every trouble;
# three steps of at most 16 images are an epoch, and the last one is smaller.
CLASSES = ["1", "2", "10", "b|ack", "new\nline", "once", "twice"]
TRAIN = dict(zip(CLASSES, [14, 11, 12, 6, 3, 1, 2], strict=True))
VALIDATED = dict(zip(CLASSES, [2, 2, 2, 1, 1, 0, 1], strict=True))  # about 16 %
TEST = {"10": 5, "1": 13, "b|ack": 4, "twice": 1}
FORMATS = ["png", "bmp", "tiff"]
SIZES = [(36, 36), (50, 41), (36, 64)]


def write_split(folder, sizes, seed):
    """0.png, 1.bmp, … of each class; its colour is about that of the class."""
    rng = np.random.default_rng(seed)
    for name, count in sizes.items():
        (folder / name).mkdir(parents=True)
        colour = np.random.default_rng(CLASSES.index(name)).integers(40, 216, 3)
        for i in range(count):
            width, height = SIZES[i % 3]
            pixels = colour + rng.normal(0, 40, 3) + rng.normal(0, 30, (6, 6, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            path = folder / name / f"{i}.{FORMATS[i % 3]}"
            image.resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def shared_zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "data"
    write_split(folder / "train", TRAIN, 1)
    write_split(folder / "test", TEST, 2)
    return folder


@pytest.fixture
def zoo(shared_zoo, tmp_path):
    """A folder of its own for the test, which may change it."""
    return shutil.copytree(shared_zoo, tmp_path / "zoo")


@pytest.fixture
def tune(call, tiny, zoo):
    """tune(name, *flags) is a tiny run on the zoo: 2 epochs of 3 steps per stage."""

    def tune(name, *flags):
        run = ("--data-dir", zoo, "--experiment-name", name, *flags)
        return call("train_stl_after_ssl", *tiny, *run)

    return tune


@pytest.fixture(scope="module")
def kept():
    """A folder for the run of the fixture `whole`."""
    return {}


@pytest.fixture
def whole(tune, kept, tmp_path, tmp_path_factory):
    """The flags of an undisturbed run of the name whole, which is made once."""
    flags = ("--full-fine-tune", "--full-epochs", 3, "--full-lr", 0.1)
    if not kept:
        assert tune("whole", *flags).status == 0
        kept["folder"] = tmp_path_factory.mktemp("whole")
        for part in ("weights", "observations"):
            shutil.copytree(tmp_path / part, kept["folder"] / part)
    shutil.copytree(kept["folder"], tmp_path, dirs_exist_ok=True)
    return flags


def stop_in_step(patch, which, number=signal.SIGTERM):
    """The process gets a signal within its step number `which` of the full stage."""
    signal_in(patch, FineTuningTrainer, "train_step", number, which)


def read_results(tmp_path, name):
    return (tmp_path / f"observations/{name}_results.md").read_text()


def assert_same_run(tmp_path, one, other):
    """Two runs have come to the same end, to the last bit."""
    parts = ("results", "trunk", "softmax_layer")
    first, second = (parts_of(weights(tmp_path, name), parts) for name in (one, other))
    assert same(first, second), other
    assert table(tmp_path, one) == table(tmp_path, other)


# ---- What is written, beside a computation of our own --------------------------------
def network_of(content):
    """torchvision's ResNet and a linear layer, with a model file's weights."""
    trunk = ThinResNet()
    trunk.fc = nn.Identity()
    trunk.load_state_dict(content["trunk"])
    layer = nn.Linear(64, 7)
    if "softmax_layer" in content:
        layer.load_state_dict(content["softmax_layer"])
    return nn.Sequential(OrderedDict(trunk=trunk, softmax_layer=layer)).eval()


def image_files(folder):
    return [path for path in folder.rglob("*.*") if path.is_file()]


def normal_images(content, paths):
    images = np.stack([read_image(path, 36) for path in paths]) / 255
    mean = np.array(content["pixel_mean"])[:, None, None]
    std = np.array(content["pixel_std"])[:, None, None]
    return torch.from_numpy((images - mean) / std).float()


def labels_of(paths):
    return np.array([CLASSES.index(path.parent.name) for path in paths])


@torch.no_grad()
def answers_of(content, paths):
    """(labels, predictions) of the images of a model file's network, as numpy."""
    logits = network_of(content)(normal_images(content, paths))
    return labels_of(paths), logits.argmax(1).numpy()


def share_right(content, paths):
    labels, predictions = answers_of(content, paths)
    return (labels == predictions).mean()


def confusion_rows(tmp_path):
    with open(tmp_path / "observations/exp_confusion.csv", newline="") as file:
        return list(csv.reader(file))


def class_rows(text):
    """The rows of the table by class: lists of cells."""
    *_, rows = text.partition("Class | Train images | ")
    return [row.split(" | ") for row in rows.splitlines()[2:] if row]


def cells_by_hand(labels, predictions, label):
    """Number of images and accuracy of a class."""
    own = predictions[labels == label]
    return [str(len(own)), f"{(own == label).mean():.2%}" if len(own) else "none"]


def test_all_that_is_written_is_of_the_exported_model(
    tune, call, tiny, zoo, finished, tmp_path, monkeypatch
):
    """Of uneven classes, some of which have no test images or one training image."""
    validated = []
    validate = FineTuningTrainer.validate

    def noting(trainer):
        validated.append(trainer.data.images[trainer.data.val])
        return validate(trainer)

    drawn = []
    draw_neighbours = train_stl_after_ssl.draw_neighbours

    def noting_neighbours(*arguments):
        drawn.append(arguments)
        draw_neighbours(*arguments)

    monkeypatch.setattr(FineTuningTrainer, "validate", noting)
    monkeypatch.setattr(train_stl_after_ssl, "draw_neighbours", noting_neighbours)
    finished("pirl")
    picture_file = tmp_path / "folder/neighbours.png"
    flags = ("--pirl-model-name", "pirl", "--neighbours", picture_file, "--epochs", 1)
    flags += ("--seed", 3, "--full-lr", 0.1, "--full-epochs", 6, "--full-fine-tune")
    outcome = tune("exp", *flags)
    assert outcome.status == 0, outcome.err
    assert f"note: once in {zoo / 'train'} has one image only" in outcome.out
    assert "has no images of 2, new\nline, once: their test accuracy" in outcome.out
    content = weights(tmp_path, "exp")
    assert content["classes"] == content["class_folders"] == CLASSES

    # The images that validate are named: some of each class, and the very ones.
    val = [zoo / name for name in content["validation_images"]]
    train = sorted(set(image_files(zoo / "train")) - set(val))
    assert len(train) == 49 - 9
    assert np.bincount(labels_of(val), minlength=7).tolist() == [*VALIDATED.values()]
    shown = np.stack([read_image(path, 36) for path in val])
    assert all((images.numpy() == shown).all() for images in validated)

    # Accuracies.
    test = image_files(zoo / "test")
    val_labels, val_predictions = answers_of(content, val)
    test_labels, test_predictions = answers_of(content, test)
    val_accuracy = (val_predictions == val_labels).mean()
    test_accuracy = (test_predictions == test_labels).mean()
    results = content["results"]
    assert results["full"] == pytest.approx((val_accuracy, test_accuracy))
    lines = table(tmp_path, "exp")
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        ("softmax", "1"),
        *(("full", str(epoch)) for epoch in range(1, 7)),
    ]
    accuracies = [float(line["val_acc"]) for line in lines]
    assert results["softmax"][0] == accuracies[0]
    assert results["full"][0] == max(accuracies[1:]) > accuracies[-1]

    pretrained = weights(tmp_path, "pirl")
    with torch.no_grad():
        trunk = network_of(pretrained).trunk
        train_features, val_features, test_features = (
            trunk(normal_images(content, paths)).double().numpy()
            for paths in (train, val, test)
        )
    known = (train_features, labels_of(train))
    assert results["knn"] == pytest.approx(
        (
            knn_by_hand(*known, val_features, val_labels),
            knn_by_hand(*known, test_features, test_labels),
        )
    )

    # The confusion matrix.
    header, *rows = confusion_rows(tmp_path)
    assert header == ["true class", *CLASSES]
    for label, row in enumerate(rows):
        own = test_predictions[test_labels == label]
        expected = [str((own == other).sum()) for other in range(7)]
        assert row == [CLASSES[label], *expected]
    expected = [torch.from_numpy(part) for part in (test_labels, test_predictions)]
    save_picture(confusion_picture(*expected, CLASSES), tmp_path / "expected.png")
    drawn_confusion = (tmp_path / "observations/exp_confusion.png").read_bytes()
    assert drawn_confusion == (tmp_path / "expected.png").read_bytes()

    # The picture of the neighbours is by the finished trunk, and is drawn again.
    ((_, trunk, known_images, shown_images, names, size),) = drawn
    assert (names, size) == (CLASSES, 16)
    assert same(dict(trunk.state_dict()), dict(content["trunk"]))
    assert len(known_images.labels) == 40
    assert torch.bincount(shown_images.labels).tolist() == [13, 0, 5, 4, 0, 0, 1]
    before = picture_file.read_bytes()
    picture_file.unlink()
    assert tune("exp", *flags, "--resume").status == 0
    assert picture_file.read_bytes() == before

    # The tables, on screen and in the file.
    text = read_results(tmp_path, "exp")
    assert text.startswith("## exp\n")
    assert "--full-fine-tune --resume`" in text
    title = f"PIRL trunk ({tmp_path / 'weights/pirl.pt'}), images of {zoo}:"
    for where in (outcome.out, text):
        assert title in where
        for name, row in (
            ("softmax", "Only softmax layer is fine tuned"),
            ("full", "Full model is fine tuned"),
            ("knn", "kNN"),
        ):
            val_result, test_result = results[name]
            assert f"\n{row} | {val_result:.2%} | {test_result:.2%}\n" in where

    *rows, last = class_rows(text)
    shown_names = [*CLASSES[:3], r"b\|ack", "new line", *CLASSES[5:]]
    for label, row in enumerate(rows):
        train_count = (labels_of(train) == label).sum()
        of_val = cells_by_hand(val_labels, val_predictions, label)
        of_test = cells_by_hand(test_labels, test_predictions, label)
        assert row == [shown_names[label], str(train_count), *of_val, *of_test]
    assert last[0] == "mean of the classes"
    assert last[3].endswith(" (6 of 7 classes)")
    assert last[5].endswith(" (4 of 7 classes)")
    assert f"mean of the classes: validation {last[3]}, test {last[5]}" in outcome.out

    # And by --evaluate, which trains nothing; a class without training is an error.
    flags = ("--evaluate", "True", "--pirl-model-name", "exp")
    outcome = tune("other", *flags)
    assert outcome.status == 0, outcome.err
    full_row = f"Full model is fine tuned | none | {results['full'][1]:.2%}"
    assert f"exp.pt, images of {zoo}:\n\n{TABLE_HEADER}" in outcome.out
    assert full_row in outcome.out
    assert [row[4:] for row in class_rows(outcome.out)] == [
        row[4:] for row in (*rows, last)
    ]
    assert not list(tmp_path.rglob("other*"))
    shutil.copytree(zoo / "test/1", zoo / "test/unheard")
    assert tune("other", *flags).is_one_line_error("unheard", "without training images")
    shutil.rmtree(zoo / "test")
    assert tune("other", *flags).is_one_line_error("no test images")


@pytest.mark.parametrize("full_fine_tune", [False, True])
def test_a_model_of_numbered_classes_is_tested_under_their_names(
    call, tiny, data_dir, tmp_path, full_fine_tune
):
    """As STL-10's, which class_names.txt names."""
    own = shutil.copytree(data_dir, tmp_path / "own")
    names = [f"animal {10 - number}" for number in range(10)]
    (own / "class_names.txt").write_bytes("\r\n".join(names).encode())
    script = ("train_stl_after_ssl", *tiny, "--data-dir", own)
    flags = ("--experiment-name", "exp", "--full-fine-tune", full_fine_tune)
    assert call(*script, *flags).status == 0

    content = weights(tmp_path, "exp")
    assert content["classes"] == names
    assert content["class_folders"] == [str(number) for number in range(1, 11)]
    shutil.rmtree(own / "test/2")
    outcome = call(*script, "--evaluate", "--pirl-model-name", "exp")
    assert outcome.status == 0, outcome.err
    rows = class_rows(outcome.out)
    assert [row[0] for row in rows[:10]] == names
    counts = [4, 0, 1, 4, 4, 3, 5, 4, 2, 8, 35]
    assert [row[4] for row in rows] == [str(count) for count in counts]
    title = "Full model" if full_fine_tune else "Only softmax layer"
    assert f"\n{title} is fine tuned | none | " in outcome.out


def test_what_cannot_be_tested(tune, finished):
    outcome = tune("exp", "--evaluate")
    assert outcome.is_one_line_error("--evaluate needs --pirl-model-name", status=2)
    finished("pirl")
    outcome = tune("exp", "--evaluate", "--pirl-model-name", "pirl")
    assert outcome.is_one_line_error("pirl.pt has no softmax layer")
    flags = ("--evaluate", "--pirl-model-name", "exp", "--neighbours", "n.png")
    outcome = tune("exp", *flags)
    assert outcome.is_one_line_error("--neighbours", "not --evaluate", status=2)


# ---- The stages ----------------------------------------------------------------------
def test_the_softmax_model_is_epoch_0_of_the_full_stage(tune, finished, tmp_path):
    """It is kept where the full stage, here at a far too high rate, spoils it."""
    finished("pirl")
    flags = ("--pirl-model-name", "pirl", "--epochs", 6)
    assert tune("soft", *flags).status == 0
    full = ("--full-fine-tune", "--full-lr", 8, "--full-epochs", 3)
    outcome = tune("spoilt", *flags, *full)
    assert outcome.status == 0, outcome.err
    assert "note: no epoch of the whole network was better on validation" in outcome.out

    soft = weights(tmp_path, "soft")
    spoilt = weights(tmp_path, "spoilt")
    before = weights(tmp_path, "pirl")["trunk"]
    # Weights and batch-norm statistics, which the softmax stage leaves alone.
    assert same(spoilt["trunk"], soft["trunk"])
    assert same(spoilt["trunk"], before)
    assert same(spoilt["softmax_layer"], soft["softmax_layer"])
    results = spoilt["results"]
    assert results["full"] == pytest.approx(results["softmax"])
    assert results["softmax"] == soft["results"]["softmax"]
    paths = [tmp_path / "zoo" / name for name in spoilt["validation_images"]]
    assert share_right(spoilt, paths) == pytest.approx(results["full"][0])
    # It was no draw: the full stage did spoil the network.
    accuracies = [float(line["val_acc"]) for line in table(tmp_path, "spoilt")[6:]]
    assert len(accuracies) == 3
    assert max(accuracies) < results["full"][0]


def test_a_break_between_two_bad_epochs_is_not_forgotten(tune, tmp_path, monkeypatch):
    """The learning rate falls after two of them, and not because of training's loss."""
    losses = []

    def validate(trainer):
        losses.append(10.0 + len(losses))
        return losses[-1], 0.5

    monkeypatch.setattr(FineTuningTrainer, "validate", validate)
    flags = ("--full-fine-tune", "--full-epochs", 4, "--patience-for-lr-decay", 1)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 8)  # in the third epoch
        assert tune("exp", *flags).status == 143
    assert tune("exp", *flags, "--resume").status == 0
    rates = [float(line["learning_rate"]) for line in table(tmp_path, "exp")[2:]]
    assert rates == pytest.approx([0.03, 0.03, 0.03, 0.003])


def test_a_validation_loss_that_is_not_finite_is_but_a_bad_epoch(
    tune, tmp_path, monkeypatch
):
    validate = FineTuningTrainer.validate
    results = []

    def overflown(trainer):
        loss, accuracy = validate(trainer)
        results.append(accuracy)
        return (float("nan") if len(results) == 1 else loss), accuracy

    monkeypatch.setattr(FineTuningTrainer, "validate", overflown)
    assert tune("exp", "--full-fine-tune").status == 0
    losses = [line["val_loss"] for line in table(tmp_path, "exp")]
    assert [loss == "nan" for loss in losses] == [False, False, True, False]
    assert tune("exp", "--full-fine-tune", "--resume").status == 0


def test_several_ranks_are_refused(tune, tmp_path, monkeypatch):
    monkeypatch.setattr(train_stl_after_ssl, "WORLD_SIZE", 2)
    assert tune("exp").is_one_line_error("one process", "without torchrun")
    assert not (tmp_path / "weights").exists()


# ---- Resumption ----------------------------------------------------------------------
def test_resume_is_exact_from_any_step(tune, whole, tmp_path, monkeypatch):
    """Stopped within an epoch, at the end of one, and in the last one."""
    for number, which in ((signal.SIGINT, 2), (signal.SIGTERM, 3), (signal.SIGINT, 8)):
        name = f"halves_{which}"
        with monkeypatch.context() as patch:
            stop_in_step(patch, which, number)
            outcome = tune(name, *whole)
        assert outcome.status == 128 + number
        assert "continue with --resume True" in outcome.out

        # The full stage cannot be left out once it has begun.
        outcome = tune(name, *whole, "--full-fine-tune", "False", "--resume")
        assert outcome.is_one_line_error("full stage", "--full-fine-tune True")
        # Tested before its end, it is what it has become.
        outcome = tune("exp", "--evaluate", "--pirl-model-name", name)
        assert "\nFull model is fine tuned | none | " in outcome.out

        outcome = tune(name, *whole, "--resume")
        assert outcome.status == 0, outcome.err
        assert_same_run(tmp_path, "whole", name)


def test_a_signal_during_validation_waits_for_its_end(
    tune, whole, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        signal_in(patch, FineTuningTrainer, "validate", signal.SIGINT)
        assert tune("halves", *whole).status == 130
    training = checkpoint(tmp_path, "halves")["training"]
    assert (training["epoch"], training["step"]) == (2, 0)
    assert table(tmp_path, "halves") == table(tmp_path, "whole")[:3]
    assert tune("halves", *whole, "--resume").status == 0
    assert_same_run(tmp_path, "whole", "halves")


def test_a_signal_during_the_export_ends_a_run_that_is_complete(
    tune, whole, tmp_path, monkeypatch
):
    signal_in(monkeypatch, train_stl_after_ssl, "results_table", signal.SIGTERM)
    assert tune("exp", *whole).status == 143
    assert TABLE_HEADER in read_results(tmp_path, "exp")
    assert_same_run(tmp_path, "whole", "exp")


def test_the_time_of_each_stage_outlives_a_break(tune, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.LoopControl, "epoch_seconds", lambda loop: 30.0)
    flags = ("--full-fine-tune", "--full-epochs", 3)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 8)
        assert tune("exp", *flags).status == 143
    before = checkpoint(tmp_path, "exp")["seconds"]
    assert before["softmax"] > 0
    assert before["full"] == 60.0
    assert tune("exp", *flags, "--resume").status == 0
    seconds = weights(tmp_path, "exp")["seconds"]
    assert seconds == {"softmax": before["softmax"], "full": 90.0}


def test_a_resumed_run_has_its_settings_and_its_trunk_in_the_checkpoint(
    call, tune, tiny, zoo, finished, tmp_path, monkeypatch
):
    """The pretrained file has moved, and all flags but those of places are left out."""
    finished("pirl")
    settings = ("--full-fine-tune", "--lr", 0.1, "--full-epochs", 3, "--seed", 7)
    settings += ("--pirl-model-name", "pirl")
    assert tune("whole", *settings).status == 0
    title = f"PIRL trunk ({tmp_path / 'weights/pirl.pt'})"
    assert tune("soft", *settings[1:]).status == 0
    for name in ("moved", "renamed"):
        with monkeypatch.context() as patch:
            stop_in_step(patch, 5)
            assert tune(name, *settings).status == 143
    saved = checkpoint(tmp_path, "moved")
    assert saved["full_steps"] == 5
    assert (saved["training"]["epoch"], saved["training"]["step"]) == (2, 2)
    assert saved["results"].keys() == {"softmax", "knn"}
    assert saved["best"]["epoch"] in (0, 1)

    os.rename(tmp_path / "weights/pirl.pt", tmp_path / "weights/new.pt")
    places = (*tiny[-4:], "--device", "cpu", "--data-dir", zoo, "--resume")
    script = ("train_stl_after_ssl", *places, "--experiment-name")
    resumed = [
        call(*script, "moved"),
        call(*script, "renamed", "--pirl-model-name", "new"),
        call(*script, "soft", "--full-fine-tune"),  # from the end of the first stage
    ]
    for name, outcome in zip(("moved", "renamed", "soft"), resumed, strict=True):
        assert outcome.status == 0, outcome.err
        assert_same_run(tmp_path, "whole", name)
        assert title in read_results(tmp_path, name)


def test_more_epochs_go_on_and_fewer_change_nothing(tune, whole, tmp_path):
    """Epochs of the full stage; the file says how many it is of."""
    assert tune("exp", *whole, "--full-epochs", 1).status == 0
    outcome = tune("exp", *whole, "--resume")
    assert outcome.status == 0, outcome.err
    assert "note: --full-epochs was 1, is 3" in outcome.out
    assert_same_run(tmp_path, "whole", "exp")
    assert weights(tmp_path, "exp")["settings"]["full_epochs"] == 3

    outcome = tune("exp", *whole, "--full-epochs", 2, "--resume")
    assert outcome.status == 0, outcome.err
    assert "note: epoch 3 has begun already, so --full-epochs is 3" in outcome.out
    assert_same_run(tmp_path, "whole", "exp")
    assert weights(tmp_path, "exp")["settings"]["full_epochs"] == 3


def test_fewer_epochs_than_have_begun(tune, whole, tmp_path, monkeypatch):
    """The one under way is finished: its steps cannot be undone."""
    with monkeypatch.context() as patch:
        stop_in_step(patch, 5)  # in the second epoch
        assert tune("exp", *whole).status == 143
    outcome = tune("exp", *whole, "--full-epochs", 1, "--resume")
    assert outcome.status == 0, outcome.err
    assert "note: epoch 2 has begun already, so --full-epochs is 2" in outcome.out
    assert weights(tmp_path, "exp")["settings"]["full_epochs"] == 2
    assert table(tmp_path, "exp") == table(tmp_path, "whole")[:-1]


@pytest.mark.parametrize("full_fine_tune", [False, True])
def test_test_images_that_come_later_or_change_are_tested_anew(
    tune, zoo, whole, tmp_path, full_fine_tune
):
    flags = (*whole, "--full-fine-tune", full_fine_tune)
    shutil.move(zoo / "test", tmp_path / "test")
    outcome = tune("exp", *flags)
    assert outcome.status == 0, outcome.err
    before = weights(tmp_path, "exp")
    assert all(test is None for _, test in before["results"].values())
    # Without them, the confusion is that of validation.
    rows = confusion_rows(tmp_path)[1:]
    counts = [sum(int(cell) for cell in row[1:]) for row in rows]
    assert counts == [*VALIDATED.values()]

    shutil.move(tmp_path / "test", zoo / "test")
    assert tune("exp", *flags, "--resume").status == 0
    results = weights(tmp_path, "exp")["results"]
    expected = weights(tmp_path, "whole")["results"]
    assert results == {name: expected[name] for name in results}

    for path in (zoo / "test/1").iterdir():
        path.unlink()
    outcome = tune("exp", *flags, "--resume")
    assert outcome.status == 0, outcome.err
    assert f"note: {zoo / 'test/1'} holds no images and is left out" in outcome.out
    content = weights(tmp_path, "exp")
    stage = "full" if full_fine_tune else "softmax"
    test_accuracy = content["results"][stage][1]
    images = image_files(zoo / "test")
    assert test_accuracy == pytest.approx(share_right(content, images))
    assert test_accuracy != results[stage][1]
    assert content["results"]["knn"][1] != results["knn"][1]
    assert same(content["trunk"], before["trunk"])


def test_the_full_stage_may_have_settings_of_its_own_until_it_begins(
    tune, tmp_path, monkeypatch
):
    assert tune("exp").status == 0
    softmax_result = weights(tmp_path, "exp")["results"]["softmax"]

    def full(rate):
        flags = ("--resume", "--full-fine-tune", "--full-epochs", 1)
        return tune("exp", *flags, "--full-lr", rate)

    with monkeypatch.context() as patch:
        stop_in_step(patch, 1)
        assert full(0.003).status == 143
    assert full(0.1).is_one_line_error("--full-lr was 0.003, is 0.1")
    assert full(0.003).status == 0
    content = weights(tmp_path, "exp")
    assert content["results"]["softmax"] == softmax_result
    assert content["settings"]["full_lr"] == 0.003
    assert [line["learning_rate"] for line in content["history"][2:]] == [0.003]
    assert full(0.1).is_one_line_error("--full-lr was 0.003, is 0.1")


def test_messages_name_no_flag_that_was_not_given(tune):
    """A changed --epochs changes those of the full stage too, but not in a message."""
    assert tune("exp").status == 0
    outcome = tune("exp", "--epochs", 3, "--resume")
    assert outcome.is_one_line_error("--epochs was 2, is 3")
    assert re.findall(r"--[a-z-]+ was", outcome.err) == ["--epochs was"]


def test_precision_is_stored_resolved_and_kept(tune, tmp_path, monkeypatch):
    flags = ("--batch-size", 40)  # all images
    with monkeypatch.context() as patch:
        # As on most GPUs.
        patch.setattr(
            train_stl_after_ssl, "choose_precision", lambda args, device: "bf16"
        )
        assert tune("exp", *flags).status == 0
    assert tune("exp", *flags, "--full-fine-tune", "--resume").status == 0
    assert weights(tmp_path, "exp")["settings"]["precision"] == "bf16"


def test_a_name_s_table_is_written_once_and_those_of_others_are_kept(tune, tmp_path):
    """What stands there already may be of an experiment whose weights are gone."""
    folder = tmp_path / "observations"
    folder.mkdir()
    for name in ("exp", "exp2"):
        (folder / f"{name}_results.md").write_bytes(b"old: \xff\n" * 100)
    assert tune("exp").status == 0
    before = read_results(tmp_path, "exp").splitlines()
    assert before[0] == "## exp"
    assert tune("exp", "--resume").status == 0
    after = read_results(tmp_path, "exp").splitlines()
    # The line with the date and the command is that of the last call.
    assert after[4:] == before[4:]
    assert "--resume" in after[2]
    assert (folder / "exp2_results.md").read_bytes() == b"old: \xff\n" * 100


# ---- Images --------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["val", "valid"])
def test_a_folder_of_validation_images(tune, zoo, tmp_path, name):
    """All of train/ trains; folds are of train/ alone."""
    write_split(zoo / name, {"once": 2, "1": 3, "10": 11}, 5)
    (zoo / "fold_indices.txt").write_text("0 3 7 12 48\n5 6 7 8\n")
    outcome = tune("exp", "--folds")
    assert outcome.status == 0, outcome.err
    assert "49 images of 36 × 36 pixels, 16 to validate, 23 to test" in outcome.out
    content = weights(tmp_path, "exp")
    images = [tmp_path / "zoo" / path for path in content["validation_images"]]
    assert set(images) == set(image_files(zoo / name))
    accuracy = share_right(content, images)
    assert content["results"]["softmax"][0] == pytest.approx(accuracy)
    assert len(content["results"]["folds"]) == 2
    rows = class_rows(read_results(tmp_path, "exp"))
    assert [row[1] for row in rows] == [*map(str, TRAIN.values()), "49"]

    (zoo / "fold_indices.txt").write_text("0 3 7 12 49\n")
    assert tune("other", "--folds").is_one_line_error("fold_indices.txt", "0 to 48")


# ---- Where the trunk comes from ------------------------------------------------------
class ThinBottleneck(ThinResNet):
    """In the place of ResNet-50: other names of layers, d = 80."""

    def __init__(self, weights=None, **options):
        super().__init__(weights, **options)
        self.layer4.extra = nn.Conv2d(64, 80, 1)
        self.fc = nn.Linear(80, 1000)


def test_type_stem_and_size_are_those_of_the_file(tune, tmp_path, monkeypatch):
    monkeypatch.setitem(models.TRUNKS, "res50", ThinBottleneck)
    torch.manual_seed(0)
    trunk, dimension = models.make_trunk("res50", "small", zero_init=False)
    assert dimension == 80
    settings = {"model_type": "res50", "stem": "small", "image_size": 44}
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save({"trunk": trunk.state_dict(), "settings": settings}, folder / "exp50.pt")

    def run(name, *flags):
        return tune(name, "--pirl-model-name", "exp50", "--epochs", 1, *flags)

    for flag, value in (("--model-type", "res18"), ("--stem", "imagenet")):
        outcome = run("refused", flag, value)
        assert outcome.is_one_line_error("exp50.pt", flag, f"not {value}", "leave the")
    # tiny gives --image-size 36.
    outcome = run("noted", "--model-type", "res50")
    assert outcome.status == 0, outcome.err
    assert "exp50.pt was trained with --image-size 44, 36 is used" in outcome.out
    used = weights(tmp_path, "noted")
    assert used["settings"]["image_size"] == 36
    assert used["settings"] | {"image_size": 44} == used["settings"] | settings
    assert used["softmax_layer"]["weight"].shape == (7, 80)
    assert torch.equal(used["trunk"]["conv1.weight"], trunk.conv1.weight)


def test_the_image_size_of_the_file_is_the_default(call, tiny, zoo, finished, tmp_path):
    finished("pirl")
    flags = [flag for flag in tiny if flag not in ("--image-size", 36)]
    flags += ["--data-dir", zoo, "--epochs", 1]
    script = ("train_stl_after_ssl", *flags, "--experiment-name")
    outcome = call(*script, "exp", "--pirl-model-name", "pirl")
    assert outcome.status == 0, outcome.err
    assert "40 images of 36 × 36 pixels" in outcome.out
    outcome = call(*script, "random")
    assert outcome.status == 0, outcome.err
    assert "40 images of 96 × 96 pixels" in outcome.out
    assert "random trunk, images of" in read_results(tmp_path, "random")


def test_what_a_trunk_is_called():
    ours = {"settings": {"lr": 0.1}}
    for found, name in (
        (ours, "PIRL trunk (a.pt)"),
        (ours | {"softmax_layer": {}}, "fine-tuned trunk (a.pt)"),
        ({"settings": {}}, "trunk of another project (a.pt)"),
    ):
        assert train_stl_after_ssl.trunk_name_of("a.pt", found) == name


@pytest.mark.parametrize(
    ("script", "flag"),
    [
        ("pirl_stl_train_test", "--pirl-model-name"),
        ("train_stl_after_ssl", "--pirl-model-name"),
        ("train_stl_after_ssl", "--neighbours"),
    ],
)
def test_an_empty_name_is_refused(call, tiny, script, flag):
    """Most often it is a shell variable that is not set."""
    outcome = call(script, *tiny, flag, "")
    assert outcome.is_one_line_error(flag, "empty", status=2)
