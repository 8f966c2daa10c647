"""2,000 steps on tiny images, a checkpoint every few steps.

python tests/endurance.py        # or: make endurance

At the end, memory and open files must be as at step 200.
"""

import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import start, write_raw

import stl10_data_load
from runtime.arguments import Parser

STEPS = 2000
STEPS_PER_EPOCH = 25
BATCH_SIZE = 4
CHECKPOINT_MINUTES = 0.01
MOST_GROWTH = 20e6  # bytes


@dataclass
class Sample:
    memory: int  # resident, bytes
    files: int  # open


def main(argv=None):
    Parser(__doc__).parse_args(argv)

    folder = Path(tempfile.mkdtemp(prefix="endurance-"))
    process = start_training(folder)
    samples, checkpoints = watch(process, folder)
    assert process.returncode == 0, process.stderr.read()

    print(f"{checkpoints} checkpoints were written")

    first = samples[200]
    last_step = max(step for step in samples if step < STEPS)
    last = samples[last_step]
    growth = median_memory(last) - median_memory(first)
    more_files = most_files(last) - most_files(first)
    change = f"{growth / 1e6:+.1f} MB, {more_files:+d} open files"
    print(f"from step 200, {median_memory(first) / 1e6:.1f} MB, to the end: {change}")
    sys.exit(abs(growth) > MOST_GROWTH or more_files > 0)


def start_training(folder):
    """Images of noise, and a pretraining run on them as a process of its own."""
    counts = {"train": 60, "test": 40, "unlabelled": STEPS_PER_EPOCH * BATCH_SIZE}
    raw = write_raw(folder / "raw", counts)
    for split in stl10_data_load.SPLITS:
        stl10_data_load.write_split(raw, folder / "data", split)
    # fmt: off
    flags = [
        "--image-size", 36, "--batch-size", BATCH_SIZE, "--only-train",
        "--epochs", STEPS // STEPS_PER_EPOCH, "--knn-every", 20,
        "--checkpoint-minutes", CHECKPOINT_MINUTES, "--device", "cpu",
        "--data-dir", folder / "data", "--weights-dir", folder / "weights",
        "--observations-dir", folder / "observations", "--experiment-name", "run",
    ]
    # fmt: on
    return start("pirl_stl_train_test", *flags)


def watch(process, folder):
    """Look at a process until it ends.

    Returns ({step: samples of the epoch behind it}, the number of checkpoints seen).
    """
    proc = Path(f"/proc/{process.pid}")
    samples = defaultdict(list)
    checkpoints = 0
    written_at = None
    while process.poll() is None:
        time.sleep(0.05)
        try:
            step = steps_done(folder / "observations/run_observations.csv")
            memory = resident_memory(proc / "status")
            sample = Sample(memory, len(os.listdir(proc / "fd")))
            samples[step].append(sample)
            last_written_at = (folder / "weights/run.ckpt").stat().st_mtime_ns
        except (OSError, LookupError):
            continue  # it has just ended, or begun
        if last_written_at != written_at:
            checkpoints += 1
            written_at = last_written_at
    return samples, checkpoints


def steps_done(history_file):
    """By the CSV, which has a row per finished epoch."""
    if not history_file.exists():
        return 0
    rows = len(history_file.read_text().splitlines()) - 1
    return STEPS_PER_EPOCH * rows


def resident_memory(status_file):
    """Bytes. Of a process that has just ended, the line is missing: LookupError."""
    lines = status_file.read_text().splitlines()
    resident = [line for line in lines if line.startswith("VmRSS")]
    return 1024 * int(resident[0].split()[1])


def median_memory(samples):
    return statistics.median(sample.memory for sample in samples)


def most_files(samples):
    return max(sample.files for sample in samples)


if __name__ == "__main__":
    main()
