"""What a run has written, read back; and ways to disturb one."""

import csv
import os

import torch

import pirl_stl_train_test

# Columns that depend on the machine's speed.
CHANGING = {"images_per_second", "seconds"}

PARTS = ("trunk", "head_f", "head_g")
# All of a checkpoint that training changes, but for the clock.
TRAINED = (*PARTS, "optimizer", "bank")


def weights(tmp_path, name):
    """The finished model <name>.pt."""
    return torch.load(tmp_path / f"weights/{name}.pt", weights_only=True)


def checkpoint(tmp_path, name):
    return torch.load(tmp_path / f"weights/{name}.ckpt", weights_only=True)


def table(tmp_path, name):
    """The lines of the CSV as dicts of texts, without the columns of CHANGING."""
    path = tmp_path / f"observations/{name}_observations.csv"
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        for column in CHANGING:
            line.pop(column, None)
    return lines


def epochs_of(lines):
    return [line["epoch"] for line in lines]


def parts_of(content, names=PARTS):
    return {name: content[name] for name in names}


def same(a, b):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == b


def same_results(tmp_path, first, second):
    """Whether two pretraining runs have ended with the same weights and CSV."""
    first_parts = parts_of(weights(tmp_path, first))
    second_parts = parts_of(weights(tmp_path, second))
    same_table = table(tmp_path, first) == table(tmp_path, second)
    return same(first_parts, second_parts) and same_table


def signal_in(patch, owner, name, number, which=1):
    """The process gets a signal when owner.name is called for the `which`-th time."""
    function = getattr(owner, name)
    calls = []

    def disturbed(*arguments, **options):
        calls.append(name)
        if len(calls) == which:
            os.kill(os.getpid(), number)
        return function(*arguments, **options)

    patch.setattr(owner, name, disturbed)


def signal_in_step(patch, number, which):
    """The process gets a signal within its training step number `which`."""
    signal_in(
        patch, pirl_stl_train_test.PretrainingTrainer, "train_step", number, which
    )


def interrupted(*arguments):
    """In the place of a function: the process ends there at once."""
    raise KeyboardInterrupt


class Clock:
    """In the place of `time` in runtime.loop: each look comes `tick` seconds later."""

    def __init__(self, tick):
        self.now = 0
        self.tick = tick

    def monotonic(self):
        self.now += self.tick
        return self.now
