"""Small data of the tests' own, and ways to run the scripts."""

import contextlib
import gc
import io
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

import dataset_helpers
import extract_features
import models
import pictures
import pirl_stl_train_test
import stl10_data_load
import train_stl_after_ssl
from runtime.script import run_script

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "stl10_data_load": stl10_data_load,
    "pirl_stl_train_test": pirl_stl_train_test,
    "train_stl_after_ssl": train_stl_after_ssl,
    "extract_features": extract_features,
    "pictures": pictures,
}
COUNTS = {"train": 60, "test": 40, "unlabelled": 100}


@dataclass
class Outcome:
    status: int
    out: str
    err: str

    def is_one_line_error(self, *parts, status=1):
        """Assert one line "error: what is wrong: what to do" that has all parts."""
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
    """call(script, *arguments) runs a script in this process, as a shell sees it."""

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        signals = (signal.SIGTERM, signal.SIGINT)
        handlers = {number: signal.getsignal(number) for number in signals}
        out = io.StringIO()
        err = io.StringIO()
        status = 0
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                run_script(SCRIPTS[script].main)
        except SystemExit as end:
            status = end.code or 0
            if isinstance(status, str):
                # The interpreter prints such a text and ends with 1.
                err.write(status + "\n")
                status = 1
        finally:
            # Closes the run's files and locks, as the end of a process does.
            gc.collect()
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return Outcome(status, out.getvalue(), err.getvalue())

    return call


def start(script, *arguments, **options):
    """A script as a process of its own."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, **options)


def make_trainer(flags):
    """A pretraining run that has not begun."""
    args = pirl_stl_train_test.make_parser().parse_args([str(flag) for flag in flags])
    device = torch.device("cpu")
    pirl_stl_train_test.resolve_defaults(args, device)
    images, train_count, _ = dataset_helpers.load_unlabelled(args, device, 0)
    return pirl_stl_train_test.PretrainingTrainer(args, device, images, train_count)


def write_raw(folder, counts, seed=0):
    """A raw set of noise in STL-10's layout under folder/stl10_binary.

    Images [N, 3, 96, 96] are stored column by column. Of 60 images, 1 to 13 are of a
    class: 6, 9, 1, 6, 6, 3, 8, 6, 2 and 13.
    """
    rng = np.random.default_rng(seed)
    raw = folder / "stl10_binary"
    raw.mkdir(parents=True)
    for split, (images_name, labels_name) in stl10_data_load.SPLITS.items():
        count = counts[split]
        coarse = rng.integers(0, 256, (count, 3, 12, 12), np.uint8)
        coarse.repeat(8, 2).repeat(8, 3).tofile(raw / images_name)
        if labels_name:
            labels = np.arange(count) % 10 + 1
            labels[12::10] = 10
            labels[28::20] = 10
            labels[35::10] = 2
            labels[38::20] = 7
            labels.astype(np.uint8).tofile(raw / labels_name)
    return raw


@pytest.fixture(scope="session")
def raw_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_raw(folder, COUNTS)
    return folder


@pytest.fixture(scope="session")
def data_dir(raw_dir, tmp_path_factory):
    """Folders of 60 training, 40 test and 100 unlabelled images. Not to be changed."""
    folder = tmp_path_factory.mktemp("stl10") / "data"
    for split in stl10_data_load.SPLITS:
        stl10_data_load.write_split(raw_dir / "stl10_binary", folder, split)
    return folder


@pytest.fixture
def tiny(data_dir, tmp_path):
    """Flags that make a run take seconds."""
    # fmt: off
    return [
        "--data-dir", data_dir, "--image-size", 36, "--batch-size", 16, "--epochs", 2,
        "--device", "cpu", "--weights-dir", tmp_path / "weights",
        "--observations-dir", tmp_path / "observations",
    ]
    # fmt: on


@pytest.fixture
def pretrain(call, tiny):
    """pretrain(name, *flags) is a tiny run under this name: 2 epochs of 5 steps."""

    def pretrain(name, *flags):
        return call("pirl_stl_train_test", *tiny, "--experiment-name", name, *flags)

    return pretrain


@pytest.fixture(scope="session")
def kept_runs():
    """The folders of finished runs, by their names and flags."""
    return {}


@pytest.fixture
def finished(pretrain, kept_runs, tmp_path, tmp_path_factory):
    """finished(name, *flags) writes the files of such a run of pretrain().

    The run itself is made once, and copied from then on.
    """

    def finished(*run):
        if run not in kept_runs:
            folder = tmp_path_factory.mktemp("finished")
            # fmt: off
            outcome = pretrain(
                *run, "--weights-dir", folder / "weights",
                "--observations-dir", folder / "observations",
            )
            # fmt: on
            assert outcome.status == 0, outcome.err
            kept_runs[run] = folder
        shutil.copytree(kept_runs[run], tmp_path, dirs_exist_ok=True)

    return finished


class ThinResNet(torchvision.models.ResNet):
    """A ResNet of one block per stage, with an eighth of ResNet-18's channels there.

    torchvision's names, a hundredth of ResNet-18's weights.
    """

    def __init__(self, weights=None, **options):
        block = torchvision.models.resnet.BasicBlock
        super().__init__(block, [1, 1, 1, 1], **options)
        self.fc = torch.nn.Linear(64, 1000)

    def _make_layer(self, block, planes, *rest, **options):
        return super()._make_layer(block, planes // 8, *rest, **options)


@pytest.fixture(autouse=True)
def thin_trunk(request, monkeypatch):
    """A run in this process takes one second instead of four.

    Where the network itself matters: mark the test full_trunk.
    """
    if "full_trunk" not in request.keywords:
        monkeypatch.setitem(models.TRUNKS, "res18", ThinResNet)


def pytest_collection_modifyitems(items):
    """The longest first, so that no process is left with it at the end."""
    items.sort(key=lambda item: not item.name.startswith("test_faults_are_survived"))


def pytest_collection_finish():
    """call() collects garbage after each script; not among all that is imported."""
    gc.freeze()


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """What runs in this process need not survive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def as_at_the_start():
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
