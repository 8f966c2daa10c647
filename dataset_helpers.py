"""Image folders to tensors, and splits.

A split is one uint8 tensor [N, 3, S, S] that is decoded once and lives on the training
device, or on the host if that is too small; a batch is rows of it.
"""

import contextlib
import math
import os
import re
import shutil
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torch import distributed
from torchvision.datasets.folder import IMG_EXTENSIONS

from progress import in_threads
from run_helpers import (
    LOCAL_RANK,
    LOCAL_RANKS,
    RANK,
    RANKS,
    SPLIT,
    UserError,
    make_generator,
)

STL10_SIDE = 96  # pixels
# Of the unlabelled images that are not trained on, at most this many are validated on.
VALIDATION_IMAGES = 4096
VALIDATION_SHARE = 0.16  # of the labelled images: 800 of 5,000
# If the longer side is more than this many times the shorter one, the ends are cut off
# before the picture is resized.
MAX_ASPECT = 8
# Bytes that a step needs beside the images: weights and activations.
RESERVED_ON_CARD = 1.5e9
# Bytes per image beside its pixels: a row of the memory bank, and the random numbers of
# its views for two epochs, of which one is drawn while the other is still there.
BYTES_BESIDE_PIXELS = 4 * (128 + 2 * 96)


# ---- Files ---------------------------------------------------------------------------
def natural_key(text):
    """A sorting key by which 2.png comes before 10.png."""
    parts = re.split(r"(\d+)", str(text))
    return [int(part) if part.isdecimal() else part for part in parts], str(text)


def list_images(folder):
    """The paths of all images of a folder; without any, an error. See find_images()."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist",
            "give the folder of your images, or run stl10_data_load.py first",
        )
    images = find_images(folder)
    if not images:
        raise UserError(
            f"{folder} holds no images",
            "give another folder, or run stl10_data_load.py first",
        )
    return images


def find_images(folder):
    """The paths of all images of a folder, at any depth, in natural order.

    Hidden files and folders are skipped. Other files get a note. Links are followed,
    but each real folder is searched once, for a link may lead back to a parent.
    """
    images = []
    others = []
    searched = set()
    folders = [folder]
    while folders:
        current = folders.pop(0)
        real = os.path.realpath(current)
        if real in searched:
            continue
        searched.add(real)
        # An entry knows whether it is a file without a further look at the disk.
        for entry in sorted(os.scandir(current), key=lambda entry: entry.name):
            if entry.name.startswith("."):
                continue
            path = current / entry.name
            if entry.is_dir():
                folders.append(path)
            elif entry.is_file() and path.suffix.lower() in IMG_EXTENSIONS:
                images.append(path)
            else:
                others.append(entry.name)

    if others:
        names = ", ".join(sorted(others)[:3])
        if len(others) > 3:
            names += ", …"
        what = f"{len(others)} files in {folder} are not images and are not used"
        print(f"note: {what} ({names})")
    return sorted(images, key=lambda path: natural_key(path.relative_to(folder)))


def read_image(path, side):
    """An image file of any size, with 8 or 16 bits, as uint8 [3, side, side] RGB.

    It is resized until its shorter side fits, and cropped to its centre.
    """
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):
            # Pillow's own conversion would clip 16 bits at 255 instead of scaling them.
            high_bytes = np.asarray(image) >> 8
            image = Image.fromarray(high_bytes.astype(np.uint8))
        elif image.mode in ("I", "F"):
            # Pillow opens some PNGs of 16 bits as 32 bits. The range of files that do
            # have 32 bits is unknown.
            image = from_32_bits(image)

        shorter = min(image.size)
        longest = MAX_ASPECT * shorter
        if max(image.size) > longest:
            # Resized as a whole, a strip of 20,000 × 1 pixels would take gigabytes.
            width, height = image.size
            crop = (min(height, longest), min(width, longest))
            image = TF.center_crop(image, crop)

        image = TF.resize(image.convert("RGB"), side, TF.InterpolationMode.BICUBIC)
        return np.asarray(TF.center_crop(image, side)).transpose(2, 0, 1)


def from_32_bits(image):
    """A picture of 32-bit numbers as one of 8 bits, if they all fit into 16 bits."""
    values = np.asarray(image)
    if image.mode == "I" and values.min() >= 0 and values.max() < 2**16:
        return Image.fromarray((values >> 8).astype(np.uint8))
    raise ValueError(
        "its pixels are 32-bit numbers of unknown range: save it with 8 bits"
    )


# ---- From files to a tensor ----------------------------------------------------------
def load_images(files, side, device, description, all_ranks=False):
    """(uint8 [N, 3, side, side] on `device`, a CRC-32 of it) of image files, in order.

    all_ranks: every rank calls this. If the images stay on the host, those of a node
    share one copy.
    """
    shape = (len(files), 3, side, side)
    one_copy = all_ranks and device.type == "cpu" and LOCAL_RANKS > 1
    # Images for cards are decoded on the host first, by every rank for itself.
    copies = LOCAL_RANKS if all_ranks and not one_copy else 1
    check_memory(shape, device, copies)

    if one_copy:
        images = node_shared_tensor(shape)
        # Each rank of the node decodes its part: if the others only waited, torch would
        # give up after some minutes.
        part = slice(LOCAL_RANK, None, LOCAL_RANKS)
        decode(files[part], images.numpy()[part], description)
        distributed.barrier()
    else:
        images = torch.empty(shape, dtype=torch.uint8)
        decode(files, images.numpy(), description)
    return images.to(device), zlib.crc32(images.numpy())


def decode(files, images, description):
    """Read image files into the rows of an array, by a pool of threads.

    images: numpy, uint8 [N, 3, S, S]. Files that cannot be read are named together.
    """
    side = images.shape[-1]
    problems = []

    def read(row):
        try:
            images[row] = read_image(files[row], side)
        except Exception as error:
            # Pillow raises a dozen kinds of error for bytes that are no image.
            problems.append(f"{files[row]} ({error})")

    # Pillow warns of odd metadata, which does not matter here.
    with warnings.catch_warnings(action="ignore"):
        in_threads(read, range(len(files)), f"reading {description}")

    if problems:
        names = ", ".join(sorted(problems)[:10])
        if len(problems) > 10:
            names += f" and {len(problems) - 10} more"
        raise UserError(f"cannot read {names}", "repair or remove them")


def node_shared_tensor(shape):
    """A uint8 tensor on the host that the ranks of a node share.

    It is mapped from a temporary file. Local rank 0 makes the file, all ranks map it,
    and then it is deleted: its content disappears with the last process that maps it.
    """
    size = math.prod(shape)
    path = None
    if LOCAL_RANK == 0:
        # Where the file system is full, writing to the tensor would crash.
        folder = tempfile.gettempdir()
        free_bytes = shutil.disk_usage(folder).free
        if free_bytes < size:
            raise UserError(
                f"{folder} has {free_bytes / 1e9:.3g} GB free, and the images "
                f"take {size / 1e9:.3g} GB",
                "let TMPDIR name a larger folder",
            )
        descriptor, path = tempfile.mkstemp(prefix="pirl_images_")
        os.close(descriptor)

    # torchrun numbers the ranks of a node in a row, local rank 0 first.
    paths = [None] * RANKS
    distributed.all_gather_object(paths, path)
    path = paths[RANK - LOCAL_RANK]
    images = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    distributed.barrier()
    if LOCAL_RANK == 0:
        os.remove(path)
    return images.view(shape)


def place_images(wish, count, side, device):
    """Where a run keeps its images: on the training device or on the host.

    wish: "device", "host" or "auto", which is the device if they fit there. All ranks
    call this, and all come to the same place.
    """
    host = torch.device("cpu")
    if device.type == "cpu" or wish == "host":
        return host
    if wish == "device":
        return device

    needed = count * (3 * side**2 + BYTES_BESIDE_PIXELS)
    free_bytes = free_memory(device) - RESERVED_ON_CARD
    if RANKS > 1:
        # The fullest card decides for all.
        smallest = torch.tensor(free_bytes, dtype=torch.float64)
        distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
        free_bytes = smallest.item()
    if needed > free_bytes:
        print(
            f"note: the images stay on the host: they take {needed / 1e9:.3g} GB, and "
            f"a card has room for {max(free_bytes, 0) / 1e9:.3g} GB"
        )
        return host
    return device


def check_memory(shape, device, copies):
    """Refuse images that do not fit, before an hour is spent on decoding them.

    copies: how many are made on this node.
    """
    count, _, side, _ = shape

    def refuse_above(free_bytes, needed, advice):
        if needed > free_bytes:
            raise UserError(
                f"{count} images of {side} × {side} pixels take {needed / 1e9:.3g} GB "
                f"and there is room for {max(free_bytes, 0) / 1e9:.3g} GB",
                advice,
            )

    size = math.prod(shape)
    smaller = "use a smaller --image-size or fewer images"
    refuse_above(free_memory(torch.device("cpu")) / copies, size, smaller)
    if device.type == "cuda":
        free_bytes = free_memory(device) - RESERVED_ON_CARD
        advice = f"in pretraining, use --images-on host; else {smaller}"
        refuse_above(free_bytes, size + count * BYTES_BESIDE_PIXELS, advice)


def free_memory(device):
    """Free bytes on the host, or on the card."""
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        return free_bytes
    # Only Linux has this file; elsewhere the system itself will refuse.
    with contextlib.suppress(OSError, TypeError):
        meminfo = Path("/proc/meminfo").read_text()
        kilobytes = re.search(r"MemAvailable:\s+(\d+)", meminfo)[1]
        return 1024 * int(kilobytes)
    return math.inf


def unlabelled_folder(data_dir):
    american = data_dir / "unlabeled"
    return american if american.is_dir() else data_dir / "unlabelled"


def load_unlabelled(args, device):
    """The unlabelled images that a run uses: those to train on, then those to validate.

    Training images are a random 70 %, or all with --only-train; at most 4,096 of the
    others validate. Returns (images uint8 [N, 3, S, S] on `device` or on the host, the
    number of training images, checksum).
    """
    folder = unlabelled_folder(args.data_dir)
    files = list_images(folder)
    train_count = len(files) if args.only_train else round(0.7 * len(files))

    generator = make_generator("cpu", args.seed, SPLIT)
    order = torch.randperm(len(files), generator=generator).tolist()
    used = order[: train_count + VALIDATION_IMAGES]
    files = [files[row] for row in used]

    side = args.image_size
    place = place_images(args.images_on, len(files), side, device)
    print(
        f"{len(files)} images take {len(files) * 3 * side**2 / 1e9:.3g} GB", flush=True
    )
    images, checksum = load_images(files, side, place, folder.name, all_ranks=True)
    return images, train_count, checksum


def load_labelled(folder, side, device, classes=None):
    """The images of <folder>/<class>/…/<image> with their labels.

    Classes are in natural order; classes: the names that these must be among. Images
    are in the order of their file names, whatever their class: STL-10's keep the order
    of the release, which its folds refer to. Returns (images uint8 [N, 3, side, side],
    labels int64 [N], class names, checksum).
    """
    entries = []
    if folder.is_dir():
        entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    names = sorted((path.name for path in entries if path.is_dir()), key=natural_key)
    if len(names) < len(entries):
        stray = len(entries) - len(names)
        print(f"note: {stray} files in {folder} are in no class and are not used")

    files_of = {}
    for name in names:
        files = find_images(folder / name)
        if files:
            files_of[name] = files
        else:
            print(f"note: {folder / name} holds no images and is left out")
    if classes is None:
        classes = list(files_of)
    for name in files_of:
        if name not in classes:
            raise UserError(
                f"{folder / name} is a class without training images",
                "remove it, or add some",
            )
    if len(classes) < 2 or not files_of:
        raise UserError(
            f"{folder} holds no images, or images of one class only",
            "add images of two or more classes, each in a folder, or run "
            "stl10_data_load.py first",
        )

    labelled_files = []
    for name, files in files_of.items():
        label = classes.index(name)
        labelled_files += [(file, label) for file in files]
    labelled_files.sort(key=lambda pair: (natural_key(pair[0].name), pair[1]))
    files = [file for file, _ in labelled_files]
    labels = np.array([label for _, label in labelled_files])

    images, checksum = load_images(files, side, device, folder.name)
    checksum = zlib.crc32(labels, checksum)
    return images, torch.from_numpy(labels).to(device), classes, checksum


def class_names(data_dir, folders):
    """What to call the classes: as class_names.txt says, or as the folders do.

    Its lines are used where the folders are called 1, 2, … up to their number, as
    STL-10's are.
    """
    path = data_dir / "class_names.txt"
    if not path.is_file():
        return folders
    # Editors on Windows put a byte order mark at the beginning.
    lines = path.read_text("utf-8-sig", errors="replace").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    numbers = [str(number + 1) for number in range(len(names))]
    return names if folders == numbers else folders


# ---- Splits --------------------------------------------------------------------------
def stratified_split(labels, seed, folder):
    """(train, validation) indices, int64, of labels [N] int64.

    Of every class, 84 % train and 16 % validate: 4,200 and 800 of 5,000. folder is
    named in the error where there are too few images for that.
    """
    generator = make_generator("cpu", seed, SPLIT)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    validates = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        train_count = len(members) - round(VALIDATION_SHARE * len(members))
        validates[members[train_count:]] = True

    if not validates.any():
        raise UserError(
            f"{folder} has too few images per class to set 16 % aside for validation",
            "add some",
        )
    train = (~validates).nonzero().flatten()
    validation = validates.nonzero().flatten()
    return train, validation
