"""What all scripts share: errors, arguments, devices, random numbers, ranks."""

import argparse
import contextlib
import os
import platform
import re
import shutil
import sys
from pathlib import Path

if not (3, 11, 4) <= sys.version_info < (3, 14):
    version = platform.python_version()
    sys.exit(f"error: this is Python {version}: use Python 3.11.4 to 3.13")

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import distributed
from torch.distributed.nn.functional import all_reduce


# ---- Errors --------------------------------------------------------------------------
class UserError(Exception):
    """Something that the user can solve, and how."""

    def __init__(self, problem, advice):
        super().__init__(f"{problem}: {advice}")


def run_script(main):
    """Call main(). A problem that the user can solve ends in one line.

    A bug keeps its traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # A terminal's encoding may lack the letters of a file name or of a formula.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (open until the process ends)

    try:
        main()
        sys.stdout.flush()
        leave_ranks()
    except UserError as error:
        end(str(error))
    except KeyboardInterrupt:
        end(
            "interrupted: run the same command again; a training script goes on with "
            "--resume True",
            status=130,
        )
    except BrokenPipeError:
        # `| head` has read enough, or Ctrl-C has ended `| tee` as well.
        end(
            "the program that read the output has ended: a training script goes on "
            "from its last checkpoint with --resume True"
        )
    except OSError as error:
        where = error.filename or "the system"
        end(f"{where}: {error.strerror or error}: solve this and run the command again")
    except (MemoryError, RuntimeError) as error:
        reason = first_line(error)
        out_of_memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if out_of_memory or "can't allocate memory" in reason:
            end(
                f"the memory is full ({reason}): choose a smaller --batch-size, "
                "--image-size or --model-type; in pretraining on a GPU, try "
                "--images-on host"
            )
        lost_connection = isinstance(error, distributed.DistError)
        if RANKS > 1 and (lost_connection or "gloo" in str(error)):
            end(
                f"another rank of this job has ended ({reason}): look for its error, "
                "and go on with --resume True"
            )
        raise


def end(line, status=1):
    """End the process with one line on standard error."""
    try:
        sys.stdout.flush()
    except OSError:
        # Its reader has ended, or its disk is full. Python would complain once more
        # when it flushes standard output at its end.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    with contextlib.suppress(OSError):
        print(error_line(line), file=sys.stderr, flush=True)
    if RANKS > 1:
        # The interpreter's own end would wait for ranks that are gone.
        os._exit(status)
    sys.exit(status)


def error_line(text):
    """One line: "error: …", or "error (rank 3): …" where there are several ranks."""
    speaker = f"error (rank {RANK})" if RANKS > 1 else "error"
    return f"{speaker}: {' '.join(text.splitlines())}"


def first_line(error):
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


# ---- Ranks: the processes of one job, started by torchrun ----------------------------
# Clusters leave some of these variables behind; only all four together are a
# launcher's.
LAUNCHED = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
RANK = int(os.environ["RANK"]) if LAUNCHED else 0
RANKS = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1
# The ranks of this node, which share its memory.
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0)) if LAUNCHED else 0
LOCAL_RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if LAUNCHED else 1


def join_ranks(device):
    """Meet the other ranks. NCCL carries tensors on GPUs, gloo those on CPUs."""
    if RANKS == 1:
        return
    if device.type == "cuda":
        distributed.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    else:
        distributed.init_process_group("gloo")


def leave_ranks():
    """Wait for the other ranks and close the connections."""
    if distributed.is_initialized():
        # Without the barrier, the interpreter's end may hang in a closed connection.
        distributed.barrier()
        distributed.destroy_process_group()


def compare_ranks(settings, *facts):
    """Refuse to begin if the ranks, perhaps on several nodes, differ.

    settings: a dict of what the flags say; facts: about what was read from the disk.
    """
    if RANKS == 1:
        return
    everyone = [None] * RANKS
    distributed.all_gather_object(everyone, (settings, facts))

    flags = []
    for name, value in settings.items():
        if any(other[name] != value for other, _ in everyone):
            flags.append(f"--{name.replace('_', '-')}")
    if flags:
        raise UserError(
            f"the ranks have different flags ({', '.join(flags)})",
            "start all of them with the same",
        )
    if any(other != facts for _, other in everyone):
        raise UserError(
            "the ranks have read different files",
            "give a --data-dir and a --weights-dir that all of them see",
        )


def gather_rows(rows, counts):
    """The rows of all ranks in the batch's order; gradients flow back to their owners.

    counts: how many rows each rank has. rows [b, d]: those of this rank; what is beyond
    its count is dropped. Returns [sum(counts), d].
    """
    if RANKS == 1:
        return rows
    # Each rank fills in its own rows and zeros elsewhere; the sum has all of them.
    before = sum(counts[:RANK])
    after = sum(counts[RANK + 1 :])
    return all_reduce(F.pad(rows[: counts[RANK]], (0, 0, before, after)))


# ---- Arguments -----------------------------------------------------------------------
class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds every default but None, which the help text puts into words."""

    def _get_help_string(self, action):
        if action.default is None:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with every default in --help, and one line for a usage error."""

    def __init__(self, description):
        super().__init__(
            description=description,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        self.exit(2, error_line(f"{message}: see {self.prog} --help") + "\n")


def bool_flag(default):
    """Keywords of add_argument for a True or False flag; the flag alone is True."""
    return {
        "type": boolean,
        "nargs": "?",
        "const": True,
        "default": default,
        "metavar": "True|False",
    }


def boolean(text):
    if text.lower() in ("true", "yes", "1"):
        return True
    if text.lower() in ("false", "no", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def bounded(kind, low, high=10**9):
    """An argparse type: an int or a float from `low` to `high`."""

    def number(text):
        try:
            value = kind(text)
        except ValueError:
            expected = "a whole number" if kind is int else "a number"
            problem = f"{text!r} is not {expected}"
            raise argparse.ArgumentTypeError(problem) from None
        if not low <= value <= high:  # never true of NaN
            bounds = f"at least {low} and at most {high}"
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    return number


def non_empty(text):
    """An argparse type. An empty text is often a shell variable that is not set."""
    if not text:
        raise argparse.ArgumentTypeError("it is empty: is a shell variable not set?")
    return text


def file_path(text):
    """An argparse type: a path. The shell does not expand the ~ of --flag=~/folder."""
    return Path(non_empty(text)).expanduser()


def experiment_name(text):
    if not re.fullmatch(r"\w[\w.,+= -]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a plain file name")
    return text


def add_run_arguments(parser, experiment):
    """The flags about files and the machine that both training scripts have."""
    # fmt: off
    add = parser.add_argument_group("files").add_argument
    add("--experiment-name", type=experiment_name, default=experiment,
        help="the name of the files that the run writes")
    add("--data-dir", type=file_path, default=Path("stl10_data"),
        help="the folder with the images")
    add("--weights-dir", type=file_path, default=Path("weights"),
        help="the folder for <experiment>.pt and <experiment>.ckpt")
    add("--observations-dir", type=file_path, default=Path("observations_dir"),
        help="the folder for tables and pictures")
    add("--resume", **bool_flag(False),
        help="whether to go on from <experiment>.ckpt, if it exists")
    add("--checkpoint-minutes", type=bounded(float, 0), default=10.0,
        help="minutes between checkpoints within an epoch")

    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=bounded(int, 0, 2**32 - 1), default=0,
        help="the seed of all random numbers of the run")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto",
        help="auto takes a CUDA GPU if there is one")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="auto takes bf16 on GPUs that have it, else fp32")
    add("--deterministic", **bool_flag(False),
        help="whether a GPU computes the same bits every time, as a CPU does")
    # fmt: on


# ---- Devices -------------------------------------------------------------------------
def choose_device(args):
    """args.device -> torch.device. Sets the process's switches for it."""
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory before it is written, so it need not be filled.
        torch.utils.deterministic.fill_uninitialized_memory = False

    if args.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if args.device == "cuda":
            raise UserError(
                "--device cuda was given, but torch sees no CUDA GPU",
                "use --device cpu, or check the driver",
            )
        if shutil.which("nvidia-smi"):
            print(
                "note: there is an NVIDIA driver, but torch sees no GPU, so the CPU is "
                "used. Most often the driver is older than this torch needs (or, on "
                "Windows, torch is built for CPUs): see the install lines in README.md"
            )
        return torch.device("cpu")

    device = torch.device("cuda", LOCAL_RANK)
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"this node has no GPU for its local rank {LOCAL_RANK}",
            "give torchrun a smaller --nproc-per-node",
        )
    torch.cuda.set_device(device)
    try_kernel(device)
    torch.backends.cudnn.benchmark = not args.deterministic
    # Convolutions in float32 use TF32, which is torch's default; the matrix products of
    # the loss and the memory bank do not.
    return device


def try_kernel(device):
    """Refuse a card that this torch has no kernels for, before images are decoded."""
    try:
        torch.ones(1, device=device).add(1).item()
    except RuntimeError as error:
        if "no kernel image" not in str(error):
            raise
        major, minor = torch.cuda.get_device_capability(device)
        card = (
            f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        )
        raise UserError(
            f"torch {torch.__version__} has no kernels for this card ({card})",
            'pip install "torch==2.6.*" "torchvision==0.21.*"',
        ) from None


def choose_precision(args, device):
    """args.precision -> "fp32", "bf16" or "fp16"."""
    if device.type == "cpu":
        return "fp32" if args.precision == "auto" else args.precision

    # torch also emulates bf16 on older cards, which is slower than float32.
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if args.precision == "bf16" and not has_bf16:
        raise UserError(
            "this GPU has no bf16 arithmetic",
            "use --precision fp16 or fp32",
        )
    if args.precision != "auto":
        return args.precision
    if has_bf16:
        return "bf16"
    print(
        "note: this card has no bf16, so float32 is used; --precision fp16 is about "
        "twice as fast on cards with tensor cores (T4, V100, RTX 20xx)"
    )
    return "fp32"


def autocast(device, precision):
    """The context in which the network runs; memory bank and loss stay in float32."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


def make_scaler(device, precision):
    """The gradient scaler of fp16, whose small gradients would be 0 without it.

    With another precision it does nothing.
    """
    # torch's own first scale, 2¹⁶, overflows in the first steps.
    return torch.amp.GradScaler(
        device.type, init_scale=2.0**12, enabled=precision == "fp16"
    )


def make_optimizer(parameters, lr, weight_decay):
    """SGD with momentum 0.9."""
    parameters = list(parameters)
    optimizer = torch.optim.SGD(
        parameters, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=True
    )
    # If the scaler of fp16 skips the very first step, the fused optimiser leaves its
    # momentum as uninitialised memory. From zeros, a first step is the same.
    for parameter in parameters:
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def to_device(tensor, device):
    """The tensor on the device; the host does not wait until it has arrived."""
    if device.type == "cuda":
        # Only copies from pinned memory are asynchronous.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def describe_machine(device):
    """Where a run takes place, as a line for its record."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        instructions = torch.backends.cpu.get_cpu_capability()
        threads = torch.get_num_threads()
        processor = f"CPU ({platform.machine()}, {instructions}, {threads} threads)"
    packages = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    return f"{processor}, {packages}, Python {platform.python_version()}"


# ---- Random numbers ------------------------------------------------------------------
# One independent stream of random numbers per purpose.
SPLIT = 0
ORDER = 1
VIEWS = 2
NEGATIVES = 3
BANK = 4
INITIAL_WEIGHTS = 5


def derived_seed(*key):
    """A well-mixed seed of 63 bits from whole numbers, such as (seed, VIEWS, epoch)."""
    words = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return int(words[0] >> 1)


def make_generator(device, *key):
    """A torch.Generator that is a function of `key` alone.

    Different kinds of device make different numbers from the same key.
    """
    return torch.Generator(device).manual_seed(derived_seed(*key))
