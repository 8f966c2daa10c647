"""The report of a fine-tuning: results table, classes, confusion matrix, neighbours.

write_report() writes what needs the model's answers alone, draw_neighbours() what needs
the trunk and the images.
"""

import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import evaluation
from pictures import (
    confusion_picture,
    drawable_names,
    neighbour_picture,
    save_picture,
    write_confusion_csv,
)
from runtime.files import atomic_write

SHOWN_NEIGHBOURS = 5
SHOWN_CLASSES = 20  # at most, in the picture of the neighbours

TABLE_HEADER = (
    "Fine tuning strategy | Val Classification Accuracy | "
    "Test Classification Accuracy\n--- | --- | ---\n"
)
# The rows of the table, by the names of the results in our files. The first two are
# worded as aniket03/pirl_pytorch's.
TABLE_ROWS = {
    "softmax": "Only softmax layer is fine tuned",
    "full": "Full model is fine tuned",
    "knn": "kNN",
    "folds": "Only softmax layer is fine tuned, predefined folds",
}


class Answers(NamedTuple):
    """The true classes of images and a model's predictions, int64 [N] each."""

    labels: torch.Tensor
    predictions: torch.Tensor


def accuracy_of(answers):
    """The share of right answers, a float; None without images."""
    if len(answers.labels) == 0:
        return None
    return (answers.predictions == answers.labels).float().mean().item()


# ---- Tables --------------------------------------------------------------------------
def results_table(title, results):
    """The results in Markdown; results: as in a model file. title: a line above it."""
    table = f"{title}:\n\n{TABLE_HEADER}"
    for name, row in TABLE_ROWS.items():
        if name not in results:
            continue
        if name == "folds":
            # A fold's images also validate it, so its validation accuracy says nothing.
            validation_cell = "none"
            test_cell = spread([test for _, test in results[name]])
        else:
            validation, test = results[name]
            validation_cell = percent(validation)
            test_cell = percent(test)
        table += f"{row} | {validation_cell} | {test_cell}\n"
    return table


def percent(accuracy):
    return "none" if accuracy is None else f"{accuracy:.2%}"


def spread(accuracies):
    """mean ± standard deviation (of the sample) in per cent, as text."""
    if None in accuracies:
        return "none"
    text = f"{100 * statistics.mean(accuracies):.2f}"
    if len(accuracies) > 1:
        text += f" ± {100 * statistics.stdev(accuracies):.2f}"
    return text + "%"


def class_table(classes, train_labels, val, test):
    """The accuracies of each class in Markdown; in the last row, the mean of them.

    Where classes differ in size, accuracy alone may hide a bad one. val, test: Answers.
    """
    count = len(classes)
    train_counts = torch.bincount(train_labels, minlength=count).tolist()
    val_counts, val_accuracies = class_accuracies(val, count)
    test_counts, test_accuracies = class_accuracies(test, count)

    table = "Class | Train images | Val images | Val accuracy | Test images | "
    table += "Test accuracy\n--- | --- | --- | --- | --- | ---\n"
    for label, name in enumerate(classes):
        cells = [
            escaped(name),
            str(train_counts[label]),
            str(val_counts[label]),
            percent(val_accuracies[label]),
            str(test_counts[label]),
            percent(test_accuracies[label]),
        ]
        table += " | ".join(cells) + "\n"
    last = [
        "mean of the classes",
        str(sum(train_counts)),
        str(sum(val_counts)),
        mean_cell(val_accuracies),
        str(sum(test_counts)),
        mean_cell(test_accuracies),
    ]
    return table + " | ".join(last) + "\n"


def class_accuracies(answers, count):
    """(number of images, accuracy or None) of each of `count` classes, as two lists."""
    correct = answers.labels[answers.predictions == answers.labels]
    image_counts = torch.bincount(answers.labels, minlength=count).tolist()
    correct_counts = torch.bincount(correct, minlength=count).tolist()
    accuracies = [
        right / images if images else None
        for right, images in zip(correct_counts, image_counts, strict=True)
    ]
    return image_counts, accuracies


def mean_cell(accuracies):
    """The mean of the classes that have images, and how many those are."""
    measured = [accuracy for accuracy in accuracies if accuracy is not None]
    if not measured:
        return "none"
    text = percent(statistics.mean(measured))
    if len(measured) < len(accuracies):
        text += f" ({len(measured)} of {len(accuracies)} classes)"
    return text


def escaped(name):
    """A class name as a cell of a Markdown table."""
    return " ".join(name.splitlines()).replace("|", "\\|")


# ---- Files ---------------------------------------------------------------------------
def write_report(experiment, argv, table, classes, train_labels, val, test):
    """Write <experiment>_results.md and the confusion matrix; print the table.

    argv: the arguments of the command, None for those of the process. table: of
    results_table(). val, test: the finished model's Answers.
    """
    shown = test if len(test.labels) else val

    # What is confused with what.
    confusion_file = experiment.observation("confusion.png")
    picture = confusion_picture(shown.labels, shown.predictions, classes)
    save_picture(picture, confusion_file)
    csv_file = experiment.observation("confusion.csv")
    write_confusion_csv(csv_file, shown.labels, shown.predictions, classes)

    arguments = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "train_stl_after_ssl.py", *map(str, arguments)])
    date = time.strftime("%Y-%m-%d %H:%M", time.gmtime())
    of_classes = class_table(classes, train_labels, val, test)
    results_file = experiment.observation("results.md")
    with atomic_write(results_file, "w") as file:
        file.write(f"## {experiment.name}\n\n{date} UTC: `{command}`\n\n{table}\n")
        file.write(of_classes)

    print(f"\n{table}", flush=True)
    _, val_accuracies = class_accuracies(val, len(classes))
    _, test_accuracies = class_accuracies(test, len(classes))
    print(
        f"mean of the classes: validation {mean_cell(val_accuracies)}, "
        f"test {mean_cell(test_accuracies)}"
    )
    files = f"{experiment.model_file}, {experiment.history_file}, {confusion_file}"
    print(f"wrote {files}, {csv_file} and {results_file}", flush=True)


def draw_neighbours(path, trunk, known, shown, classes, batch_size):
    """A picture: the first image of each class, with its nearest training images.

    known: the LabelledImages to search. shown: the LabelledImages whose first image of
    each class is a query, of at most 20 classes.
    """
    labels = shown.labels.unique()[:SHOWN_CLASSES]
    firsts = [(shown.labels == label).nonzero()[0].item() for label in labels]
    queries = shown.images[firsts]  # [Q, 3, S, S]
    _, nearest = evaluation.nearest_neighbours(
        evaluation.trunk_features(trunk, known.images, batch_size),
        evaluation.trunk_features(trunk, queries, batch_size),
        SHOWN_NEIGHBOURS,
    )
    found_labels = known.labels[nearest]  # [Q, k]
    names = drawable_names(classes)
    picture = neighbour_picture(
        queries,
        known.images[nearest],
        query_texts=[names[label] for label in labels],
        found_texts=[[names[label] for label in row] for row in found_labels],
        same_class=found_labels == labels[:, None],
    )
    save_picture(picture, Path(path))
    what = "images, and the nearest training images, in green if of the same class"
    print(f"wrote {path}: {what}", flush=True)
