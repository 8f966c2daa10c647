"""Faults thrown at the real scripts, each followed by --resume and a comparison.

python tests/faults.py --faults 200 --seed 0        # or: make faults

The result must be, bit for bit, that of a run which nothing has disturbed.
"""

import csv
import functools
import hashlib
import math
import os
import random
import resource
import signal
import sys
import tarfile
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from conftest import start, write_raw

from runtime.arguments import Parser, bounded
from runtime.bars import progress_bar
from runtime.errors import UserError
from runtime.files import read_torch_file

COUNTS = {"train": 60, "test": 40, "unlabelled": 100}
# How often one run gets a signal, before it is left to end.
TIMES = 3
# Columns of the CSV that depend on the machine's speed.
SPEED_COLUMNS = {"images_per_second", "seconds"}


# ---- The scripts, and their results --------------------------------------------------
@dataclass
class Job:
    """A script with its arguments, in which {folder} stands for the run's folder."""

    script: str
    arguments: list
    result: Any  # a function: folder -> what is compared
    thin: bool = False  # whether with the thin trunk
    # Of the untouched run:
    seconds: float = 0.0
    expected: object = None
    largest_file: int = 0  # bytes

    def start(self, folder, **options):
        arguments = [str(text).format(folder=folder) for text in self.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        script = ["tests/thin_script", self.script] if self.thin else [self.script]
        return start(
            *script, *arguments, env=environment, start_new_session=True, **options
        )

    def finish(self, folder, problems):
        """Let it run to its end; anything but success is a problem."""
        process = self.start(folder)
        _, err = process.communicate(timeout=300)
        if process.returncode:
            status = process.returncode
            problems.append(f"{self.script} ended with {status}: {err.strip()}")

    def compare(self, folder, problems):
        """Unless there is a problem already: is the result the untouched run's?"""
        if problems:
            return
        if self.result(folder) != self.expected:
            what = "the result is another than that of the untouched run"
            problems.append(f"{self.script}: {what}")


def digest(value):
    """A hash of nested dicts, lists, tensors and numbers, to the last bit."""
    sha = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            sha.update(str((value.dtype, value.shape)).encode())
            sha.update(value.contiguous().view(-1).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(str(key))
                add(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                add(item)
        else:
            sha.update(repr(value).encode())

    add(value)
    return sha.hexdigest()


def history(folder):
    """The rows of the CSV."""
    rows = []
    with open(folder / "observations/run_observations.csv", newline="") as file:
        for row in csv.DictReader(file):
            for column in SPEED_COLUMNS:
                row.pop(column, None)
            rows.append(row)
    return rows


def pretrained(folder):
    """Weights, memory bank, optimiser and CSV."""
    model = torch.load(folder / "weights/run.pt", weights_only=True)
    checkpoint = torch.load(folder / "weights/run.ckpt", weights_only=True)
    parts = ("trunk", "head_f", "head_g")
    exported = [model[name] for name in parts]
    trained = [checkpoint[name] for name in (*parts, "optimizer", "bank")]
    return digest(exported), digest(trained), history(folder)


def fine_tuned(folder):
    """Weights, results and CSV."""
    model = torch.load(folder / "weights/run.pt", weights_only=True)
    exported = [model[name] for name in ("trunk", "softmax_layer", "results")]
    return digest(exported), history(folder)


def prepared(folder):
    """Every image; and that nothing else lies there."""
    files = sorted(path for path in (folder / "data").rglob("*") if path.is_file())
    return digest(
        [(str(path.relative_to(folder)), path.read_bytes()) for path in files]
    )


def make_jobs(folder, thin):
    """Data of the suite's own, and each job run once, untouched."""
    raw = write_raw(folder / "raw", COUNTS)
    archive_file = folder / "stl10.tgz"
    with tarfile.open(archive_file, "w:gz", compresslevel=1) as archive:
        archive.add(raw, "stl10_binary")

    # fmt: off
    prepare = [
        "--url", archive_file.as_uri(),
        "--raw-dir", "{folder}/raw", "--data-dir", "{folder}/data",
    ]
    train = [
        "--data-dir", folder / "reference_prepare/data", "--image-size", 36,
        "--batch-size", 16, "--device", "cpu", "--experiment-name", "run",
        "--weights-dir", "{folder}/weights",
        "--observations-dir", "{folder}/observations",
        "--checkpoint-minutes", 0.005, "--resume", "True",
    ]
    pretrain = [*train, "--epochs", 4, "--knn-every", 2]
    fine_tune = [*train, "--epochs", 3, "--full-fine-tune", "True"]
    # fmt: on
    jobs = {
        "prepare": Job("stl10_data_load", prepare, prepared),
        "pretrain": Job("pirl_stl_train_test", pretrain, pretrained, thin),
        "fine-tune": Job("train_stl_after_ssl", fine_tune, fine_tuned, thin),
    }

    for name, job in jobs.items():
        own = folder / f"reference_{name}"
        own.mkdir()
        problems = []
        started = time.monotonic()
        job.finish(own, problems)
        assert not problems, problems
        job.seconds = time.monotonic() - started
        job.expected = job.result(own)
        files = [path for path in own.rglob("*") if path.is_file()]
        job.largest_file = max(path.stat().st_size for path in files)
    return jobs


# ---- Checks --------------------------------------------------------------------------
def has_finished(out):
    """Whether a process, by what it has printed, has done all its work."""
    lines = out.splitlines()
    return any(
        line.startswith("wrote ") or line.endswith("nothing to do") for line in lines
    )


def check_end(process, out, err, number, statuses, problems):
    """Did a process end as it should by the signal, or with 0 just before it?"""
    if has_finished(out):
        # Only the result counts. While the interpreter takes itself down, Ctrl-C may
        # print the traceback of any library.
        return
    status = process.returncode
    orderly = status in (0, *statuses) and len(err.splitlines()) <= 1
    # A signal ends the process at once, and Ctrl-C does so in one line. But a training
    # notes signals from its first step to its end.
    notes_signals = ": loss " in out
    killed = status == -number and not err
    if number == signal.SIGINT or (number == signal.SIGTERM and notes_signals):
        killed = False
    # While it starts and imports, Python itself answers Ctrl-C, in ways of its own.
    interrupted = status == -number or err.rstrip(": \n").endswith("KeyboardInterrupt")
    by_python = interrupted and not out
    if not orderly and not killed and not by_python:
        problems.append(f"status {status}, after {out!r}: {err.strip()}")


def check_files(folder, problems):
    """Every file under its own name is whole."""
    for path in (folder / "weights").glob("[!.]*"):
        try:
            read_torch_file(path)
        except UserError as error:
            problems.append(str(error))


def empty(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()


# ---- The faults: (job, folder, random numbers) -> (how many faults, the problems) ----
def signalled(job, folder, rng, number, statuses, times=TIMES):
    """The signal comes at a random moment, `times` times.

    statuses: with which the process may end then.
    """
    faults = 0
    problems = []
    while faults < times and not problems:
        process = job.start(folder)
        time.sleep(rng.uniform(0, job.seconds))
        is_running = process.poll() is None
        if is_running:
            process.send_signal(number)
            faults += 1
        out, err = process.communicate(timeout=120)
        check_end(process, out, err, number, statuses, problems)
        check_files(folder, problems)

        if has_finished(out) or not is_running:
            # The signal came too late to disturb it: another run is disturbed.
            job.compare(folder, problems)
            if not problems:
                empty(folder)

    if not problems:
        job.finish(folder, problems)
        job.compare(folder, problems)
    return faults, problems


def twice_terminated(job, folder, rng):
    """A second SIGTERM comes while the first one is being answered."""
    faults = 0
    problems = []
    process = job.start(folder)
    time.sleep(rng.uniform(0, job.seconds))
    for pause in (rng.uniform(0, 0.3), 0):
        faults += process.poll() is None
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    out, err = process.communicate(timeout=120)

    statuses = (0, 143, -signal.SIGTERM)
    orderly = process.returncode in statuses and len(err.splitlines()) <= 1
    if not orderly and not has_finished(out):
        problems.append(f"status {process.returncode}: {err.strip()}")
    check_files(folder, problems)
    job.finish(folder, problems)
    job.compare(folder, problems)
    return faults, problems


def full_disk(job, folder, rng):
    """No file may grow beyond a random size, as on a disk that is full then."""
    size = int(10 ** rng.uniform(3, math.log10(job.largest_file)))

    def make_disk_small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    problems = []
    process = job.start(folder, preexec_fn=make_disk_small)
    _, err = process.communicate(timeout=120)
    lines = err.splitlines() or [""]
    if process.returncode != 1 or not lines[-1].startswith("error: "):
        problems.append(f"status {process.returncode}: {err.strip()}")
    check_files(folder, problems)
    job.finish(folder, problems)
    job.compare(folder, problems)
    return 1, problems


def damaged_checkpoint(job, folder, rng):
    """A checkpoint is cut short, overwritten, or one of its bytes is another.

    It is refused and left as it is; with a good copy in its place nothing is lost.
    """
    checkpoint_file = folder / "weights/run.ckpt"
    process = job.start(folder)
    while process.poll() is None and not checkpoint_file.exists():
        time.sleep(0.02)
    time.sleep(rng.uniform(0, job.seconds / 3))
    process.kill()
    process.communicate()

    whole = checkpoint_file.read_bytes()
    damaged = bytearray(whole)
    place = rng.randrange(len(whole))
    damage = rng.choice(["cut", "byte", "zeros"])
    if damage == "cut":
        del damaged[place:]
    elif damage == "byte":
        damaged[place] ^= rng.randrange(1, 256)
    else:
        end = min(place + 4096, len(whole))
        damaged[place:end] = bytes(end - place)
    checkpoint_file.write_bytes(damaged)

    problems = []
    process = job.start(folder)
    _, err = process.communicate(timeout=300)
    if process.returncode:
        one_line = len(err.splitlines()) == 1
        names_it = err.startswith(f"error: {checkpoint_file} ")
        untouched = checkpoint_file.read_bytes() == damaged
        if process.returncode != 1 or not (one_line and names_it and untouched):
            status = f"status {process.returncode}"
            problems.append(f"{damage} at {place}: {status}: {err.strip()}")
        checkpoint_file.write_bytes(whole)
        job.finish(folder, problems)
    # Where it was not refused, a byte of no account may differ, such as one of a date.
    job.compare(folder, problems)
    return 1, problems


def second_run(job, folder, rng):
    """A second run of the same name is refused while the first one lives.

    It does the first no harm.
    """
    first = job.start(folder)
    while first.poll() is None and not list((folder / "weights").glob("*.ckpt")):
        time.sleep(0.02)
    second = job.start(folder)
    _, err = second.communicate(timeout=120)
    met = first.poll() is None

    problems = []
    if met and (second.returncode != 1 or "another process" not in err):
        status = second.returncode
        problems.append(f"the second run ended with {status}: {err.strip()}")
    first.communicate(timeout=300)
    if first.returncode:
        problems.append(f"the first run ended with {first.returncode}")
    job.compare(folder, problems)
    return int(met), problems


sigkill = functools.partial(signalled, number=signal.SIGKILL, statuses=())
sigterm = functools.partial(signalled, number=signal.SIGTERM, statuses=(143,))
sigint = functools.partial(signalled, number=signal.SIGINT, statuses=(130,))


@dataclass
class Fault:
    name: str
    job: str
    inflict: Any  # one of the functions above
    weight: int = 1  # how often it is tried, compared with the others
    times: int = 1  # how many faults it counts for


FAULTS = [
    Fault("SIGKILL", "pretrain", sigkill, weight=4, times=TIMES),
    Fault("SIGKILL", "fine-tune", sigkill, weight=4, times=TIMES),
    Fault("SIGKILL", "prepare", sigkill, weight=4, times=TIMES),
    Fault("SIGTERM", "pretrain", sigterm, times=TIMES),
    Fault("SIGTERM", "fine-tune", sigterm, times=TIMES),
    Fault("SIGINT", "pretrain", sigint, times=TIMES),
    Fault("SIGINT", "fine-tune", sigint, times=TIMES),
    Fault("SIGINT", "prepare", sigint, times=TIMES),
    Fault("SIGTERM twice", "pretrain", twice_terminated),
    Fault("full disk", "pretrain", full_disk, weight=2),
    Fault("full disk", "fine-tune", full_disk, weight=2),
    Fault("full disk", "prepare", full_disk, weight=2),
    Fault("checkpoint damaged", "pretrain", damaged_checkpoint, weight=2),
    Fault("checkpoint damaged", "fine-tune", damaged_checkpoint, weight=2),
    Fault("second run of the name", "pretrain", second_run),
]


# ---- The suite -----------------------------------------------------------------------
@dataclass
class Count:
    tried: int = 0
    survived: int = 0
    lost: int = 0


def throw(plan, seed, folder, bar=None, thin=False):
    """Throw the faults of `plan`, two at a time.

    Returns ({(fault's name, job): Count}, all problems).
    """
    jobs = make_jobs(folder, thin)
    counts = defaultdict(Count)
    all_problems = []
    lock = threading.Lock()

    def throw_one(number):
        fault = plan[number]
        own = folder / str(number)
        own.mkdir()
        rng = random.Random(f"{seed} {number}")
        tried, problems = fault.inflict(jobs[fault.job], own, rng)

        with lock:
            count = counts[fault.name, fault.job]
            count.tried += tried
            if problems:
                count.lost += tried
            else:
                count.survived += tried
            for problem in problems:
                where = f"{fault.name}, {fault.job}, number {number}"
                all_problems.append(f"{where}: {problem}")
            if bar is not None:
                bar.update(tried)
        if not problems:  # what went wrong is left to be looked at
            empty(own)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(throw_one, range(len(plan))))
    return dict(counts), all_problems


def make_plan(faults, rng):
    """Random faults, at least so many."""
    weights = [fault.weight for fault in FAULTS]
    plan = []
    while sum(fault.times for fault in plan) < faults:
        plan += rng.choices(FAULTS, weights)
    return plan


def print_table(counts):
    print("fault | script | times tried | times survived | data lost")
    print("--- | --- | --- | --- | ---")
    together = Count()
    for (name, job), count in sorted(counts.items()):
        print(f"{name} | {job} | {count.tried} | {count.survived} | {count.lost}")
        together.tried += count.tried
        together.survived += count.survived
        together.lost += count.lost
    print(f"together | | {together.tried} | {together.survived} | {together.lost}")


def main(argv=None):
    parser = Parser("Faults thrown at the real scripts, each followed by --resume.")
    add = parser.add_argument
    add("--faults", type=bounded(int, 1), default=200, help="how many at least")
    add("--seed", type=int, default=0, help="seed of the moments and the order")
    args = parser.parse_args(argv)

    plan = make_plan(args.faults, random.Random(args.seed))
    expected = sum(fault.times for fault in plan)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"{len(plan)} runs to be disturbed, seed {args.seed}, in {folder}")
    with progress_bar(expected, "faults", " faults") as bar:
        counts, problems = throw(plan, args.seed, folder, bar)
    print_table(counts)
    print("\n".join(problems))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
