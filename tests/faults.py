"""Faults thrown at the real scripts, each followed by --resume and a bit-for-bit comparison with an untouched run.

python tests/faults.py --faults 200 --seed 0        # or: make faults
"""

import argparse
import csv
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

sys.path.insert(0, str(Path(__file__).parent.parent))

import run_helpers as rh
import torch
from conftest import start, write_raw

COUNTS = {"train": 60, "test": 40, "unlabelled": 100}
TIMES = 3  # that one run gets a signal, before it is left to end
CHANGING = {"images_per_second", "seconds"}  # columns that depend on the machine's speed


@dataclass
class Job:
    """A script with arguments that take {folder}, what to call its result, and how long it takes untouched."""

    script: str
    arguments: list
    result: object  # folder -> comparable
    thin: bool = False  # whether with the thin trunk
    seconds: float = 0.0
    expected: object = None
    largest: int = 0  # bytes, of the files that it writes

    def start(self, folder, **options):
        arguments = [str(argument).format(folder=folder) for argument in self.arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        script = ["tests/thin_script", self.script] if self.thin else [self.script]
        return start(*script, *arguments, env=environment, start_new_session=True, **options)

    def end(self, folder, problems, **options):
        """Let it run to its end; anything but success is a problem."""
        process = self.start(folder, **options)
        _, err = process.communicate(timeout=300)
        if process.returncode:
            problems.append(f"{self.script} ended with {process.returncode}: {err.strip()}")
        return err

    def same(self, folder, problems):
        if not problems and self.result(folder) != self.expected:
            problems.append(f"{self.script}: the result is another than that of the untouched run")


def digest(value):
    """A hash of nested dicts, lists, tensors and numbers, to the last bit."""
    sha = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            sha.update(str((value.dtype, value.shape)).encode() + value.contiguous().view(-1).numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                add(str(key))
                add(value[key])
        elif isinstance(value, list | tuple):
            for each in value:
                add(each)
        else:
            sha.update(repr(value).encode())

    add(value)
    return sha.hexdigest()


def rows(folder):
    with open(folder / "observations/run_observations.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in CHANGING} for row in csv.DictReader(file)]


def pretrained(folder):
    """Weights, memory bank, optimiser and CSV."""
    model = torch.load(folder / "weights/run.pt", weights_only=True)
    checkpoint = torch.load(folder / "weights/run.ckpt", weights_only=True)
    return digest([model["trunk"], model["head_f"], model["head_g"], checkpoint["run"]]), rows(folder)


def fine_tuned(folder):
    model = torch.load(folder / "weights/run.pt", weights_only=True)
    return digest([model["trunk"], model["softmax_layer"], model["results"]]), rows(folder)


def prepared(folder):
    """Every image; and that nothing else lies there."""
    files = sorted(path for path in (folder / "data").rglob("*") if path.is_file() and path.name != ".complete.json")
    return digest([(str(path.relative_to(folder)), path.read_bytes()) for path in files])


def make_jobs(folder, thin):
    """Data of the suite's own, and each job run once, untouched."""
    raw = write_raw(folder / "raw", COUNTS)
    with tarfile.open(folder / "stl10.tgz", "w:gz", compresslevel=1) as archive:
        archive.add(raw, "stl10_binary")
    run = ["--data-dir", folder / "reference_prepare/data", "--image-size", 36, "--batch-size", 16, "--device", "cpu"]
    run += ["--experiment-name", "run", "--weights-dir", "{folder}/weights", "--checkpoint-minutes", 0.005]
    run += ["--observations-dir", "{folder}/observations", "--resume", "True"]
    paths = ["--raw-dir", "{folder}/raw", "--data-dir", "{folder}/data"]
    jobs = {
        "prepare": Job("stl10_data_load", ["--url", (folder / "stl10.tgz").as_uri(), *paths], prepared),
        "pretrain": Job("pirl_stl_train_test", [*run, "--epochs", 4, "--knn-every", 2], pretrained, thin),
        "fine-tune": Job("train_stl_after_ssl", [*run, "--epochs", 3, "--full-fine-tune", "True"], fine_tuned, thin),
    }
    for name, job in jobs.items():
        own, problems, started = folder / f"reference_{name}", [], time.monotonic()
        own.mkdir()
        job.end(own, problems)
        assert not problems, problems
        job.seconds, job.expected = time.monotonic() - started, job.result(own)
        job.largest = max(path.stat().st_size for path in own.rglob("*") if path.is_file())
    return jobs


# ---- The faults: (job, folder, random numbers) -> (how many faults, the problems) -----------------------------------


def signalled(number, statuses):
    def fault(job, folder, rng, times=TIMES):
        faults, problems = 0, []
        while faults < times and not problems:
            process = job.start(folder)
            time.sleep(rng.uniform(0, job.seconds))
            running = process.poll() is None
            if running:
                process.send_signal(number)
                faults += 1
            out, err = process.communicate(timeout=120)
            check_end(process, out, err, number, (0, *statuses), problems)
            check_files(folder, problems)
            if not running:  # it ended before the signal came: another one is disturbed
                job.same(folder, problems)
                empty(folder)
        job.end(folder, problems)
        job.same(folder, problems)
        return faults, problems

    return fault


def check_end(process, out, err, number, statuses, problems):
    """Whether a process ended as it should by a signal, or (0) just before it."""
    orderly = process.returncode in statuses and len(err.splitlines()) <= 1
    # Between the steps of a training a signal is noted; elsewhere it ends the process, and Ctrl-C does so in one line.
    killed = number != signal.SIGINT and process.returncode == -number and not err
    # While it starts and imports, and once its work is done, Python itself answers Ctrl-C, in ways of its own.
    unprepared = not out or "wrote" in out or "nothing to do" in out
    by_python = process.returncode == -number or err.rstrip().rstrip(":").endswith("KeyboardInterrupt")
    if not orderly and not killed and not (unprepared and by_python):
        problems.append(f"status {process.returncode}, after {out!r}: {err.strip()}")


def check_files(folder, problems):
    """Every file under its own name is whole."""
    for path in (folder / "weights").glob("[!.]*"):
        try:
            rh.read_torch_file(path)
        except rh.UserError as error:
            problems.append(str(error))


def empty(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def twice_terminated(job, folder, rng):
    process, problems, faults = job.start(folder), [], 0
    time.sleep(rng.uniform(0, job.seconds))
    for pause in (rng.uniform(0, 0.3), 0):
        faults += process.poll() is None
        process.send_signal(signal.SIGTERM)
        time.sleep(pause)
    _, err = process.communicate(timeout=120)
    if process.returncode not in (0, 143, -signal.SIGTERM) or len(err.splitlines()) > 1:
        problems.append(f"status {process.returncode}: {err.strip()}")
    check_files(folder, problems)
    job.end(folder, problems)
    job.same(folder, problems)
    return faults, problems


def full_disk(job, folder, rng):
    """No file may grow beyond a random size, as on a disk that is full then."""
    size, problems = int(10 ** rng.uniform(3, math.log10(job.largest))), []

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    process = job.start(folder, preexec_fn=small_disk)
    _, err = process.communicate(timeout=120)
    if process.returncode != 1 or not err.splitlines()[-1].startswith("error: "):
        problems.append(f"status {process.returncode}: {err.strip()}")
    check_files(folder, problems)
    job.end(folder, problems)
    job.same(folder, problems)
    return 1, problems


def damaged_checkpoint(job, folder, rng):
    """A checkpoint cut short, overwritten or with one byte changed is refused and left as it is: nothing is lost."""
    file, problems = folder / "weights/run.ckpt", []
    process = job.start(folder)
    while process.poll() is None and not file.exists():
        time.sleep(0.02)
    time.sleep(rng.uniform(0, job.seconds / 3))
    process.kill()
    process.communicate()
    whole = file.read_bytes()
    hurt, place, how = bytearray(whole), rng.randrange(len(whole)), rng.choice(["cut", "byte", "zeros"])
    if how == "cut":
        del hurt[place:]
    elif how == "byte":
        hurt[place] ^= rng.randrange(1, 256)
    else:
        hurt[place : place + 4096] = bytes(len(hurt[place : place + 4096]))
    file.write_bytes(hurt)
    process = job.start(folder)
    _, err = process.communicate(timeout=300)
    if process.returncode:
        refused = process.returncode == 1 and len(err.splitlines()) == 1 and err.startswith(f"error: {file} ")
        if not refused or file.read_bytes() != hurt:
            problems.append(f"{how} at {place}: status {process.returncode}: {err.strip()}")
        file.write_bytes(whole)
        job.end(folder, problems)
    job.same(folder, problems)  # a byte of no account, such as a date, may differ
    return 1, problems


def second_run(job, folder, rng):
    """A second run of the same name while the first lives is refused, and does the first no harm."""
    first, problems = job.start(folder), []
    while first.poll() is None and not list((folder / "weights").glob("*.ckpt")):
        time.sleep(0.02)
    second = job.start(folder)
    _, err = second.communicate(timeout=120)
    both = first.poll() is None
    if both and (second.returncode != 1 or "another process" not in err):
        problems.append(f"the second run ended with {second.returncode}: {err.strip()}")
    first.communicate(timeout=300)
    if first.returncode:
        problems.append(f"the first run ended with {first.returncode}")
    job.same(folder, problems)
    return int(both), problems


SIGKILL, SIGTERM = signalled(signal.SIGKILL, ()), signalled(signal.SIGTERM, (143,))
SIGINT = signalled(signal.SIGINT, (130,))
FAULTS = [  # name, job, how, weight
    ("SIGKILL", "pretrain", SIGKILL, 4),
    ("SIGKILL", "fine-tune", SIGKILL, 4),
    ("SIGKILL", "prepare", SIGKILL, 4),
    ("SIGTERM", "pretrain", SIGTERM, 1),
    ("SIGTERM", "fine-tune", SIGTERM, 1),
    ("SIGINT", "pretrain", SIGINT, 1),
    ("SIGINT", "fine-tune", SIGINT, 1),
    ("SIGINT", "prepare", SIGINT, 1),
    ("SIGTERM twice", "pretrain", twice_terminated, 1),
    ("full disk", "pretrain", full_disk, 2),
    ("full disk", "fine-tune", full_disk, 2),
    ("full disk", "prepare", full_disk, 2),
    ("checkpoint damaged", "pretrain", damaged_checkpoint, 2),
    ("checkpoint damaged", "fine-tune", damaged_checkpoint, 2),
    ("second run of the name", "pretrain", second_run, 1),
]


def throw(plan, seed, folder, bar=None, thin=False):
    """Throw the faults of `plan`, two at a time: {(fault, job): [tried, survived, lost]}, [problems]."""
    jobs, tally, found, lock = make_jobs(folder, thin), defaultdict(lambda: [0, 0, 0]), [], threading.Lock()

    def one(number):
        name, job, fault, _ = plan[number]
        own = folder / str(number)
        own.mkdir()
        count, problems = fault(jobs[job], own, random.Random(f"{seed} {number}"))
        with lock:
            counts = tally[name, job]
            counts[0] += count
            counts[2 if problems else 1] += count
            found.extend(f"{name}, {job}, number {number}: {problem}" for problem in problems)
            if bar is not None:
                bar.update(count)
        if not problems:  # what went wrong is left to be looked at
            empty(own)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, range(len(plan))))
    return dict(tally), found


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--faults", type=int, default=200, help="how many at least (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the order (default: 0)")
    args = parser.parse_args()
    rng, plan, expected = random.Random(args.seed), [], 0
    while expected < args.faults:
        plan.append(rng.choices(FAULTS, [weight for *_, weight in FAULTS])[0])
        expected += TIMES if plan[-1][2] in (SIGKILL, SIGTERM, SIGINT) else 1
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"{len(plan)} runs to be disturbed, seed {args.seed}, in {folder}")
    with rh.progress_bar(expected, "faults", " faults") as bar:
        tally, problems = throw(plan, args.seed, folder, bar)
    print("fault | script | times tried | times survived | data lost\n--- | --- | --- | --- | ---")
    for (name, job), counts in sorted(tally.items()):
        print(f"{name} | {job} | {' | '.join(map(str, counts))}")
    print("together | | " + " | ".join(str(sum(counts[i] for counts in tally.values())) for i in range(3)))
    print("\n".join(problems))
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
