"""What a GPU does with this code: its tests, its speed, an epoch of STL-10's size.

    python -m benchmarks.gpu_report

It uses the torch that is installed, and for the tests pytest. Writes
results/gpu_<card>.md, to be pasted into docs/speed.md. A part that fails is named
there, and the rest continues.
"""

import itertools
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch

from benchmarks import throughput
from benchmarks.compare import markdown_table
from runtime.arguments import Parser, bounded
from runtime.devices import choose_device, describe_machine
from runtime.errors import first_line
from runtime.files import atomic_write
from runtime.script import run_script

ROOT = Path(__file__).parent.parent
SPEED_COLUMNS = [
    "batch",
    "precision",
    "network",
    "images/s",
    "time, bare network = 1",
    "peak memory",
    "TFLOP/s",
    "of a matrix product in that precision",
]
EPOCH_COLUMNS = [
    "images",
    "flags",
    "an epoch, seconds",
    "100 epochs, minutes",
    "peak memory",
]


def parse_args(argv=None):
    parser = Parser("What a GPU does with this code: its tests, its speed, an epoch.")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda",
        help="where to measure; cpu is for a trial",
    )
    parser.add_argument(
        "--batch-sizes",
        type=bounded(int, 2),
        nargs="+",
        default=[128, 512],
        help="images per step",
    )
    parser.add_argument(
        "--image-size",
        type=bounded(int, 36, 224),
        default=96,
        help="side of the images in pixels",
    )
    parser.add_argument(
        "--images",
        type=bounded(int, 3),
        default=100_000,
        help="images of the epoch, random ones",
    )
    parser.add_argument(
        "--steps", type=bounded(int, 1), default=48, help="steps in a round"
    )
    # choose_device() asks for it; deterministic operations are slower.
    parser.set_defaults(deterministic=False)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args)
    card = "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    precisions = precisions_of(device)
    networks = ["eager", "compiled"]
    settings = list(itertools.product(args.batch_sizes, precisions, networks))
    print(
        f"{card}: the tests, {len(settings)} measurements of speed and two epochs of "
        f"{args.images} images: on a fast GPU an estimated ten minutes, else longer",
        flush=True,
    )

    file_name = re.sub(r"\W+", "_", f"gpu_{card}")
    report = Report(Path("results") / f"{file_name}.md")
    report.add(f"## {card}\n\n{describe_machine(device)}\n")
    outcome, failure = attempt(run_cuda_tests)
    report.add(f"`tests/test_cuda.py`: {outcome or failure}")

    # A row appears as soon as it is measured, so that a look shows what is under way.
    report.add("\n" + markdown_table([SPEED_COLUMNS]))
    common = ["--device", args.device, "--image-size", str(args.image_size)]
    fastest_speed = 0
    fastest_flags = []
    for batch_size, precision, network in settings:
        flags = ["--batch-size", str(batch_size), "--precision", precision]
        flags += ["--compile", str(network == "compiled")]
        result, failure = attempt(measure_speed, args.steps, [*common, *flags])
        cells = failure
        if result:
            cells = speed_cells(result)
            speed = median(result["speeds"]["training step"])
            if speed > fastest_speed:
                fastest_speed = speed
                fastest_flags = flags
        report.add(f"{batch_size} | {precision} | {network} | {cells}")

    # An epoch with the defaults, and one with what has been the fastest.
    report.add("\n" + markdown_table([EPOCH_COLUMNS]))
    for flags in (["--batch-size", str(args.batch_sizes[0])], fastest_flags):
        cells, failure = attempt(epoch_cells, args.images, [*common, *flags])
        report.add(f"{args.images} | {' '.join(flags)} | {cells or failure}")
    print(f"\nwrote {report.path}")


def precisions_of(device):
    """float32, and the fast one: bf16, or fp16 where a card only emulates bf16."""
    if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        return ["fp32", "bf16"]
    return ["fp32", "fp16"]


class Report:
    """Text that grows part by part; the file has all of it at any time."""

    def __init__(self, path):
        self.path = path
        self.text = ""

    def add(self, part):
        print(part, flush=True)
        self.text += part + "\n"
        with atomic_write(self.path, "w") as file:
            file.write(self.text)


def attempt(measure, *arguments):
    """(what measure() returns, None), or (None, why it failed)."""
    try:
        return measure(*arguments), None
    except Exception as error:  # whatever it is, the rest of the report is of use
        reason = f"failed: {type(error).__name__}: {first_line(error)}"
        return None, reason.replace("|", "/")  # which would be another cell


def run_cuda_tests():
    """The summary of the tests that need a GPU, after the names of those that fail."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command.append("tests/test_cuda.py")
    tests = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    lines = tests.stdout.splitlines()
    if not lines:
        return "not run: there is no pytest (pip install pytest)"
    failed = [line for line in lines[:-1] if line.startswith(("FAILED", "ERROR"))]
    return "; ".join([*failed, lines[-1]])


def measure_speed(steps, flags):
    rounds = ["--rounds", "3", "--steps", str(steps), "--conventional", "False"]
    return throughput.measure(throughput.parse_args([*flags, *rounds]))


def speed_cells(result):
    """What throughput.measure() found of the training step, as cells of the table."""
    speed = median(result["speeds"]["training step"])
    ratio = result["ratios"]["training step"]
    memory = result["memory"]
    rate = result["rate"]
    share = result["share"]
    return f"{speed:.0f} | {ratio:.3f} | {memory:.2f} GiB | {rate:.1f} | {share:.1%}"


def epoch_cells(images, flags):
    """Time of as many steps as an epoch has, without validation, kNN and files."""
    args = throughput.parse_args(flags)
    trainer = throughput.make_trainer(args, images)
    step = throughput.training_step(trainer, args.batch_size)
    seconds, memory = throughput.timed(step, trainer.steps_per_epoch)
    minutes = 100 * seconds / 60
    return f"{seconds:.1f} | {minutes:.1f} | {memory:.2f} GiB"


if __name__ == "__main__":
    run_script(main)
