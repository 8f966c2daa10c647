"""The files of a run: its record, its checkpoint, and how --resume reads it."""

import csv
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import torch

from runtime.devices import describe_machine
from runtime.errors import UserError
from runtime.files import (
    atomic_save,
    atomic_write,
    cpu_state_dict,
    explain_mismatch,
    read_torch_file,
)
from runtime.ranks import RANK

try:
    import fcntl
except ImportError:  # Windows has locks of its own
    fcntl = None


@dataclass
class TrainingState:
    """How far a run has come: everything the loop needs to continue."""

    device: torch.device
    epoch: int = 1  # the epoch under way
    step: int = 0  # how many of that epoch's steps are done
    seconds: float = 0.0  # the time that these steps have taken
    history: list = field(default_factory=list)  # a dict per finished epoch and stage

    def __post_init__(self):
        # Of the epoch under way: sum of the losses, number of correct answers. On the
        # device, so that counting a step does not wait for it.
        self.totals = torch.zeros(2, dtype=torch.float64, device=self.device)

    def averages(self, images):
        """(mean loss, accuracy) of the epoch so far, over this many images."""
        loss, accuracy = (self.totals / images).tolist()
        return loss, accuracy

    def finish_epoch(self, metrics):
        self.history.append(metrics)
        self.epoch += 1
        self.step = 0
        self.seconds = 0.0
        self.totals.zero_()

    def state_dict(self):
        return {
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "totals": self.totals,
            "history": self.history,
        }

    def load_state_dict(self, saved):
        self.epoch = saved["epoch"]
        self.step = saved["step"]
        self.seconds = saved["seconds"]
        self.totals.copy_(saved["totals"])
        self.history = saved["history"]


# ---- Settings ------------------------------------------------------------------------
# Where a resumed run gets a setting from:
#   FROM_COMMAND_LINE  as given now, whatever the checkpoint says;
#   FROM_CHECKPOINT    as it was, whatever is given now;
#   CHANGEABLE         as given now, with a note; as it was if it is left out;
#   all others         as it was; another value is refused.

# Folders and devices belong to the machine, and a copy of a checkpoint may continue
# under another name.
FROM_COMMAND_LINE = {
    "data_dir",
    "weights_dir",
    "observations_dir",
    "experiment_name",
    "neighbours",
    "evaluate",
    "device",
    "images_on",
    "resume",
}
# Those of FROM_COMMAND_LINE in which the ranks of a run must not differ. Ranks that
# place their images differently would wait for one another forever.
SAME_ON_ALL_RANKS = {"images_on", "experiment_name", "resume"}
# A resumed run has its weights already: what the file is called now does not matter.
FROM_CHECKPOINT = {"pirl_model_name"}
# Of both scripts. Each adds some of its own.
CHANGEABLE = {"checkpoint_minutes", "precision"}


def settings_of(args):
    """The arguments as a dict of plain values, which a checkpoint may hold."""
    settings = {}
    for name, value in vars(args).items():
        settings[name] = str(value) if isinstance(value, Path) else value
    return settings


def shared_settings(args):
    """The settings that all ranks of a run must have in common."""
    settings = settings_of(args)
    for name in FROM_COMMAND_LINE - SAME_ON_ALL_RANKS:
        settings.pop(name, None)
    return settings


# ---- The files -----------------------------------------------------------------------
class Experiment:
    """The files of one experiment, held by one job at a time. Rank 0 alone writes."""

    def __init__(self, args, kind):
        """kind: "PIRL checkpoint" or "labelled checkpoint", an entry of the file."""
        self.kind = kind
        self.name = args.experiment_name
        self.model_file = args.weights_dir / f"{self.name}.pt"  # the finished model
        self.checkpoint_file = args.weights_dir / f"{self.name}.ckpt"  # for --resume
        self.observations_dir = args.observations_dir
        self.history_file = self.observation("observations.csv")  # a row per epoch
        self.locks = []  # kept here: a lock that nobody refers to is released
        if RANK == 0:
            # Both are locked: another run of this name may use only one of them.
            folders = (args.weights_dir, args.observations_dir)
            for folder in {os.path.realpath(folder) for folder in folders}:
                self.lock(Path(folder))

    def observation(self, ending):
        """The path of <experiment>_<ending> in the folder of tables and pictures."""
        return self.observations_dir / f"{self.name}_{ending}"

    def lock(self, folder):
        """Hold the experiment's name in a folder for as long as this object lives."""
        folder.mkdir(parents=True, exist_ok=True)
        if not has_locks(folder):
            print(
                f"note: the file system of {folder} has no locks, so nothing prevents "
                f"a second run of the name {self.name} at the same time"
            )
            return
        # One lock per process, so that a notebook may call main() again after an error.
        path = folder / f".{self.name}.run.lock"
        lock = filelock.FileLock(path, timeout=0, is_singleton=True, thread_local=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"another process is running {self.name} in {folder}",
                "choose another --experiment-name",
            ) from None
        self.locks.append(lock)

    def open_checkpoint(self, resume, may_replace=False):
        """The content of the checkpoint to continue from, or None for a new run.

        A name that is taken is refused. may_replace: a new run may replace its files.
        """
        if resume and self.checkpoint_file.exists():
            checkpoint = read_torch_file(self.checkpoint_file)
            kind = "file of unknown kind"
            if isinstance(checkpoint, dict):
                kind = checkpoint.get("kind", kind)
            if kind != self.kind:
                raise UserError(
                    f"{self.checkpoint_file} is a {kind}, not a {self.kind}",
                    "choose another --experiment-name",
                )
            return checkpoint

        files = (self.checkpoint_file, self.model_file, self.history_file)
        taken = [file for file in files if file.exists()]
        if taken and RANK == 0 and not may_replace:
            advice = "continue it with --resume True, or choose another"
            if not self.checkpoint_file.exists():
                advice = f"{self.checkpoint_file} is gone, so choose another"
            raise UserError(
                f"the name {self.name} is taken ({taken[0]})",
                f"{advice} --experiment-name",
            )
        if resume:
            where = self.checkpoint_file
            print(f"there is no {where} yet: starting from the beginning")
        return None

    def restore_settings(self, parser, argv, args, checkpoint, changeable):
        """The arguments of a resumed run; args: as parsed without the checkpoint.

        The command line is parsed again, with the checkpoint's values as defaults. So a
        flag that is left out keeps the value that the run had. A flag that is given and
        differs is refused, unless it is among `changeable`. A flag that is newer than
        the checkpoint had its default then.
        """
        with explain_mismatch(self.checkpoint_file, "choose another --experiment-name"):
            saved = {}
            for name in vars(args):
                if name not in FROM_COMMAND_LINE:
                    default = parser.get_default(name)
                    saved[name] = checkpoint["settings"].get(name, default)

        parser.set_defaults(**saved)
        args = parser.parse_args(argv)
        for name in FROM_CHECKPOINT:
            if getattr(args, name) != saved[name]:
                flag = f"--{name.replace('_', '-')}"
                print(
                    f"note: {flag} is not read: a resumed run has its weights already"
                )
            setattr(args, name, saved[name])

        print(f"continuing from {self.checkpoint_file}")
        refused = []
        for name, before in saved.items():
            now = getattr(args, name)
            if now == before:
                continue
            change = f"--{name.replace('_', '-')} was {before}, is {now}"
            if name in changeable:
                print(f"note: {change}")
            else:
                refused.append(change)
        if refused:
            raise UserError(
                f"{self.checkpoint_file} was made with other settings "
                f"({'; '.join(refused)})",
                "leave the flags out, or choose another --experiment-name",
            )
        return args

    def restore(self, checkpoint, fingerprint, trainer, state):
        """Put a checkpoint's content where it belongs, if it is of the same images.

        fingerprint: see dataset_helpers.fingerprint_of().
        """
        with explain_mismatch(self.checkpoint_file, "use another copy"):
            if checkpoint["checksum"] != fingerprint["checksum"]:
                raise self.other_images(checkpoint, fingerprint)
            trainer.load_state_dict(checkpoint)
            state.load_state_dict(checkpoint["training"])

    def other_images(self, checkpoint, fingerprint):
        """The error that says what differs: the images, or what decoded them."""
        decoders = (checkpoint.get("decoder"), fingerprint["decoder"])
        same_files = checkpoint.get("files") == fingerprint["files"]
        if same_files and decoders[0] != decoders[1]:
            return UserError(
                f"{self.checkpoint_file} was made from these files, but {decoders[0]} "
                f"decoded them, and {decoders[1]} gives other pixels",
                "install the version that it was made with",
            )
        return UserError(
            f"{self.checkpoint_file} was made from other images",
            "give the --data-dir that it was made with",
        )

    def save_checkpoint(self, args, fingerprint, trainer, state):
        """Write all that an exact resume needs."""
        if RANK > 0:
            return
        content = trainer.state_dict()
        content["kind"] = self.kind
        content["settings"] = settings_of(args)
        content["training"] = state.state_dict()
        content.update(fingerprint)  # "checksum", "files" and "decoder" of the images
        atomic_save(content, self.checkpoint_file)

    def export(self, args, parts, state, **facts):
        """Write the finished model: its parts' state dicts, and how they came about."""
        if RANK > 0:
            return
        content = {name: cpu_state_dict(part) for name, part in parts.items()}
        content["kind"] = self.kind.replace("checkpoint", "weights")
        content["settings"] = settings_of(args)
        content["history"] = state.history
        content["machine"] = describe_machine(state.device)
        content.update(facts)
        atomic_save(content, self.model_file)

    def write_history(self, history):
        """All finished epochs as a CSV file, a row each."""
        if RANK > 0 or not history:
            return
        with atomic_write(self.history_file, "w") as file:
            writer = csv.DictWriter(file, history[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(history)


def has_locks(folder):
    """Whether the file system of a folder can lock files; some network ones cannot."""
    if fcntl is None:
        return True
    # No other process has this file, so a failure is the file system's.
    with tempfile.TemporaryFile(dir=folder) as probe:
        try:
            fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True
