"""Weights to start from: our own files, and those of other projects."""

import os
from pathlib import Path
from typing import NamedTuple

import torch

from runtime.errors import UserError
from runtime.files import explain_mismatch, read_torch_file

# The entries of our own files: state dicts, and facts about the run.
PARTS = ("trunk", "head_f", "head_g", "softmax_layer")
FACTS = (
    "kind",
    "classes",
    "class_folders",
    "history",
    "results",
    "full_steps",
    "pixel_mean",
    "pixel_std",
)
# How most other projects normalise RGB in 0 … 1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# If a file holds two encoders, the one whose name contains such a word is not used:
# MoCo's key encoder, the momentum and target encoders of others, and DINO's student,
# whose teacher is better.
SECOND_ENCODERS = ("encoder_k", "momentum", "key", "target", "student", "ema")
DEFAULT_IMAGE_SIZE = 96  # pixels, where a file of weights does not say
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
# (kind of block, blocks per stage) of torchvision's ResNets.
OUR_MODEL_TYPES = {
    ("basic", (2, 2, 2, 2)): "res18",
    ("basic", (3, 4, 6, 3)): "res34",
    ("bottleneck", (3, 4, 6, 3)): "res50",
}
OTHER_RESNETS = {
    ("bottleneck", (3, 4, 23, 3)): "ResNet-101",
    ("bottleneck", (3, 8, 36, 3)): "ResNet-152",
}


# ---- Files ---------------------------------------------------------------------------
def read_weights(name, weights_dir):
    """(file, content) of a path, or of a name under the weights folder.

    The file is a model or a checkpoint of the training scripts, or holds another
    project's ResNet. The content is a dict: state dicts under the names in PARTS,
    "settings" ({} of other projects), "from_checkpoint" (True for a .ckpt, whose
    batch-norm statistics are not those of plain images) and, where the file has them,
    the entries named in FACTS.
    """
    path = find_weights(name, weights_dir)
    if path.suffix == ".safetensors":
        content = read_safetensors(path)
    else:
        content = read_torch_file(path)

    advice = "give a file of these scripts, or of a ResNet under torchvision's names"
    with explain_mismatch(path, advice):
        if "trunk" in content and "settings" in content:
            weights = our_weights(content)
        else:
            weights = their_weights(content)
        check_finite(path, weights)
    return path, weights


def find_weights(name, weights_dir):
    name = os.path.expanduser(name)
    candidates = [
        Path(name),
        weights_dir / name,
        weights_dir / f"{name}.pt",
        weights_dir / f"{name}.ckpt",
    ]
    for path in candidates:
        if path.is_file():
            return path
    looked_for = ", ".join(str(path) for path in candidates)
    raise UserError(
        f"there is no model {name} (looked for {looked_for})",
        "check the name",
    )


def read_safetensors(path):
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(
            f"reading {path} needs a package that is missing",
            "pip install safetensors",
        ) from None
    try:
        return load_file(path)
    except Exception as error:  # the package's own class, where it has one
        raise UserError(
            f"{path} is damaged or not a safetensors file ({error})",
            "use another copy",
        ) from None


def our_weights(content):
    """The weights of a model or of a checkpoint of the training scripts."""
    weights = {"settings": dict(content["settings"])}
    for key in (*PARTS, *FACTS):
        if key in content:
            weights[key] = content[key]
    weights["from_checkpoint"] = "training" in content
    if weights["from_checkpoint"]:
        weights["history"] = content["training"]["history"]
    return weights


def their_weights(content):
    """The weights of another project's file.

    Hardly any says how its images were normalised; benchmarks/equal_time.py's do.
    """
    return {
        "trunk": find_trunk(content),
        "settings": {},
        "from_checkpoint": False,
        "pixel_mean": content.get("pixel_mean", IMAGENET_MEAN),
        "pixel_std": content.get("pixel_std", IMAGENET_STD),
    }


def check_finite(path, weights):
    """Refuse a file with NaN or infinity, which would spoil everything silently."""
    for part in PARTS:
        for name, value in weights.get(part, {}).items():
            if not value.isfinite().all():
                raise UserError(
                    f"{path} has numbers that are not finite ({part}, {name})",
                    "use another file",
                )


def load_weights(modules, weights, path):
    """Load whichever parts the file contains into modules, a dict by names in PARTS."""
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


# ---- Which network a file is of ------------------------------------------------------
class Architecture(NamedTuple):
    """What a file of weights says of its network; image_size: None if it does not."""

    model_type: str
    stem: str
    image_size: int | None


def architecture_of(path, weights):
    """The Architecture of what read_weights() found in the file `path`."""
    settings = weights["settings"]
    if settings:
        return Architecture(
            settings["model_type"], settings["stem"], settings["image_size"]
        )
    with explain_mismatch(path, "give a ResNet-18, -34 or -50 for RGB images"):
        trunk = weights["trunk"]
        return Architecture(model_type_of(trunk), stem_of(trunk), None)


def choose_architecture(args, path, weights):
    """Fill in --model-type, --stem and --image-size where they were left out.

    As the file `path` says, or, without a file ({} for weights), the defaults. A type
    or a stem that is given and contradicts the file is refused; other sizes work.
    """
    if not weights:
        args.model_type = args.model_type or "res18"
        args.stem = args.stem or "imagenet"
        args.image_size = args.image_size or DEFAULT_IMAGE_SIZE
        return

    known = architecture_of(path, weights)
    for name in ("model_type", "stem"):
        given = getattr(args, name)
        found = getattr(known, name)
        if given not in (None, found):
            flag = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{path} is of {flag} {found}, not {given}",
                "leave the flag out",
            )
        setattr(args, name, found)
    args.image_size = choose_image_size(args.image_size, path, known)


def choose_image_size(given, path, architecture):
    """The side in pixels to use: as given, as the file says, or the default."""
    trained = architecture.image_size
    if given is not None and trained not in (None, given):
        print(f"note: {path} was trained with --image-size {trained}, {given} is used")
    if given is None and trained is None:
        print(
            f"note: {path} does not say for which size it was trained: images are "
            f"resized to {DEFAULT_IMAGE_SIZE} pixels (--image-size)"
        )
    return given or trained or DEFAULT_IMAGE_SIZE


def model_type_of(trunk):
    """Which --model-type a state dict with torchvision's names is of."""
    blocks = []
    for stage in (1, 2, 3, 4):
        count = 0
        while f"layer{stage}.{count}.conv1.weight" in trunk:
            count += 1
        blocks.append(count)
    is_bottleneck = "layer1.0.conv3.weight" in trunk
    shape = ("bottleneck" if is_bottleneck else "basic", tuple(blocks))

    channels = trunk["conv1.weight"].shape[1]
    if channels != 3:
        raise ValueError(f"its images have {channels} channels")
    first = trunk["layer1.0.conv1.weight"]  # [width, in, kernel, kernel]
    second = trunk["layer1.0.conv2.weight"]  # [out, width / groups, 3, 3]
    if second.shape[1] != first.shape[0]:
        raise ValueError("it is a ResNeXt, with grouped convolutions")
    if is_bottleneck and first.shape[0] != trunk["conv1.weight"].shape[0]:
        raise ValueError("it is a wide ResNet")
    if shape not in OUR_MODEL_TYPES:
        name = OTHER_RESNETS.get(shape, f"ResNet of {shape[0]} blocks, {blocks}")
        raise ValueError(f"it is a {name}")
    return OUR_MODEL_TYPES[shape]


def stem_of(trunk):
    """Which --stem a state dict with torchvision's names is of."""
    stems = {7: "imagenet", 3: "small"}
    kernel = trunk["conv1.weight"].shape[-1]
    if kernel not in stems:
        raise ValueError(f"its first convolution is {kernel} × {kernel}")
    return stems[kernel]


# ---- Other projects' files -----------------------------------------------------------
def find_trunk(content):
    """The ResNet in another project's checkpoint, under torchvision's names.

    MoCo, SwAV, DINO, SimCLR, solo-learn, SupContrast, lightly, timm and others wrap the
    network in modules of their own, in DistributedDataParallel or torch.compile. Their
    names are prefixes of all names in the state dict, as in
    module.encoder_q.layer1.0.conv1.weight. So what precedes the name of the network's
    first convolution is its prefix, and is removed from all names.
    """
    networks = []  # (where in the file, prefix, state dict)
    for where, state_dict in state_dicts_in(content):
        state_dict = rename_layers(state_dict)
        for name in state_dict:
            prefix = name.removesuffix("conv1.weight")
            # Many layers are called conv1. The network's first stands beside a layer1.
            if prefix != name and f"{prefix}layer1.0.conv1.weight" in state_dict:
                networks.append((where, prefix, state_dict))
    if not networks:
        keys = ", ".join(str(key) for key in list(content)[:10])
        raise ValueError(f"it holds no ResNet; its keys are {keys}")

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


def state_dicts_in(content, where=""):
    """(where in the file, dict) of the file's content and of all dicts inside it."""
    found = [(where, content)]
    for key, value in content.items():
        if isinstance(value, dict):
            found += state_dicts_in(value, f"{where}.{key}" if where else str(key))
    return found


def is_second_encoder(network):
    where, prefix, _ = network
    return any(word in f"{where}.{prefix}" for word in SECOND_ENCODERS)


def rename_layers(state_dict):
    """The tensors of a state dict, with torchvision's names for the layers.

    For example, lightly's backbone.4.0.conv1.weight is backbone.layer1.0.conv1.weight.
    """
    renamed = {}
    for name, value in state_dict.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            continue
        name = name.replace(".shortcut.", ".downsample.")  # SupContrast's name
        # Split off everything up to the last "backbone."; the layer's number follows.
        before, backbone, after = name.rpartition("backbone.")
        number, _, rest = after.partition(".")
        if number in SEQUENTIAL_LAYERS:
            name = f"{before}{backbone}{SEQUENTIAL_LAYERS[number]}.{rest}"
        renamed[name] = value
    return renamed
