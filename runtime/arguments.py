"""Command lines: the parser, argument types, and the flags of both training scripts."""

import argparse
import os
import re
from pathlib import Path

from runtime.script import error_line


class HelpFormatter(
    argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter
):
    """Adds the defaults; where one is None, the help text says what happens."""

    def _get_help_string(self, action):
        if action.default is None or "default" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with every default in --help, and one line for a usage error."""

    def __init__(self, description, example=None):
        """example: a command line, printed at the end of --help."""
        super().__init__(
            description=description,
            epilog=f"example:\n  {example}" if example else None,
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message):
        self.exit(2, error_line(f"{message}: see {self.prog} --help") + "\n")


# ---- Types of arguments --------------------------------------------------------------
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
    path = Path(non_empty(text))
    try:
        return path.expanduser()
    except RuntimeError:
        # There is no user of that name: so it is a file whose name begins with ~.
        return path


def output_file(text):
    """An argparse type: a file to write. What cannot work is refused before the work.

    A link is followed when the file is written. A folder, a device or a pipe is
    refused.
    """
    path = file_path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder, not a file")
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is not a regular file")

    # The folders that are missing will be made, in the nearest one that exists.
    folder = Path(os.path.realpath(path)).parent
    while not os.path.lexists(folder):
        folder = folder.parent
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{folder} is not writable")
    return path


def experiment_name(text):
    """An argparse type: a name that files may begin with."""
    if not re.fullmatch(r"\w[\w.,+= -]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a plain file name")
    # File systems allow 255 bytes, and our endings need some of them.
    if len(os.fsencode(text)) > 200:
        raise argparse.ArgumentTypeError(f"{text[:20]}… is longer than 200 bytes")
    return text


def device_name(text):
    """An argparse type: auto, cpu, cuda, or cuda:N."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, cpu, cuda or cuda:N")
    return text


# ---- The flags of both training scripts ----------------------------------------------
# fmt: off
def add_run_arguments(parser, name, epochs_help, batch_help, lr, lr_help):
    """What every user sets, first in --help."""
    add = parser.add_argument_group("run").add_argument
    add("--data-dir", type=file_path, default=Path("stl10_data"), metavar="PATH",
        help="folder with the images")
    add("--experiment-name", type=experiment_name, default=name, metavar="NAME",
        help="name of the files that the run writes")
    add("--epochs", type=bounded(int, 1), default=100, metavar="N",
        help=epochs_help)
    add("--batch-size", type=bounded(int, 1), default=128, metavar="N",
        help=batch_help)
    add("--lr", type=bounded(float, 0, 100), default=lr, metavar="RATE",
        help=f"{lr_help}, 0 to 100")
    add("--weight-decay", type=bounded(float, 0, 1), default=5e-4, metavar="X",
        help="weight decay of all weights that are trained, 0 to 1")
    add("--seed", type=bounded(int, 0, 2**32 - 1), default=0, metavar="N",
        help="seed of all random numbers")


def add_trunk_arguments(parser, model_types, from_weights):
    """What the trunk is. from_weights: by default, as the file of weights says."""
    model_type = None if from_weights else "res18"
    stem = None if from_weights else "imagenet"
    side = None if from_weights else 96

    def or_from_file(fallback):
        if not from_weights:
            return ""
        return f"; by default that of --pirl-model-name, else {fallback}"

    add = parser.add_argument_group("network and image size").add_argument
    add("--model-type", choices=model_types, default=model_type,
        help="ResNet-18, -34 or -50" + or_from_file("res18"))
    add("--image-size", type=bounded(int, 36, 224), default=side, metavar="N",
        help="side in pixels to which images are resized and cropped, 36 to 224"
             + or_from_file("96"))
    add("--stem", choices=["imagenet", "small"], default=stem,
        help="small: first convolution of 3 × 3 with stride 1" +
             or_from_file("imagenet"))
    add("--zero-init", **bool_flag(True),
        help="start every residual block of a new trunk as the identity"
             " (zero-initialised last batch norm)")


def add_machine_arguments(parser):
    """The machine. Returns the group, to which a script may add."""
    group = parser.add_argument_group("machine")
    add = group.add_argument
    add("--device", type=device_name, default="auto", metavar="auto|cpu|cuda|cuda:N",
        help="auto: a CUDA GPU if there is one")
    add("--precision", choices=["auto", "fp32", "bf16", "fp16"], default="auto",
        help="auto: bf16 on GPUs that have it, else fp32")
    add("--deterministic", **bool_flag(False),
        help="use deterministic GPU algorithms, so that a run can be repeated bit for"
             " bit; slower")
    return group


def add_file_arguments(parser):
    """Checkpoints and the folders that a run writes to."""
    add = parser.add_argument_group("checkpoints and files").add_argument
    add("--resume", **bool_flag(False),
        help="continue from <experiment>.ckpt if it exists")
    add("--checkpoint-minutes", type=bounded(float, 0), default=10.0, metavar="MINUTES",
        help="time between checkpoints within an epoch")
    add("--weights-dir", type=file_path, default=Path("weights"), metavar="PATH",
        help="folder for <experiment>.pt and <experiment>.ckpt")
    add("--observations-dir", type=file_path, default=Path("observations_dir"),
        metavar="PATH", help="folder for tables and pictures")
# fmt: on
