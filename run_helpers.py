"""What the scripts share beside data and models: arguments, devices, whole files, checkpoints, the record of a run."""

import argparse
import contextlib
import csv
import errno
import fcntl
import math
import os
import platform
import shutil
import signal
import sys
import time
import warnings
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import distributed


class UserError(Exception):
    """Something that the user can put right. Its text reads "what is wrong: what to do"."""


class Terminated(KeyboardInterrupt):
    """SIGTERM where nothing needs to be finished first."""


def terminated(number, frame):
    raise Terminated


def run_script(main):
    """Call main(); whatever the user can mend ends the script with one line on standard error and status 1."""
    signal.signal(signal.SIGTERM, terminated)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115 (None where the shell has closed it)
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # here, where an error of it gets its line
    except UserError as error:
        end(str(error))
    except KeyboardInterrupt as error:
        end_interrupted(error)
    except torch.OutOfMemoryError:
        end("the GPU's memory is full: choose a smaller --batch-size, or free the card")
    except (OSError, RuntimeError) as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # torch.save puts an error of its own in its place
            end_interrupted(error.__context__)
        reason = storage_error(error)
        if isinstance(error, OSError) and error.filename is None:
            with contextlib.suppress(OSError, ValueError):  # of the output, perhaps: Python would try it again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if reason is None and isinstance(error, OSError) and error.errno:
            reason = f"{error.filename or 'the system'}: {error.strerror}: put that right, and run the command again"
        if isinstance(error, distributed.DistError) or (world_size() > 1 and "gloo/transport" in str(error)):
            reason = "another rank of this job has ended: go on with --resume True and the same command"
        if reason is None:
            raise
        end(reason)


def end_interrupted(error):
    status = 143 if isinstance(error, Terminated) else 130
    end("interrupted: the same command does the rest, for the training scripts with --resume True", status)


def end(line, status=1):
    """End the process with one line on standard error; of several ranks, the first to come here prints its line."""
    if first_to_end():
        print(f"error: {one_line(line)}", file=sys.stderr, flush=True)
    if world_size() > 1:
        os._exit(status)  # the interpreter's own end would wait for ranks that are gone
    sys.exit(status)


def one_line(text):
    """Text from anywhere, such as a name in a hostile file, as one line of what can be printed, and not too long."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)[:2000]


def storage_error(error):
    """The line to show for an error of the storage, or None for any other error."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__  # torch.save reports a failed write as a RuntimeError
    advice = {
        errno.ENOSPC: "make room on that disk; what was written before is intact, and --resume True goes on from there",
        errno.EDQUOT: "your quota is used up; make room, and go on with --resume True",
        errno.EFBIG: "files may not grow that large here (see ulimit -f)",
        errno.EROFS: "choose a folder that can be written",
        errno.EACCES: "choose a folder that you may write to and files that you may read",
        errno.EPERM: "choose a folder that you may write to",
        errno.ENOENT: "make that folder, or name another path",
        errno.ENOTDIR: "a file stands where a folder is needed; name another path",
        errno.EEXIST: "a file stands where a folder is needed; name another path",
        errno.EISDIR: "a folder stands where a file is needed; name another path",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.EPIPE: "whoever read the output has gone; run it again, training with --resume True, for the rest",
        errno.EIO: "the disk reports an error; what was written before is intact",
    }
    if error is None or error.errno not in advice:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror}: {advice[error.errno]}"


# ---------------------------------------------------------------------------------------------------------------------
# Ranks: the processes of one job, started by torchrun
# ---------------------------------------------------------------------------------------------------------------------


def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(device):
    """Meet the other ranks: NCCL carries what is on GPUs, gloo what is on CPUs. Only rank 0 is heard from now on."""
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if world_size() > 1:
        cuda = device.type == "cuda"
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None)


def first_to_end():
    """Whether no other rank has ended with an error before, by a count that the launcher keeps."""
    if world_size() == 1:
        return True
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
        return store.add(f"ended {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return rank() == 0


# ---------------------------------------------------------------------------------------------------------------------
# Arguments
# ---------------------------------------------------------------------------------------------------------------------


class HelpWithDefaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to each flag's help, unless the text tells it already."""

    def _get_help_string(self, action):
        told = "default:" in action.help or action.default is None
        return action.help if told else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with every default in --help, and one line (status 2) for a usage error."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=HelpWithDefaults, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"error: {one_line(message)}: see {self.prog} --help\n" if rank() == 0 else None)

    def add_switch(self, name, default, help):
        self.add_argument(name, type=boolean, nargs="?", const=True, default=default, metavar="True|False", help=help)


def boolean(text):
    """ "True", "yes", "1" or "False", "no", "0", in any case, to bool."""
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in words:
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return words[text.lower()]


def number(kind, low, high=10**9, below=math.inf):
    """An argparse type: an int or float within [low, high], and smaller than `below`."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole' if kind is int else 'a'} number") from None
        if not (low <= value <= high and value < below):
            bound = f"at most {high}" if below == math.inf else f"below {below}"
            raise argparse.ArgumentTypeError(f"{text} must be at least {low} and {bound}")
        return value

    return convert


def experiment_name(text):
    """A name that is a file name and no path, and leaves room for endings; <name>.previous.ckpt is another's file."""
    if not text or text != Path(text).name or text.startswith(".") or text.endswith(".previous"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a plain file name")
    if not text.isprintable() or len(text.encode()) > 200:
        raise argparse.ArgumentTypeError(f"{text!r} must be of letters that can be printed, and of at most 200 bytes")
    return text


def file_to_write(text):
    if Path(text).name in ("", ".."):
        raise argparse.ArgumentTypeError(f"{text!r} names no file")
    return Path(text)


def add_run_arguments(parser, experiment):
    """The flags that both training scripts have."""
    parser.add_argument("--model-type", choices=["res18", "res34", "res50"], default="res18", help="the trunk")
    parser.add_argument("--experiment-name", type=experiment_name, default=experiment, help="names the run's files")
    parser.add_argument("--data-dir", type=Path, default=Path("stl10_data"), help="what stl10_data_load.py wrote")
    parser.add_argument("--weights-dir", type=Path, default=Path("weights"), help="for <experiment>.pt and .ckpt")
    parser.add_argument(
        "--observations-dir", type=Path, default=Path("observations_dir"), help="for the CSV, one row per epoch"
    )
    parser.add_argument(
        "--image-size", type=number(int, 36, 96), default=96, help="pixels; images are scaled to it once, when read"
    )
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of every random number of the run")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    parser.add_argument(
        "--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto: bf16 on cuda, fp32 on cpu"
    )
    parser.add_switch("--resume", False, help="go on from <experiment>.ckpt")
    parser.add_argument(
        "--checkpoint-minutes", type=number(float, 0), default=10.0, help="within an epoch; one is always at its end"
    )
    parser.add_switch(
        "--deterministic", False, help="on cuda: the same bits every time, slower; a cpu does that anyway"
    )


def note_incomplete(data_dir):
    """Say so if the loader has not finished its work in this folder: a part of STL-10 trains without complaint."""
    if not (data_dir / ".complete.json").exists():
        print(f"note: stl10_data_load.py has not completed {data_dir}; using the images that are there")


def settings_of(args):
    """The arguments as a dict of plain values, which a checkpoint may hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


# ---------------------------------------------------------------------------------------------------------------------
# Devices and random numbers
# ---------------------------------------------------------------------------------------------------------------------


def choose_device(args):
    """args.device -> torch.device; sets the process's numeric switches for it."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but torch sees no CUDA GPU: use --device cpu, or check the driver")
    device = torch.device("cpu")
    if args.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(f"there is no GPU for rank {device.index}: give torchrun a smaller --nproc-per-node")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = not args.deterministic
        # Convolutions in float32 use TF32, which is torch's default; the products of loss and bank do not.
    if args.deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
    return device


def machine(device):
    """Where a run took place, for its record: plain strings and numbers."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
        "python": platform.python_version(),
    }


def choose_precision(args, device):
    """args.precision -> "fp32" or "bf16"."""
    able = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if args.precision == "bf16" and not able:
        raise UserError("this GPU has no bf16 arithmetic: use --precision fp32")
    return args.precision if args.precision != "auto" else ("bf16" if device.type == "cuda" and able else "fp32")


def autocast(device, precision):
    """The context in which the network runs. The memory bank and the loss stay outside, in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


# One independent stream of random numbers per purpose.
SPLIT, ORDER, VIEWS, NEGATIVES, BANK, INITIAL_WEIGHTS = range(6)


def derived_seed(*key):
    """A well-mixed seed of 63 bits from whole numbers, such as (seed, VIEWS, epoch, step)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def generator(device, *key):
    """A torch.Generator that is a function of `key` alone."""
    return torch.Generator(device).manual_seed(derived_seed(*key))


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def whole_file(path, mode="wb"):
    """Open a file that appears under `path` whole or not at all: written beside, synced, renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    try:
        with open(part, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_text(path, most=2**20):
    """A small text file; one of more than `most` bytes is refused."""
    if not path.is_file():  # a pipe would not end
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with open(path, "rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UserError(f"{path} has more than {most} bytes: put the right file there")
    return content.decode(errors="replace")


def sync_folder(folder):
    """Make the names in `folder` durable, as fsync makes a file's content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(folder, needed, there=0):
    """Refuse to begin what will write `needed` bytes to a folder's disk, of which `there` bytes are there already."""
    free = shutil.disk_usage(folder).free
    if needed - there > free:
        raise UserError(
            f"{folder} has {free / 1e6:.0f} MB of free disk, and {(needed - there) / 1e6:.0f} MB more will be written: "
            "make room, or choose another folder"
        )


class Experiment:
    """The files of one experiment, held by one process (or job) at a time; of several ranks, rank 0 writes.

    <weights-dir>/<name>.pt is the finished model, <name>.ckpt (and <name>.previous.ckpt, the one before it) what
    --resume needs, <observations-dir>/<name>_observations.csv a row per epoch.
    """

    def __init__(self, args, kind):
        self.name, self.kind, self.damaged = args.experiment_name, kind, False
        self.model = args.weights_dir / f"{self.name}.pt"
        self.checkpoint = args.weights_dir / f"{self.name}.ckpt"
        self.previous = args.weights_dir / f"{self.name}.previous.ckpt"
        self.observations = args.observations_dir / f"{self.name}_observations.csv"
        if rank():
            return
        self.locks, folders = [], [args.weights_dir, args.observations_dir]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        for folder in {folder.resolve() for folder in folders}:  # closed, and so unlocked, with the process
            self.locks.append((folder / f".{self.name}.run.lock").open("w"))
            try:
                fcntl.flock(self.locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is running the experiment {self.name}: wait for it, or choose another "
                    "--experiment-name"
                ) from None
            except OSError as error:
                raise UserError(f"{folder} cannot hold a lock ({error.strerror}): choose another folder") from None

    def files(self):
        return [f for f in (self.model, self.checkpoint, self.previous, self.observations) if f.exists()]

    def refuse_taken_name(self, resume):
        if rank() == 0 and (files := self.files()):
            way = f"move it away, for {self.checkpoint} is gone" if resume else "go on with it by --resume True"
            raise UserError(
                f"the name {self.name} is taken ({files[0]} exists): {way}, or choose another --experiment-name"
            )

    def check_space(self, model, optimizer_copies, further):
        """Refuse to begin if the disk cannot take the run's files: model, checkpoint, the one before, the next one."""
        if rank():
            return
        size = sum(value.nbytes for value in model.state_dict().values())
        files = [file for file in self.files() if file != self.observations]
        check_space(
            self.model.parent,
            size + 3 * (size * (1 + optimizer_copies) + further),
            sum(file.stat().st_size for file in files),
        )

    def save_checkpoint(self, state):
        """Write `state`, read it back, and only then let it take the last checkpoint's place, which is kept."""
        if rank():
            return
        part = self.checkpoint.with_name(f".{self.name}.ckpt.new")
        with whole_file(part) as file:
            torch.save({"kind": self.kind, **state}, file)
        if reason := damage(part):
            part.unlink()
            raise UserError(f"{self.checkpoint} read back damaged ({reason}): check the disk; the last one is kept")
        if self.checkpoint.exists() and not self.damaged:
            os.replace(self.checkpoint, self.previous)
        os.replace(part, self.checkpoint)
        self.damaged = False
        sync_folder(self.checkpoint.parent)

    def save_first(self, state):
        """Begin anew under this name: what an earlier run left is no checkpoint of this one."""
        self.save_checkpoint(state)
        if rank() == 0:
            self.previous.unlink(missing_ok=True)

    def load_checkpoint(self, settings, may_differ):
        """The newest checkpoint that is whole, or None if there is none; refuses one of other settings."""
        state, problem = None, None
        for path in (self.checkpoint, self.previous):
            if path.is_file():
                try:
                    state = read_torch_file(path, self.kind)
                    break
                except UserError as error:
                    problem = error
        if state is None and problem:
            raise problem
        self.damaged = problem is not None  # then the one before must not give way to it
        if self.damaged and rank() == 0:
            print(one_line(f"warning: {problem}; going on from {path}, the one before"), file=sys.stderr)
        if state is not None:
            then = state["settings"]
            differ = [
                f"--{name.replace('_', '-')} was {then.get(name)}, is {value}"
                for name, value in settings.items()
                if name not in may_differ and then.get(name) != value
            ]
            if differ:
                raise UserError(
                    f"{path} was made with other settings ({'; '.join(differ)}): use the same, or start another "
                    "--experiment-name"
                )
        return state

    def write_rows(self, rows):
        """All epochs so far, a dict each, as the CSV."""
        if rank() or not rows:
            return
        with whole_file(self.observations, "w") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def damage(path):
    """What is wrong with a file that torch.save wrote, by the checksums in it; None if it is whole."""
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                return "compressed members"  # torch.save never writes them; they could hide any amount of memory
            member = archive.testzip()
            return member and f"wrong checksum of {member}"
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, RuntimeError) as error:
        return str(error) or type(error).__name__


def read_torch_file(path, kind):
    """A dict that one of the scripts wrote with torch.save, on the CPU. `kind` is what it must call itself."""
    try:
        reason = damage(path)
        with warnings.catch_warnings(action="ignore"):  # of odd kinds of tensors, which are refused below
            state = None if reason else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the name") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder: name a file that pirl_stl_train_test.py wrote") from None
    except Exception as error:  # arbitrary bytes make the unpickler raise almost anything
        reason = str(error).split("\n")[0] or type(error).__name__
    if reason:
        raise UserError(f"{path} is damaged or no file of torch.save ({reason}): use another copy")
    if not isinstance(state, dict) or state.get("kind") != kind:
        raise UserError(f"{path} is not a {kind} file of this project: name one that is")
    if odd := oddity(state):
        raise damaged(path, odd)
    check_fields(state, {"settings": {str: str | int | float | None}}, path)
    return state


def oddity(state):
    """What a file holds that none of ours does, beside plain values and dense tensors on the CPU; None if nothing."""
    left, seen = [state], set()
    while left:  # no recursion: it may be nested deeply, or a thousand times the same
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple):
            left += value
        elif isinstance(value, torch.Tensor):
            dense = value.layout == torch.strided and value.device.type == "cpu" and not value.requires_grad
            if not dense or value.dtype not in (torch.float32, torch.int64, torch.bool):
                return f"an odd tensor, {value.layout}, {value.dtype}, {value.device}"
        elif not isinstance(value, str | int | float | None) or (isinstance(value, int) and abs(value) >= 2**63):
            return f"a {type(value).__name__}"
    return None


def check_fields(state, expected, path):
    """Refuse a file of ours in which a field is missing or not as expected: see fits()."""
    for name, what in expected.items():
        if not fits(state.get(name), what):
            raise damaged(path, name)


def fits(value, what):
    """Whether a value from a file is as expected.

    what: a type (a float must be finite) or None; torch.Size for a tensor of finite numbers of that shape; (a, b) for
    a tuple or list of such members; [a] for a list of any length; {str: a} for a dict with any names, {"name": a, …}
    for one with at least these.
    """
    if isinstance(what, torch.Size):
        return isinstance(value, torch.Tensor) and value.shape == what and bool(value.isfinite().all())
    if isinstance(what, tuple):
        good = isinstance(value, list | tuple) and len(value) == len(what)
        return good and all(map(fits, value, what))
    if isinstance(what, list):
        return isinstance(value, list) and all(fits(each, what[0]) for each in value)
    if isinstance(what, dict):
        if not isinstance(value, dict):
            return False
        if str in what:
            return all(isinstance(name, str) and fits(each, what[str]) for name, each in value.items())
        return all(fits(value.get(name), each) for name, each in what.items())
    if what is float:
        return isinstance(value, float) and math.isfinite(value)
    return value is None if what is None else isinstance(value, what)


def check_position(state, steps, path):
    """Refuse a checkpoint whose epoch or step cannot be."""
    if not (state["epoch"] >= 1 and 0 <= state["step"] <= steps):
        raise damaged(path, "its position")


def check_rows(rows, columns, path):
    """Refuse rows of a CSV with other columns, or with anything but numbers and the names of stages in them."""
    try:
        for row in rows:
            values = [row[name] for name in columns if row[name] not in (None, "", "softmax", "full")]
            if list(row) != columns or not all(fits(value, str | int | float) for value in values):
                raise ValueError
            list(map(float, values))  # a validation loss may be infinite
    except (ValueError, TypeError, LookupError):
        raise damaged(path, "rows") from None


def damaged(path, name):
    return UserError(f"{path} is damaged ({name} is not what it should be): use another copy")


def load_optimizer(optimizer, state, path):
    """Give SGD the momentum and learning rates of a checkpoint, if they fit; its other settings are this run's own."""
    try:
        for group, then in zip(optimizer.param_groups, state["param_groups"], strict=True):
            if not fits(then["lr"], float):
                raise ValueError
            group["lr"] = then["lr"]
            for parameter, index in zip(group["params"], then["params"], strict=True):
                momentum = state["state"].get(index, {}).get("momentum_buffer")
                if momentum is not None:
                    if not fits(momentum, parameter.shape):
                        raise ValueError
                    optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError):
        raise damaged(path, "its optimiser's state") from None


def find_weights(name, weights_dir):
    """The file that a user means by a path, or by a name under the weights folder."""
    tried = [Path(name), weights_dir / name, weights_dir / f"{name}.pt"]
    for path in tried:
        if path.is_file():
            return path
    raise UserError(f"there is no model {name} (looked for {', '.join(map(str, tried))}): check the name")


def cpu_state(module):
    """A copy of a module's state dict on the CPU, which loads on any machine."""
    return {name: value.cpu().clone() for name, value in module.state_dict().items()}


def load_weights(module, state, path):
    """Load a state dict into a module; one line instead of torch's page if names or shapes do not fit."""
    own = module.state_dict()
    if not isinstance(state, dict) or state.keys() != own.keys():
        raise UserError(f"{path} is of another architecture: give the --model-type and --non-linear-head of that run")
    for name, value in own.items():
        if not isinstance(state[name], torch.Tensor) or state[name].shape != value.shape:
            raise UserError(
                f"{name} in {path} has another shape: give the --model-type and --stem that it was made with"
            )
        if not fits(state[name], value.shape):
            raise damaged(path, name)
    module.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# While it runs
# ---------------------------------------------------------------------------------------------------------------------


class StopSignal:
    """SIGTERM and Ctrl-C ask the loop to stop at its next step; a second one ends the process at once.

    Of several ranks, each may get the same signal twice at first: as all processes of the job, and from the launcher.
    """

    def __init__(self):
        self.number, self.since = None, None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        if self.since is None:
            self.number, self.since = number, time.monotonic()
        again = time.monotonic() - self.since > 2
        if world_size() == 1 or again:
            for each in (signal.SIGTERM, signal.SIGINT):
                signal.signal(each, signal.SIG_DFL)
        if again:
            signal.raise_signal(number)


def epoch_means(statistics, images, model, where, advice, experiment):
    """(mean loss, share of hits) of an epoch so far; ends the run if a number, or a weight of the model, is not finite.

    statistics [steps done, 2] holds each step's sum of losses and number of hits, together of `images` images. Waits
    for the device.
    """
    done = statistics.cpu()
    bad = (~done.isfinite()).any(1).nonzero().flatten().tolist()
    if not torch.stack([value.isfinite().all() for value in model.state_dict().values()]).all():
        bad.append(len(done) - 1)
    if bad:
        there = experiment.checkpoint.exists()
        kept = f"the last checkpoint, {experiment.checkpoint}, is good" if there else "no checkpoint yet"
        raise UserError(f"the loss is not finite in {where}, step {bad[0] + 1}: {advice} ({kept})")
    return (done.double().sum(0) / images).tolist()


class Ticker:
    """due() is True at most once in `seconds`: for what must not be done at every step."""

    def __init__(self, seconds):
        self.seconds, self.last = seconds, time.monotonic()

    def due(self):
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True
