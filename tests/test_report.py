"""The tables that a fine-tuning writes, and its picture of the neighbours."""

import statistics

import numpy as np
import pytest
import torch
from PIL import Image
from test_pictures import cells_of_neighbours, record_texts
from torch import nn

import report
from augmentations import PIXEL_MEAN, PIXEL_STD
from dataset_helpers import LabelledImages
from models import use_pixels_of
from report import Answers


# ---- The results ---------------------------------------------------------------------
def test_the_results_table():
    results = {
        "folds": [(1.0, 0.5), (1.0, 0.53), (1.0, 0.58)],
        "knn": (0.4, 0.41),
        "full": (None, 0.7512),
        "softmax": (0.6, None),
    }
    spread = 100 * statistics.stdev([0.5, 0.53, 0.58])
    assert report.results_table("a trunk, images of here", results).splitlines() == [
        "a trunk, images of here:",
        "",
        "Fine tuning strategy | Val Classification Accuracy"
        " | Test Classification Accuracy",
        "--- | --- | ---",
        "Only softmax layer is fine tuned | 60.00% | none",
        "Full model is fine tuned | none | 75.12%",
        "kNN | 40.00% | 41.00%",
        f"Only softmax layer is fine tuned, predefined folds | none"
        f" | 53.67 ± {spread:.2f}%",
    ]


@pytest.mark.parametrize(
    ("folds", "cell"),
    [([(1.0, 0.5)], "50.00%"), ([(1.0, None), (1.0, None)], "none")],
)
def test_one_fold_has_no_spread_and_no_test_images_no_accuracy(folds, cell):
    last = report.results_table("", {"folds": folds}).splitlines()[-1]
    assert last.endswith(f"folds | none | {cell}")


# ---- Classes -------------------------------------------------------------------------
NAMES = [*"abcdefghij", "b|ack | white", "two\r\nlines"]


def random_answers(rng, labels):
    """Answers of which about half are right, and none of class 3."""
    labels = rng.permutation(labels)
    wrong = rng.random(len(labels)) < 0.5
    predictions = np.where(wrong, rng.integers(0, 12, len(labels)), labels)
    predictions[labels == 3] = 4
    return Answers(torch.from_numpy(labels), torch.from_numpy(predictions))


def accuracies_by_hand(answers):
    """[(number of images, number that are right)] of the twelve classes."""
    figures = []
    for label in range(12):
        predictions = answers.predictions[answers.labels == label].tolist()
        figures.append((len(predictions), predictions.count(label)))
    return figures


def cells_by_hand(images, right):
    return [str(images), f"{right / images:.2%}" if images else "none"]


def test_the_class_table_row_by_row():
    rng = np.random.default_rng(0)
    train_sizes = [5, 1, 2, 14, 3, 7, 1, 1, 4, 9, 2, 6]
    train_labels = rng.permutation(np.repeat(np.arange(12), train_sizes))
    val = random_answers(
        rng, np.repeat(np.arange(11), [3, 2, 9, 1, 1, 4, 8, 2, 5, 6, 7])
    )
    test = random_answers(
        rng, np.repeat(np.arange(3, 12), [4, 9, 1, 3, 20, 8, 2, 6, 5])
    )
    table = report.class_table(NAMES, torch.from_numpy(train_labels), val, test)

    header, rule, *rows = [line.split(" | ") for line in table.splitlines()]
    accuracies = ["Val images", "Val accuracy", "Test images", "Test accuracy"]
    assert header == ["Class", "Train images", *accuracies]
    assert rule == ["---"] * 6
    val_figures = accuracies_by_hand(val)
    test_figures = accuracies_by_hand(test)
    shown_names = [*"abcdefghij", r"b\|ack \| white", "two lines"]
    for label, name in enumerate(shown_names):
        expected = [name, str(train_sizes[label])]
        expected += cells_by_hand(*val_figures[label])
        expected += cells_by_hand(*test_figures[label])
        assert rows[label] == expected

    def mean(figures):
        return statistics.mean(right / images for images, right in figures if images)

    assert rows[12:] == [
        [
            "mean of the classes",
            "55",
            "48",
            f"{mean(val_figures):.2%} (11 of 12 classes)",
            "58",
            f"{mean(test_figures):.2%} (9 of 12 classes)",
        ]
    ]


def test_the_last_row_of_all_classes_and_of_none():
    """Classes count, and not images: here 94 % of those are right."""
    labels = torch.tensor([0] * 88 + [1] * 12)
    predictions = labels.clone()
    predictions[-6:] = 0
    val = Answers(labels, predictions)
    nothing = Answers(labels[:0], labels[:0])
    table = report.class_table(["a", "b"], labels, val, nothing)
    assert report.accuracy_of(val) == pytest.approx(0.94)
    assert report.accuracy_of(nothing) is None
    assert (
        table.splitlines()[-1] == "mean of the classes | 100 | 100 | 75.00% | 0 | none"
    )


# ---- Neighbours ----------------------------------------------------------------------
def plain_colours(rng, labels):
    """A plain image [3, 40, 40] per label; its colour depends on the label."""
    base = np.random.default_rng(9).integers(0, 256, (27, 3))
    colours = (base[labels] + rng.integers(-30, 31, (len(labels), 3))).clip(0, 255)
    images = torch.from_numpy(colours.astype(np.uint8))[:, :, None, None]
    return colours, LabelledImages(
        images.repeat(1, 1, 40, 40), torch.from_numpy(labels)
    )


@pytest.mark.parametrize(("class_count", "known_count"), [(27, 50), (3, 4)])
def test_the_picture_of_the_neighbours(tmp_path, monkeypatch, class_count, known_count):
    """Of each class its first image; of many classes the first 20."""
    rng = np.random.default_rng(4)
    known_labels = rng.integers(0, class_count, known_count)
    shown_labels = rng.permutation(np.repeat(np.arange(class_count), 3))
    shown_labels = shown_labels[shown_labels != 1]  # a class without images
    known_colours, known = plain_colours(rng, known_labels)
    shown_colours, shown = plain_colours(rng, shown_labels)
    trunk = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    use_pixels_of(trunk, {})
    names = [f"k{i}" for i in range(class_count)]
    texts = record_texts(monkeypatch)
    same_class = []
    draw = report.neighbour_picture

    def noting(*arguments, **options):
        same_class.extend(options["same_class"].flatten().tolist())
        return draw(*arguments, **options)

    monkeypatch.setattr(report, "neighbour_picture", noting)
    path = tmp_path / "neighbours.png"
    report.draw_neighbours(str(path), trunk, known, shown, names, 16)

    def normal(colours):
        values = (colours / 255 - PIXEL_MEAN) / PIXEL_STD
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    expected_texts = []
    expected_colours = []
    expected_same_class = []
    for label in sorted(set(shown_labels.tolist()))[:20]:
        first = shown_labels.tolist().index(label)
        cosines = normal(known_colours) @ normal(shown_colours[first : first + 1])[0]
        nearest = np.argsort(-cosines)[:5]
        expected_texts += [names[label], *[names[i] for i in known_labels[nearest]]]
        expected_colours += [shown_colours[first], *known_colours[nearest]]
        expected_same_class += (known_labels[nearest] == label).tolist()
    assert texts == expected_texts
    assert same_class == expected_same_class

    with Image.open(path) as picture:
        cells = list(cells_of_neighbours(picture.convert("RGB")))
    for cell, colour in zip(cells, expected_colours, strict=True):
        # A file of 256 colours has them but roughly.
        assert np.abs(np.array(cell.getpixel((30, 30))) - colour).max() < 25
