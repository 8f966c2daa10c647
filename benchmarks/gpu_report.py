"""What a GPU does with this code, in about ten minutes: its tests, its speed, an epoch of STL-10's size.

Writes results/gpu_<card>.md, to be pasted into docs/speed.md. A part that fails is named there, and the rest goes on.
"""

import itertools
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

import run_helpers as rh
import torch

from benchmarks import throughput

SPEED = "batch | precision | network | images/s | time, bare network = 1 | peak memory | TFLOP/s | of a bf16 product"
EPOCH = "images | flags | an epoch, seconds | 100 epochs, minutes | peak memory"


def parse_args():
    parser = rh.Parser(__doc__.split("\n")[0])
    add, between = parser.add_argument, rh.between
    add("--device", choices=["cpu", "cuda"], default="cuda", help="where to measure; cpu is for a trial")
    add("--batch-sizes", type=between(int, 2), nargs="+", default=[128, 512], help="images per step")
    add("--image-size", type=between(int, 36, 224), default=96, help="side of the images in pixels")
    add("--images", type=between(int, 3), default=100_000, help="images of the epoch, random ones")
    add("--steps", type=between(int, 1), default=48, help="steps in a round")
    parser.set_defaults(deterministic=False)
    return parser.parse_args()


def main():
    args = parse_args()
    device, lines = rh.choose_device(args), []
    card = "CPU" if args.device == "cpu" else torch.cuda.get_device_name()
    path = Path("results") / "gpu_{}.md".format(re.sub(r"\W+", "_", card))

    def write(text, part=str, *arguments):
        """Add a text to the report, and what a part of it says or why that has failed. All of it is kept at once."""
        try:
            text += part(*arguments)
        except Exception as error:  # whatever it is, the rest of the report is of use
            text += f"failed: {type(error).__name__}: {rh.first_line(error)}".replace("|", "/")
        print(text, flush=True)
        lines.append(text)
        with rh.whole_file(path, "w") as file:
            file.write("\n".join([*lines, ""]))
        return text.split(" | ")

    write(f"## {card}\n\n{rh.machine(device)}\n\n`tests/test_cuda.py`: ", cuda_tests)
    write(f"\n{SPEED}\n{re.sub('[^|]+', ' --- ', SPEED).strip()}")
    common, fastest = ["--device", args.device, "--image-size", str(args.image_size)], (0, [])
    for batch, precision, network in itertools.product(args.batch_sizes, ("fp32", "bf16"), ("eager", "compiled")):
        flags = ["--batch-size", str(batch), "--precision", precision, "--compile", str(network == "compiled")]
        rate = write(f"{batch} | {precision} | {network} | ", speed, [*common, *flags, "--steps", str(args.steps)])[3]
        fastest = max(fastest, (int(rate), flags)) if rate.isdigit() else fastest
    write(f"\n{EPOCH}\n{re.sub('[^|]+', ' --- ', EPOCH).strip()}")
    for flags in (["--batch-size", str(args.batch_sizes[0])], fastest[1]):
        write(f"{args.images} | {' '.join(flags)} | ", epoch, args.images, [*common, *flags])
    print(f"\nwrote {path}")


def cuda_tests():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, stdout=subprocess.PIPE, text=True)
    lines = done.stdout.splitlines() or ["failed: there is no pytest"]
    return "; ".join([line for line in lines[:-1] if line.startswith(("FAILED", "ERROR"))] + lines[-1:])


def speed(flags):
    result = throughput.measure(throughput.parse_args([*flags, "--rounds", "3", "--conventional", "False"]))
    cells = "{memory:.2f} GiB | {rate:.1f} | {share:.1%}".format(**result)
    return f"{median(result['speeds']['training step']):.0f} | {result['ratios']['training step']:.3f} | {cells}"


def epoch(images, flags):
    """As many steps as an epoch has, after one that does not count, without validation and the like."""
    training = throughput.parse_args(flags).training
    step = throughput.training_step(run := throughput.make_run(training, images), training.batch_size)
    seconds, memory = throughput.timed(step, run.epoch_steps)
    return f"{seconds:.1f} | {seconds / 0.6:.1f} | {memory:.2f} GiB"


if __name__ == "__main__":
    rh.run_script(main)
