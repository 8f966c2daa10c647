"""What the scripts share beside data and models: one-line errors, ranks, arguments, devices, random numbers, whole
files, and the record of a run. Nothing here knows about pictures. Import it before torch."""

import argparse
import contextlib
import csv
import io
import math
import os
import platform
import re
import signal
import sys
import time
import zipfile
from datetime import timedelta
from pathlib import Path

if sys.version_info < (3, 11, 4):
    sys.exit("error: this is Python " + platform.python_version() + ": use Python 3.11.4 or newer, up to 3.13")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # idle threads leave their cores to other programs; read by torch

import filelock
import numpy as np
import torch
import torchvision
from torch import distributed
from tqdm import tqdm


class UserError(Exception):
    """Something that the user can solve. Its text reads "what is wrong: what to do"."""


def run_script(main):
    """Call main(). What the user can solve ends in one line on standard error; a bug keeps its traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # signs that the terminal's encoding lacks
    try:
        main()
        leave_ranks()
    except UserError as error:
        end(str(error))
    except KeyboardInterrupt:
        end("interrupted: run the same command again; a training script goes on with --resume True", 130)
    except OSError as error:
        end(f"{error.filename or 'the system'}: {error.strerror or error}: solve this and run the command again")
    except (MemoryError, RuntimeError) as error:
        reason = first_line(error)
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in reason:
            end(f"the memory is full ({reason}): choose a smaller --batch-size, --image-size or --model-type")
        if RANKS > 1 and (isinstance(error, distributed.DistError) or "gloo" in str(error)):
            end(f"another rank of this job has ended ({reason}): look for its error, and go on with --resume True")
        raise


def end(line, status=1):
    """End the process with one line on standard error; of several ranks, the first to come here prints its line."""
    first = RANK == 0
    if RANKS > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends the other ranks: it must not cut the line off
        with contextlib.suppress(KeyError, RuntimeError):  # the launcher's store counts the ranks that have ended
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=5))
            first = store.add(f"ended {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", 1) == 1
    if first:
        print("error:", " ".join(line.splitlines()), file=sys.stderr, flush=True)
    if RANKS > 1:
        os._exit(status)  # the interpreter's own end would wait for ranks that are gone
    sys.exit(status)


def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]


# ---- Ranks: the processes of one job, started by torchrun ------------------------------------------------------------
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def join_ranks(device):
    """Meet the other ranks. NCCL carries tensors on GPUs, gloo those on CPUs. Only rank 0 prints from now on."""
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if RANKS > 1:
        cuda = device.type == "cuda"
        distributed.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None)


def leave_ranks():
    """Wait for the other ranks and close the connections, or the interpreter's end may hang in them."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def same_on_all_ranks(*numbers):
    """Refuse to begin if the ranks, on several nodes perhaps, have read other images or another checkpoint."""
    of_all = [numbers] * RANKS
    if RANKS > 1:
        distributed.all_gather_object(of_all, numbers)
    if len(set(of_all)) > 1:
        raise UserError("the ranks have read different files: give a --data-dir and --weights-dir that all of them see")


# ---- Arguments -------------------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """argparse with every default in --help, and one line for a usage error."""

    def __init__(self, about):
        super().__init__(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False)

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.splitlines())}: see {self.prog} --help\n" if RANK == 0 else None)


def switch(default):
    """Keywords of add_argument for a flag that takes True or False; the flag alone means True."""
    return {"type": boolean, "nargs": "?", "const": True, "default": default, "metavar": "True|False"}


def boolean(text):  # argparse makes "invalid boolean value" of a ValueError
    return ("true", "yes", "1", "false", "no", "0").index(text.lower()) < 3


def between(kind, low, high=10**9):
    """An argparse type: an int or a float within [low, high]."""

    def number(text):  # argparse shows this name
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} must be at least {low} and at most {high}")
        return value

    return number


def experiment_name(text):
    if not re.fullmatch(r"\w[\w.,+= -]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a plain file name")
    return text


def add_run_arguments(parser, experiment):
    """The flags about files and the machine that both training scripts have."""
    add = parser.add_argument_group("files").add_argument
    add("--experiment-name", type=experiment_name, default=experiment, help="the name of the files that the run writes")
    add("--data-dir", type=Path, default=Path("stl10_data"), help="the folder with the images")
    add("--weights-dir", type=Path, default=Path("weights"), help="the folder for <experiment>.pt and .ckpt")
    add("--observations-dir", type=Path, default=Path("observations_dir"), help="the folder for tables and pictures")
    add("--resume", **switch(False), help="whether to go on from <experiment>.ckpt, if it exists")
    add("--checkpoint-minutes", type=between(float, 0), default=10.0, help="minutes between checkpoints in an epoch")
    add = parser.add_argument_group("machine").add_argument
    add("--seed", type=between(int, 0, 2**32 - 1), default=0, help="the seed of all random numbers of the run")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto takes a CUDA GPU if there is one")
    add("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="auto takes bf16 on GPUs that have it")
    add("--deterministic", **switch(False), help="whether a GPU computes the same bits every time, as a CPU does")


def settings_of(args):
    """The arguments as a dict of plain values, which a checkpoint may hold."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}


# ---- Devices and random numbers --------------------------------------------------------------------------------------
def choose_device(args):
    """args.device -> torch.device. Sets the process's switches for it."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda was given, but torch sees no CUDA GPU: use --device cpu, or check the driver")
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
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory
    return device


def choose_precision(args, device):
    """args.precision -> "fp32" or "bf16"."""
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if args.precision == "bf16" and device.type == "cuda" and not fast:
        raise UserError("this GPU has no bf16 arithmetic: use --precision fp32")
    return args.precision if args.precision != "auto" else "bf16" if fast else "fp32"


def autocast(device, precision):
    """The context in which the network runs. The memory bank and the loss stay outside, in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def machine(device):
    """Where a run takes place, as a line for its record."""
    cpu = f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads)"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    packages = f"torch {torch.__version__}, torchvision {torchvision.__version__}"
    return f"{name}, {packages}, Python {platform.python_version()}"


# One independent stream of random numbers per purpose.
SPLIT, ORDER, VIEWS, NEGATIVES, BANK, INITIAL_WEIGHTS = range(6)


def derived_seed(*key):
    """A well-mixed seed of 63 bits from whole numbers, such as (seed, VIEWS, epoch)."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def generator(device, *key):
    """A torch.Generator that is a function of `key` alone. Another kind of device makes other numbers of it."""
    return torch.Generator(device).manual_seed(derived_seed(*key))


# ---- Files -----------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def whole_file(path, mode="wb"):
    """Open a file that appears under `path` whole or not at all: written beside it, synced, renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        text = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape"}
        with open(part, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:
            error.filename = str(path)  # a write to a full disk does not name it
        raise


def save_whole(state, path):
    """torch.save, whole or not at all. By way of memory, so that a full disk is an OSError and nothing else."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with whole_file(path) as file:
        file.write(buffer.getbuffer())


def read_torch_file(path):
    """What torch.save wrote, on the CPU. A damaged file is refused: torch does not look at the checksums in it."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if member := archive.testzip():
                    raise ValueError(f"the checksum of {member} is wrong")
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # arbitrary bytes make zipfile and the unpickler raise almost anything
        reason = first_line(error)
        raise UserError(f"{path} is damaged or was not written by torch.save ({reason}): use another copy") from None


@contextlib.contextmanager
def fitting(path, advice):
    """Inside, the content of a file is given to the run. What does not fit it is one line instead of torch's page."""
    try:
        yield
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit this run ({type(error).__name__}: {reason}): {advice}") from None


def cpu_state(module):
    """A copy of a module's state dict on the CPU, which loads on any machine."""
    return {name: value.cpu().clone() for name, value in module.state_dict().items()}


# What a resumed run of either script may change.
MAY_DIFFER = {"data_dir", "weights_dir", "observations_dir", "device", "resume", "checkpoint_minutes", "precision"}


class Experiment:
    """The files of one experiment, held by one job at a time. Of several ranks, rank 0 alone writes."""

    def __init__(self, args, kind):
        """kind: what the checkpoints call themselves."""
        self.args, self.kind, self.name, self.locks = args, kind, args.experiment_name, []
        self.model_file = args.weights_dir / f"{self.name}.pt"  # the finished one
        self.checkpoint_file = args.weights_dir / f"{self.name}.ckpt"  # what --resume needs
        self.observations = args.observations_dir / f"{self.name}_observations.csv"  # a row per epoch
        for folder in {*map(os.path.realpath, (args.weights_dir, args.observations_dir))} if RANK == 0 else ():
            os.makedirs(folder, exist_ok=True)
            self.locks.append(filelock.FileLock(f"{folder}/.{self.name}.run.lock", timeout=0))
            try:
                self.locks[-1].acquire()  # until the process ends, however it ends
            except filelock.Timeout:
                raise UserError(f"another process is running {self.name}: choose another --experiment-name") from None

    def start(self, may_differ, kept, own_name=False):
        """The checkpoint to go on from, or None for a new run. Refuses other settings, and a name that is taken.

        may_differ(checkpoint) names the arguments that may differ from the checkpoint's, kept those that have its value
        unless the user gives them. own_name: a new run may replace the files of this name.
        """
        other = "choose another --experiment-name"
        if not (self.args.resume and self.checkpoint_file.exists()):
            files = [file for file in (self.checkpoint_file, self.model_file, self.observations) if file.exists()]
            if files and RANK == 0 and not own_name:
                way = f"{self.checkpoint_file} is gone" if self.args.resume else "go on with it by --resume True"
                raise UserError(f"the name {self.name} is taken ({files[0]}): {way}, or {other}")
            if self.args.resume:
                print(f"there is no {self.checkpoint_file} yet: starting from the beginning")
            return None
        state = read_torch_file(self.checkpoint_file)
        with fitting(self.checkpoint_file, other):
            if state["kind"] != self.kind:
                raise ValueError(f"it is a {state['kind']}, not a {self.kind}")
            then, free = dict(state["settings"]), may_differ(state)
        for name in kept:
            if getattr(self.args, name) in (None, False, "auto"):
                setattr(self.args, name, then.get(name))
        now = settings_of(self.args)
        changed = {n: f"--{n.replace('_', '-')} was {then.get(n)}, is {now[n]}" for n in now if then.get(n) != now[n]}
        if differ := "; ".join(text for name, text in changed.items() if name not in free):
            raise UserError(f"{self.checkpoint_file} was made with other settings ({differ}): use the same, or {other}")
        print(f"going on from {self.checkpoint_file}", *(f"note: {changed[n]}" for n in kept if n in changed), sep="\n")
        return state

    def load(self, state, checksum, run, progress):
        """Put a checkpoint's content where it belongs, if it is of images with this checksum."""
        with fitting(self.checkpoint_file, "use another copy"):
            if state["checksum"] != checksum:
                raise UserError(f"{self.checkpoint_file} is of other images: give the --data-dir that it was made with")
            run.load_state_dict(state["run"])
            progress.load_state_dict(state["progress"])

    def save(self, checksum, run, progress, **more):
        if RANK == 0:
            state = {"kind": self.kind, "settings": settings_of(self.args), "checksum": checksum, **more}
            save_whole({**state, "run": run.state_dict(), "progress": progress.state_dict()}, self.checkpoint_file)

    def export(self, parts, progress, **more):
        """Write the finished model: the state dicts of its parts, and how they came about."""
        state = {name: cpu_state(part) for name, part in parts.items()} | {"settings": settings_of(self.args)}
        state |= {"kind": self.kind.replace("checkpoint", "weights"), "rows": progress.rows}
        save_whole(state | {"machine": machine(progress.device)} | more, self.model_file)

    def write_rows(self, rows):
        """All epochs so far, a dict each, as the CSV."""
        if RANK == 0 and rows:
            with whole_file(self.observations, "w") as file:
                writer = csv.DictWriter(file, rows[0], lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


def row_of(epoch, train, validation, optimizer, images_per_second=None):
    """An epoch's row of the CSV; train and validation are (loss, accuracy)."""
    means = {"train_loss": train[0], "val_loss": validation[0], "train_acc": train[1], "val_acc": validation[1]}
    speed = {"learning_rate": optimizer.param_groups[0]["lr"], "images_per_second": images_per_second}
    return {"epoch": epoch, **means, **speed}


class Lines(io.TextIOBase):
    """Where tqdm writes if standard error is no terminal: each state of a bar becomes a line of standard output."""

    def write(self, text):
        if text.strip():
            print(text.strip(), flush=True)


def progress_bar(total, what, unit, done=0, **options):
    """A tqdm bar on a terminal, elsewhere a plain line a minute. Of several ranks, rank 0 shows it."""
    if not sys.stderr.isatty():
        options |= {"file": Lines(), "mininterval": 60, "maxinterval": 60, "delay": 60, "ncols": 0}
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=RANK > 0, leave=False, **options)


class Progress:
    """Where a run stands, and the loop over the steps of an epoch with all that happens between two of them."""

    def __init__(self, experiment, run, images, title, advice):
        """images: how many an epoch visits. title: what the bar says. advice: against a loss that is not finite."""
        self.experiment, self.args, self.device, self.model = experiment, experiment.args, run.device, run.model
        self.images, self.title, self.advice = images, title, advice
        self.epoch, self.step, self.seconds = 1, 0, 0.0  # step: how many of the epoch are done, in so many seconds
        self.sums = torch.zeros(math.ceil(images / self.args.batch_size), 2, device=run.device)  # losses, hits, by step
        self.rows = []  # of the CSV
        self.signal, self.saved, self.has_checkpoint = 0, time.monotonic(), False

    def state_dict(self):
        return {name: getattr(self, name) for name in ("epoch", "step", "seconds", "rows", "sums")}

    def load_state_dict(self, state):
        self.epoch, self.step, self.seconds, self.rows = (state[n] for n in ("epoch", "step", "seconds", "rows"))
        self.sums.copy_(state["sums"])
        self.has_checkpoint = True

    def steps(self, batches, save):
        """Yield what is left of an epoch's `batches` of indices, and after each step look at the clock and for signals.

        Calls save() every --checkpoint-minutes, at the end of the epoch unless the last checkpoint is younger than a
        minute, and on SIGTERM or Ctrl-C, which then end the process with status 128 + signal. All ranks agree.
        """
        minutes, shown, begun = self.args.checkpoint_minutes, time.monotonic(), time.monotonic() - self.seconds
        bar = progress_bar(self.images, f"{self.title} {self.epoch}", " images", self.step * self.args.batch_size)
        before = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for index in batches[self.step :]:
                yield index
                self.step += 1
                bar.update(len(index))
                now, at_end = time.monotonic(), self.step == len(batches)
                self.seconds = now - begun
                wait = min(minutes, 1) * self.has_checkpoint if at_end else minutes  # the first is always due
                stop, due = self.agreed(now - self.saved >= 60 * wait, at_end)
                if stop or due:
                    self.means()
                    save()
                    self.saved, self.has_checkpoint = time.monotonic(), True
                if stop:
                    bar.close()
                    print(f"stopped in epoch {self.epoch} after step {self.step}: --resume True goes on from here")
                    leave_ranks()
                    sys.exit(128 + stop)
                if now - shown >= 1:  # reading numbers back waits for the device
                    shown = now
                    bar.set_postfix_str("loss {:.3f}, accuracy {:.1%}".format(*self.means()), refresh=False)
            self.means()  # waits for the device
            self.seconds = time.monotonic() - begun
        finally:
            bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def note(self, number, frame):
        """A signal asks the loop to stop after its step."""
        self.signal = number

    def agreed(self, due, at_end):
        """(number of a signal or 0, whether rank 0 wants a checkpoint): the same on all ranks."""
        if RANKS == 1:
            return self.signal, due
        if self.device.type == "cuda" and self.step % 16 and not at_end:  # the hosts of GPUs need not run in step
            return 0, False
        flags = torch.tensor([self.signal, due and RANK == 0], dtype=torch.int32)
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return flags.tolist()

    def means(self):
        """(mean loss, share of hits) of the epoch so far. Ends the run if a loss or a weight is not finite."""
        done = self.sums[: self.step].cpu()
        finite = done.isfinite().all(1)
        finite[-1:] &= torch.stack([value.isfinite().all() for value in self.model.state_dict().values()]).all().cpu()
        if not finite.all():
            file = self.experiment.checkpoint_file
            kept = f"the last checkpoint, {file}, is good" if file.exists() else "there is no checkpoint yet"
            where = f"{self.title} {self.epoch}, step {finite.tolist().index(False) + 1}"
            raise UserError(f"the loss is not finite in {where}: {self.advice} ({kept})")
        return (done.double().sum(0) / min(self.step * self.args.batch_size, self.images)).tolist()

    def row(self, validation, optimizer):
        """The epoch's row of the CSV; validation is (loss, accuracy)."""
        return row_of(self.epoch, self.means(), validation, optimizer, round(self.images / self.seconds, 1))

    def finish_epoch(self, row):
        """Keep the epoch's row, in the CSV too, and go on to the next epoch."""
        self.rows.append(row)
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.sums.zero_()
        self.experiment.write_rows(self.rows)
