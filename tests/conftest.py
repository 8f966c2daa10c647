"""Small data of the tests' own, and ways to run the scripts."""

import contextlib
import gc
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import run_helpers as rh
import numpy as np
import pytest
import torch
import torchvision

import dataset_helpers as dh
import extract_features
import models
import pirl_stl_train_test as pirl
import stl10_data_load
import train_stl_after_ssl

ROOT = Path(__file__).parent.parent
SCRIPTS = {module.__name__: module for module in (stl10_data_load, pirl, train_stl_after_ssl, extract_features)}
COUNTS = {"train": 60, "test": 40, "unlabelled": 100}


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    def is_one_line_error(self, *parts, status=1):
        """Whether this is one line "error: what is wrong: what to do" that names each of `parts`."""
        lines = self.err.splitlines()
        assert self.status == status, (self.status, self.out, self.err)
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        assert ": " in lines[0][7:], self.err
        for part in parts:
            assert str(part) in lines[0], (part, self.err)
        return True


@pytest.fixture
def call(monkeypatch):
    """call(script, *arguments) runs a script's main in this process, as the shell would see it."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        out, err, status = io.StringIO(), io.StringIO(), 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                rh.run_script(SCRIPTS[script].main)
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):  # what the interpreter does with it
                err.write(status + "\n")
                status = 1
        finally:
            gc.collect()  # closes the run's files, as the end of a process does
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Outcome(status, out.getvalue(), err.getvalue())

    return call


def start(script, *arguments, **options):
    """A script as a process of its own."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def start_of(flags):
    """A pretraining run that has not begun."""
    args, cpu = pirl.parse_args([str(flag) for flag in flags]), torch.device("cpu")
    pirl.settle(args, cpu, None)
    images, train_count, _ = dh.load_unlabelled(args, cpu)
    return pirl.Pretraining(args, cpu, images, train_count)


def write_raw(folder, counts, seed=0):
    """A raw set of noise in STL-10's layout under folder/stl10_binary: images [N, 3, 96, 96], column by column."""
    rng = np.random.default_rng(seed)
    raw = folder / "stl10_binary"
    raw.mkdir(parents=True)
    for split, (images, labels) in stl10_data_load.SPLITS.items():
        smooth = rng.integers(0, 256, (counts[split], 3, 12, 12), np.uint8)
        smooth.repeat(8, 2).repeat(8, 3).tofile(raw / images)
        if labels:
            (np.arange(counts[split]) % 10 + 1).astype(np.uint8).tofile(raw / labels)
    return raw


@pytest.fixture(scope="session")
def raw_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_raw(folder, COUNTS)
    return folder


@pytest.fixture(scope="session")
def data_dir(raw_dir, tmp_path_factory):
    """Image folders of 60 training, 40 test and 100 unlabelled images. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("stl10") / "data"
    for split in stl10_data_load.SPLITS:
        stl10_data_load.write_split(raw_dir / "stl10_binary", folder, split)
    return folder


@pytest.fixture
def tiny(data_dir, tmp_path):
    """Flags that make a run take seconds."""
    return [
        *("--data-dir", data_dir, "--image-size", 36, "--batch-size", 16, "--epochs", 2, "--device", "cpu"),
        *("--weights-dir", tmp_path / "weights", "--observations-dir", tmp_path / "observations"),
    ]


class ThinResNet18(torchvision.models.ResNet):
    """torchvision's ResNet-18 with an eighth of the channels behind the stem: the same names, 1/50 of the weights."""

    def __init__(self, weights=None, **options):
        super().__init__(torchvision.models.resnet.BasicBlock, [2, 2, 2, 2], **options)
        self.fc = torch.nn.Linear(64, 1000)

    def _make_layer(self, block, planes, *rest, **options):
        return super()._make_layer(block, planes // 8, *rest, **options)


@pytest.fixture(autouse=True)
def thin_trunk(request, monkeypatch):
    """A run in this process takes a second instead of four. Where the network itself matters: mark full_trunk."""
    if "full_trunk" not in request.keywords:
        monkeypatch.setitem(models.TRUNKS, "res18", ThinResNet18)


def pytest_collection_modifyitems(items):
    """The longest first, so that no process is left with one of them at the end."""
    slow = ("test_faults_are_survived", "test_overfits_64_images")
    items.sort(key=lambda item: not item.name.startswith(slow))


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What runs in this process survives no power cut; test_faults.py starts processes, and they do sync."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def as_at_the_start():
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
