"""Files of weights and of runs: atomic writing, what is saved, and reading it back."""

import argparse
import contextlib
import csv
import io
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import filelock
import torch

from run_helpers import RANK, UserError, describe_machine, first_line


# ---- Atomic files --------------------------------------------------------------------
@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file that appears under `path` whole or not at all.

    It is written beside `path`, synced and renamed, so a kill or a full disk leaves
    what was there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    options = {}
    if "b" not in mode:
        # Linux allows any bytes in a file name, and some of our tables hold names.
        options = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    try:
        with open(part, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:
            # A write to a full disk does not say which file it was.
            error.filename = str(path)
        raise


def atomic_save(content, path):
    """torch.save to a file that appears whole or not at all."""
    # By way of memory: on a full disk, torch's own writer fails with a RuntimeError
    # that looks like a bug; a plain write fails with an OSError.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def read_torch_file(path):
    """What torch.save wrote, on the CPU: nothing but tensors and plain values."""
    try:
        if zipfile.is_zipfile(path):
            # torch.load does not look at the checksums of the archive's members.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        # The checkpoints of many projects hold the arguments of the run, too.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError, MemoryError):
        # The content is not to blame for these: run_script() words them.
        raise
    except Exception as error:
        if "Unsupported global" in str(error):
            raise UserError(
                f"{path} holds more than tensors",
                "load it yourself, and save its state_dict",
            ) from None
        # Arbitrary bytes make zipfile and the unpickler raise almost anything.
        raise UserError(
            f"{path} is damaged or was not written by torch.save ({first_line(error)})",
            "use another copy",
        ) from None


@contextlib.contextmanager
def explain_mismatch(path, advice):
    """Inside, the content of a file is used; if it does not fit, one line says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, but the file is not to blame for it
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        # torch lists every missing key of a state dict: the beginning is enough.
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} does not fit this run ({type(error).__name__}: {reason})",
            advice,
        ) from None


def cpu_state_dict(module):
    """A copy of a module's state dict on the CPU, which loads on any machine."""
    return {name: value.cpu().clone() for name, value in module.state_dict().items()}


# ---- The files of a run --------------------------------------------------------------
@dataclass
class TrainingState:
    """How far a run has come. With this, its loop goes on where it was left."""

    device: torch.device
    epoch: int = 1  # the epoch under way
    step: int = 0  # how many of that epoch's steps are done
    seconds: float = 0.0  # the time that these steps have taken
    history: list = field(default_factory=list)  # a dict per finished epoch

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


# Paths and devices belong to the machine, --resume to the command: a resumed run takes
# them from its own command line. All but images_on may differ between ranks.
NEVER_RESTORED = {
    "data_dir",
    "weights_dir",
    "observations_dir",
    "neighbours",
    "device",
    "images_on",
    "resume",
}
# What a resumed run of either script may change. Any other flag that differs from the
# checkpoint's is refused, so a new flag is refused unless someone allows it.
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
    # Ranks that place their images differently would wait for one another for ever.
    for name in NEVER_RESTORED - {"images_on"}:
        settings.pop(name, None)
    return settings


class Experiment:
    """The files of one experiment, held by one job at a time. Rank 0 alone writes."""

    def __init__(self, args, kind):
        """kind: what the checkpoints call themselves."""
        self.kind = kind
        self.name = args.experiment_name
        self.model_file = args.weights_dir / f"{self.name}.pt"  # the finished model
        self.checkpoint_file = args.weights_dir / f"{self.name}.ckpt"  # for --resume
        self.observations_dir = args.observations_dir
        self.history_file = self.observation("observations.csv")  # a row per epoch
        self.locks = []  # kept here: a lock that nobody refers to is released
        if RANK == 0:
            # Another run of this name may have only one of the folders in common.
            folders = (args.weights_dir, args.observations_dir)
            for folder in {os.path.realpath(folder) for folder in folders}:
                self.lock(Path(folder))

    def observation(self, ending):
        """The path of <experiment>_<ending> in the folder of tables and pictures."""
        return self.observations_dir / f"{self.name}_{ending}"

    def lock(self, folder):
        """Hold the experiment's name in a folder for as long as this object lives."""
        folder.mkdir(parents=True, exist_ok=True)
        # One lock per process, so that a notebook may call main() again after an error.
        path = folder / f".{self.name}.run.lock"
        lock = filelock.FileLock(path, timeout=0, is_singleton=True, thread_local=False)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"another process is running {self.name}",
                "choose another --experiment-name",
            ) from None
        self.locks.append(lock)

    def open_checkpoint(self, resume, may_replace=False):
        """The content of the checkpoint to go on from, or None for a new run.

        A name that is taken is refused; may_replace: a new run may replace its files.
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
            advice = "go on with it by --resume True, or choose another"
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
        """Parse the arguments again, with the checkpoint's settings as the defaults.

        So a flag that is left out keeps the value that the run had. A flag that is
        given and differs is refused, unless it is among `changeable`. args: as parsed
        without the checkpoint.
        """
        with explain_mismatch(self.checkpoint_file, "choose another --experiment-name"):
            saved = {
                name: value
                for name, value in checkpoint["settings"].items()
                if name in vars(args) and name not in NEVER_RESTORED
            }
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)

        print(f"going on from {self.checkpoint_file}")
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

    def restore(self, checkpoint, checksum, trainer, state):
        """Put a checkpoint's content where it belongs, if it is of the same images."""
        with explain_mismatch(self.checkpoint_file, "use another copy"):
            if checkpoint["checksum"] != checksum:
                raise UserError(
                    f"{self.checkpoint_file} was made from other images",
                    "give the --data-dir that it was made with",
                )
            trainer.load_state_dict(checkpoint)
            state.load_state_dict(checkpoint["training"])

    def save_checkpoint(self, args, checksum, trainer, state):
        """Write all that an exact resume needs."""
        if RANK > 0:
            return
        content = trainer.state_dict()
        content["kind"] = self.kind
        content["settings"] = settings_of(args)
        content["checksum"] = checksum
        content["training"] = state.state_dict()
        atomic_save(content, self.checkpoint_file)

    def export(self, args, parts, state, **facts):
        """Write the finished model: its parts' state dicts, and how they came about."""
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


# ---- Weights to start from -----------------------------------------------------------
PARTS = ("trunk", "head_f", "head_g", "softmax_layer")  # under these names in our files

# Where other projects keep the weights in their checkpoints.
WRAPPERS = ("state_dict", "model", "teacher", "student", "backbone", "net", "network")
# If a file holds two encoders, the one whose name contains such a word is not used:
# MoCo's key encoder, the momentum and target encoders of others, and DINO's student,
# whose teacher is better.
SECOND_ENCODERS = ("encoder_k", "momentum", "key", "target", "student", "ema")
TRUNK_LAYERS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")
# lightly's examples keep torchvision's layers in a Sequential, under these numbers.
SEQUENTIAL_LAYERS = {
    "0": "conv1",
    "1": "bn1",
    "4": "layer1",
    "5": "layer2",
    "6": "layer3",
    "7": "layer4",
}


def read_weights(name, weights_dir):
    """(file, content) of a path, or of a name under the weights folder.

    The file is a model or a checkpoint of the training scripts, or holds another
    project's ResNet. The content is a dict: state dicts under the names in PARTS,
    "settings" ({} of other projects), "from_checkpoint" (True for a .ckpt, whose
    batch-norm statistics are not those of plain images) and, where there are any,
    "kind", "classes" and "history".
    """
    name = os.path.expanduser(name)
    candidates = [
        Path(name),
        weights_dir / name,
        weights_dir / f"{name}.pt",
        weights_dir / f"{name}.ckpt",
    ]
    path = next((path for path in candidates if path.is_file()), None)
    if path is None:
        looked_for = ", ".join(str(path) for path in candidates)
        raise UserError(
            f"there is no model {name} (looked for {looked_for})",
            "check the name",
        )

    content = read_torch_file(path)
    advice = "give a file of these scripts, or of a ResNet under torchvision's names"
    with explain_mismatch(path, advice):
        if "trunk" not in content or "settings" not in content:
            trunk = find_trunk(content)
            return path, {"trunk": trunk, "settings": {}, "from_checkpoint": False}

        weights = {"settings": dict(content["settings"])}
        for key in (*PARTS, "kind", "classes", "history"):
            if key in content:
                weights[key] = content[key]
        weights["from_checkpoint"] = "training" in content
        if weights["from_checkpoint"]:
            weights["history"] = content["training"]["history"]
        return path, weights


def find_trunk(content):
    """The ResNet in another project's checkpoint, under torchvision's names.

    MoCo, SwAV, DINO, SimCLR, solo-learn, SupContrast, lightly, timm and others wrap the
    network in modules of their own, in DistributedDataParallel or torch.compile: all
    its names begin with theirs, as in module.encoder_q.layer1.0.conv1.weight. What
    comes before the name of the network's first convolution is taken off all names.
    """
    # The state dict may be the whole file, or an entry of it.
    state_dicts = {"": content}
    for key in WRAPPERS:
        if isinstance(content.get(key), dict):
            state_dicts[key] = content[key]

    networks = []  # (where in the file, prefix, state dict)
    for where, state_dict in state_dicts.items():
        state_dict = rename_layers(state_dict)
        for name, value in state_dict.items():
            # Among the layers called conv1, the network's first has 3 input channels.
            if name.endswith("conv1.weight") and value.shape[1:2] == (3,):
                networks.append((where, name.removesuffix("conv1.weight"), state_dict))

    # Of several, leave out those that SECOND_ENCODERS names.
    chosen = networks
    if len(networks) > 1:
        chosen = [network for network in networks if not is_second_encoder(network)]
    if len(chosen) != 1:
        names = [f"{where} {prefix}".strip() for where, prefix, _ in networks]
        raise ValueError(f"it holds {len(networks)} ResNets ({', '.join(names)})")

    where, prefix, state_dict = chosen[0]
    if where:
        print(f'using the entry "{where}" of the file')
    if prefix:
        print(f'using the weights whose names begin with "{prefix}"')
    trunk = {}
    for name, value in state_dict.items():
        short_name = name.removeprefix(prefix)
        layer = short_name.split(".")[0]
        if name.startswith(prefix) and layer in TRUNK_LAYERS:
            trunk[short_name] = value
    return trunk


def is_second_encoder(network):
    where, prefix, _ = network
    return any(word in f"{where}.{prefix}" for word in SECOND_ENCODERS)


def rename_layers(state_dict):
    """The tensors of a state dict, with torchvision's names for the layers.

    For example, lightly's backbone.4.0.conv1.weight is backbone.layer1.0.conv1.weight.
    """
    renamed = {}
    for name, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            continue
        name = name.replace(".shortcut.", ".downsample.")  # SupContrast's name
        # Split off everything up to the last "backbone."; the layer's number follows.
        before, backbone, after = name.rpartition("backbone.")
        number, _, rest = after.partition(".")
        if number in SEQUENTIAL_LAYERS:
            name = f"{before}{backbone}{SEQUENTIAL_LAYERS[number]}.{rest}"
        renamed[name] = value
    return renamed


def model_type_of(trunk):
    """Which --model-type a state dict with torchvision's names is of."""
    if "layer1.0.conv3.weight" in trunk:
        return "res50"
    if "layer1.2.conv1.weight" in trunk:
        return "res34"
    return "res18"


def stem_of(trunk):
    """Which --stem a state dict with torchvision's names is of."""
    kernel = trunk["conv1.weight"].shape[-1]
    return "small" if kernel == 3 else "imagenet"


def load_weights(modules, weights, path):
    """Load the weights that there are into modules, a dict by the names in PARTS."""
    used = [name for name in modules if name in weights]
    flags = "--model-type, --stem and, in pretraining, --pretext and --non-linear-head"
    with explain_mismatch(path, f"give the {flags} that it was made with"):
        for name in used:
            modules[name].load_state_dict(weights[name])

    unused = [name for name in PARTS if name in weights and name not in used]
    note = f"using {', '.join(used)} of {path}"
    if unused:
        note += f", not {', '.join(unused)}"
    print(note)
