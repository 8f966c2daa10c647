"""Folders of images to tensors, and splits.

All images of a run are decoded once into one uint8 tensor [N, 3, S, S], which lives on
the training device; in pretraining it may stay on the host. A batch is rows of it.
"""

import os
import re
import unicodedata
import warnings
import zlib
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torchvision.transforms.functional as TF
from PIL import Image, UnidentifiedImageError, features
from torchvision.datasets.folder import IMG_EXTENSIONS

from runtime.bars import in_threads, progress_bar
from runtime.errors import UserError
from runtime.memory import fill_images, place_images
from runtime.randomness import SPLIT, make_generator

STL10_SIDE = 96  # pixels
# Of the unlabelled images that are not trained on, at most this many are used for
# validation.
VALIDATION_IMAGES = 4096
VALIDATION_SHARE = 0.16  # of the labelled images: 800 of 5,000
# If the longer side is more than this many times the shorter one, the ends are cut off
# before the picture is resized.
MAX_ASPECT = 8


# ---- Files ---------------------------------------------------------------------------
def natural_key(text):
    """A sorting key by which 2.png comes before 10.png."""
    # Of two numbers the one of more digits is larger. As a text, a million keys take a
    # third of the memory that they would as lists.
    key = re.sub(r"0*(\d+)", lambda number: chr(len(number[1])) + number[1], text)
    return key, text


def list_images(folder):
    """The paths of all images of a folder; without any, an error. See find_images()."""
    return [folder / name for name in image_names(folder)]


def image_names(folder):
    """The names of all images of a folder; without any, an error. See find_images()."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist",
            "give the folder of your images, or run stl10_data_load.py first",
        )
    names = find_images(folder)
    if not names:
        raise UserError(
            f"{folder} holds no images",
            "give another folder, or run stl10_data_load.py first",
        )
    return names


def find_images(folder):
    """The names of all images of a folder, at any depth, in natural order.

    Names are relative to the folder, such as "cat/1.jpg". Hidden files and folders are
    skipped. Other files get a note. Links are followed, but each real folder is
    searched once, for a link may lead back to a parent.
    """
    images = []
    others = []
    searched = set()
    folders = [""]
    while folders:
        inside = folders.pop(0)
        real = os.path.realpath(folder / inside)
        if real in searched:
            continue
        searched.add(real)
        found = []
        # An entry knows whether it is a file without a further look at the disk.
        for entry in os.scandir(folder / inside):
            name = inside + entry.name
            ending = os.path.splitext(name)[1]
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                found.append(f"{name}/")
            elif entry.is_file() and ending.lower() in IMG_EXTENSIONS:
                images.append(name)
            else:
                others.append(entry.name)
        folders += sorted(found)

    if others:
        names = ", ".join(sorted(others)[:3])
        if len(others) > 3:
            names += ", …"
        what = f"{len(others)} files in {folder} are not images and are not used"
        print(f"note: {what} ({names})")
    return sorted(images, key=natural_key)


# ---- From a file to a square ---------------------------------------------------------
def read_image(path, side):
    """An image file of any size, with 8 or 16 bits, as uint8 [3, side, side] RGB."""
    with Image.open(path) as image:
        return np.asarray(square(image, side)).transpose(2, 0, 1)


def square(image, side):
    """A Pillow image of any kind as RGB of side × side pixels, the way people see it.

    It is turned as its EXIF data says, put on white where it is transparent, resized
    until its shorter side fits, and cropped to its centre. Every image that a network
    of this project sees passes through here.
    """
    image = as_rgb(upright(image))

    shorter = min(image.size)
    longest = MAX_ASPECT * shorter
    if max(image.size) > longest:
        # Resized as a whole, a strip of 20,000 × 1 pixels would take gigabytes.
        width, height = image.size
        crop = (min(height, longest), min(width, longest))
        image = TF.center_crop(image, crop)

    image = TF.resize(image, side, TF.InterpolationMode.BICUBIC)
    return TF.center_crop(image, side)


# How to turn a picture, by its EXIF orientation; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_ORIENTATION = 0x112
# What brings gray of 2 and 4 bits to 8.
FACTORS_TO_8_BITS = {"L;2": 85, "L;4": 17}


def upright(image):
    """The picture, turned as the orientation in its EXIF data says.

    ImageOps.exif_transpose() would write the other metadata back, and fails where a
    camera or an editor has left something odd there.
    """
    load_pixels(image)  # some formats have their EXIF data after the pixels
    try:
        orientation = image.getexif().get(EXIF_ORIENTATION)
    except Exception:
        # Metadata is bytes of any kind, and Pillow raises any kind of error.
        return image
    if orientation not in TURNS:
        return image
    return image.transpose(TURNS[orientation])


def load_pixels(image):
    """image.load(), without two mistakes that Pillow makes."""
    key = image.info.get("transparency")
    if image.format == "PNG" and image.tile and key is not None:
        # Pillow brings the pixels to 8 bits, but not the colour that is transparent.
        mode_in_file = image.tile[0][3]
        if mode_in_file in FACTORS_TO_8_BITS:
            image.info["transparency"] = key * FACTORS_TO_8_BITS[mode_in_file]
        elif mode_in_file == "RGB;16B":
            image.info["transparency"] = tuple(value >> 8 for value in key)

    if image.format == "TIFF":
        # By its name, Pillow would map the file into memory, with height and width
        # exchanged where the picture is to be turned.
        image.filename = ""
    image.load()


def as_rgb(image):
    """A Pillow image of any mode in RGB of 8 bits, on white where it is transparent."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return from_many_bits(image).convert("RGB")

    if image.has_transparency_data:
        # What lies under transparent pixels is arbitrary, and often black.
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def from_many_bits(image):
    """A gray picture of 16 bits as one of 8. Pillow would clip instead of scaling.

    Pillow opens some files of 16 bits as 32. Of those that do have 32 bits, the range
    is unknown.
    """
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() >= 2**16:
        raise ValueError(
            "its pixels are 32-bit numbers of unknown range: save it with 8 bits"
        )
    gray = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:
        gray[values == image.info["transparency"]] = 255
    return Image.fromarray(gray)


# ---- From files to a tensor ----------------------------------------------------------
def load_images(files, side, device, description, all_ranks=False):
    """(uint8 [N, 3, side, side] on `device`, fingerprint) of image files, in order.

    all_ranks: every rank calls this. Files that cannot be read are named together.
    """

    def fill(rows, array):
        part = files[rows]
        with progress_bar(len(part), f"reading {description}", " images") as bar:
            problems = decode(part, array, bar)
        if problems:
            texts = [f"{part[row]} ({problem})" for row, problem in problems.items()]
            names = ", ".join(texts[:10])
            if len(texts) > 10:
                names += f" and {len(texts) - 10} more"
            raise UserError(f"cannot read {names}", "repair or remove them")

    shape = (len(files), 3, side, side)
    images, checksum = fill_images(shape, device, fill, all_ranks)
    return images, fingerprint_of(files, checksum)


def decode(files, images, bar):
    """Read image files into the rows of an array, by a pool of threads.

    images: numpy, uint8 [N, 3, S, S]. Returns {row: why that file cannot be read}, in
    the order of the rows.
    """
    side = images.shape[-1]
    problems = {}

    def read(row):
        try:
            images[row] = read_image(files[row], side)
        except Exception as error:
            # Pillow raises a dozen kinds of error for bytes that are not an image.
            problems[row] = reading_problem(error)

    # Pillow warns of odd metadata, which does not matter here.
    with warnings.catch_warnings(action="ignore"):
        in_threads(read, range(len(files)), bar)
    return dict(sorted(problems.items()))


def reading_problem(error):
    """Why a picture cannot be read, in a few words."""
    if isinstance(error, Image.DecompressionBombError):
        return "it has more pixels than Pillow allows, 179 million: make it smaller"
    if isinstance(error, UnidentifiedImageError):
        return "it is no image, or damaged"
    text = str(error).lower()
    if "max_text" in text or "decompressed data too large" in text:
        return "a text in its metadata is too large: save it without metadata"
    return str(error) or type(error).__name__


def fingerprint_of(files, checksum):
    """What a checkpoint keeps to recognise the images that it was made from.

    checksum: of the decoded pixels. The files' names and sizes, and the program that
    decoded them, tell why pixels differ: JPEGs look different by another libjpeg.
    """
    listing = "".join(f"{file.name} {file.stat().st_size}\n" for file in files)
    libjpeg = features.version("jpg")
    return {
        "checksum": checksum,
        "files": zlib.crc32(os.fsencode(listing)),
        "decoder": f"Pillow {PIL.__version__} with libjpeg {libjpeg}",
    }


# ---- Unlabelled images ---------------------------------------------------------------
def unlabelled_folder(data_dir):
    """data_dir/unlabelled, or unlabeled."""
    british = data_dir / "unlabelled"
    american = data_dir / "unlabeled"
    if british.is_dir() and american.is_dir():
        raise UserError(
            f"there are both {british} and {american}",
            "move all images into one of them",
        )
    folder = american if american.is_dir() else british
    if not folder.is_dir():
        raise missing_folder(folder, "pretraining reads images from there")
    return folder


def missing_folder(folder, purpose):
    """The error for a folder of data_dir that does not exist, from what is there."""
    data_dir = folder.parent
    if not data_dir.is_dir():
        return UserError(
            f"{data_dir} does not exist",
            f"let --data-dir name the folder that holds {folder.name}/, or run "
            "stl10_data_load.py first",
        )
    entries = [path for path in data_dir.iterdir() if not path.name.startswith(".")]
    if any(path.suffix.lower() in IMG_EXTENSIONS for path in entries):
        advice = f"move its images to {folder}"
        if folder.name == "train":
            advice += ", each class into a folder of its own"
    elif any(path.is_dir() for path in entries) and folder.name == "train":
        advice = f"if its folders are the classes, move them to {folder}"
    else:
        advice = f"put images into {folder}, or run stl10_data_load.py first"
    return UserError(
        f"{data_dir} has no folder {folder.name}, and {purpose}",
        advice,
    )


def load_unlabelled(args, device, bytes_beside):
    """The unlabelled images that a run uses: those to train on, then those to validate.

    Training images are a random 70 %, or all with --only-train; at most 4,096 of the
    others are for validation. bytes_beside: see place_images(). Returns (images uint8
    [N, 3, S, S] on `device` or on the host, the number of training images,
    fingerprint).
    """
    folder = unlabelled_folder(args.data_dir)
    files = list_images(folder)
    train_count = len(files) if args.only_train else round(0.7 * len(files))

    generator = make_generator("cpu", args.seed, SPLIT)
    order = torch.randperm(len(files), generator=generator).tolist()
    used = order[: train_count + VALIDATION_IMAGES]
    files = [files[row] for row in used]

    side = args.image_size
    place = place_images(args.images_on, len(files), side, device, bytes_beside)
    print(
        f"{len(files)} images take {len(files) * 3 * side**2 / 1e9:.3g} GB", flush=True
    )
    images, fingerprint = load_images(files, side, place, folder.name, all_ranks=True)
    return images, train_count, fingerprint


# ---- Labelled images -----------------------------------------------------------------
class LabelledImages(NamedTuple):
    """Images with their classes; where there are none, both tensors are empty."""

    images: torch.Tensor  # uint8 [N, 3, S, S]
    labels: torch.Tensor  # int64 [N]


class LabelledData(NamedTuple):
    """What fine-tuning and the kNN monitor read: data_dir/train, and val/ if it exists.

    One tensor holds the images to train on and those to validate on.
    """

    images: torch.Tensor  # uint8 [N, 3, S, S], those of train/ first
    labels: torch.Tensor  # int64 [N]
    train: torch.Tensor  # int64, indices of the images to train on
    val: torch.Tensor  # int64, indices of those to validate on
    folders: list  # names of the class folders; the label is the place in this list
    files: list  # paths of the images, relative to data_dir
    fingerprint: dict


def load_labelled(data_dir, side, device, seed):
    """The LabelledData of a folder.

    val/ (or valid/) is the validation set, if there is one; else 16 % of the images of
    every class are.
    """
    train_folder = data_dir / "train"
    if not train_folder.is_dir():
        raise missing_folder(train_folder, "labelled images are read from there")
    val_folder = validation_folder(data_dir)
    note_unused_folders(data_dir)

    files, labels, folders = labelled_files(train_folder)
    train_count = len(files)
    if len(folders) < 2:
        raise UserError(
            f"{train_folder} holds no images, or images of one class only",
            "add images of two or more classes, each in a folder, or run "
            "stl10_data_load.py first",
        )
    if val_folder:
        val_files, val_labels, present = labelled_files(val_folder, folders)
        if not val_files:
            raise UserError(
                f"{val_folder} holds no images of a class",
                "remove it, or add images",
            )
        note_absent(val_folder, folders, present, "validation says nothing of them")
        files += val_files
        labels += val_labels

    labels = np.array(labels, np.int64)
    images, fingerprint = load_images(files, side, device, train_folder.name)
    fingerprint["checksum"] = zlib.crc32(labels, fingerprint["checksum"])
    labels = torch.from_numpy(labels).to(device)
    if val_folder:
        train = torch.arange(train_count, device=device)
        val = torch.arange(train_count, len(files), device=device)
        print(f"validation images are those of {val_folder}")
    else:
        train, val = stratified_split(labels, seed, train_folder, folders)
    names = [file.relative_to(data_dir).as_posix() for file in files]
    return LabelledData(images, labels, train, val, folders, names, fingerprint)


def load_test(data_dir, side, device, folders):
    """(LabelledImages of data_dir/test, a checksum); empty and 0 without any images.

    folders: the names of the classes' folders.
    """
    folder = data_dir / "test"
    files = []
    labels = []
    if folder.is_dir():
        files, labels, present = labelled_files(folder, folders)
        if files:
            consequence = "their test accuracy is not measured"
            note_absent(folder, folders, present, consequence)
        else:
            print(f"note: {folder} has no folders of classes with images: no test")
    if not files:
        images = torch.empty((0, 3, side, side), dtype=torch.uint8, device=device)
        labels = torch.empty(0, dtype=torch.int64, device=device)
        return LabelledImages(images, labels), 0
    labels = np.array(labels, np.int64)
    images, fingerprint = load_images(files, side, device, folder.name)
    checksum = zlib.crc32(labels, fingerprint["checksum"])
    return LabelledImages(images, torch.from_numpy(labels).to(device)), checksum


def labelled_files(folder, classes=None):
    """(files, labels, class names) of the images <folder>/<class>/…/<image>.

    Classes are in natural order; classes: the names that these must be among. Images
    are in the order of their file names, whatever their class: STL-10's keep the order
    of the release, which its folds refer to. Names are compared in Unicode's composed
    form, since macOS decomposes accents.
    """
    entries = [path for path in folder.iterdir() if not path.name.startswith(".")]
    class_folders = [path for path in entries if path.is_dir()]
    class_folders.sort(key=lambda path: natural_key(path.name))
    if len(class_folders) < len(entries):
        stray = len(entries) - len(class_folders)
        print(f"note: {stray} files in {folder} are in no class and are not used")

    files_of = {}
    for class_folder in class_folders:
        name = unicodedata.normalize("NFC", class_folder.name)
        files = [class_folder / file for file in find_images(class_folder)]
        if files:
            files_of.setdefault(name, []).extend(files)
        else:
            print(f"note: {class_folder} holds no images and is left out")
    if classes is None:
        classes = list(files_of)
    for name in files_of:
        if name not in classes:
            raise UserError(
                f"{folder / name} is a class without training images",
                "add some, or move it elsewhere",
            )

    pairs = []
    for name, files in files_of.items():
        label = classes.index(name)
        pairs += [(file, label) for file in files]
    pairs.sort(key=lambda pair: (natural_key(pair[0].name), pair[1]))
    files = [file for file, _ in pairs]
    labels = [label for _, label in pairs]
    return files, labels, list(files_of)


def validation_folder(data_dir):
    """data_dir/val or data_dir/valid, or None where there is neither."""
    folders = [data_dir / name for name in ("val", "valid")]
    present = [folder for folder in folders if folder.is_dir()]
    if len(present) > 1:
        raise UserError(
            f"there are both {present[0]} and {present[1]}",
            "remove one of them",
        )
    return present[0] if present else None


def note_unused_folders(data_dir):
    """Say which folders are not read, in case one of them should be."""
    read = {"train", "val", "valid", "test", "unlabelled", "unlabeled"}
    unused = []
    for path in data_dir.iterdir():
        if path.is_dir() and path.name not in read and not path.name.startswith("."):
            unused.append(f"{path.name}/")
    if unused:
        print(f"note: {list_names(sorted(unused))} in {data_dir} will not be read")


def note_absent(folder, classes, present, consequence):
    """Say which of the classes a folder has no images of."""
    absent = [name for name in classes if name not in present]
    if absent:
        print(f"note: {folder} has no images of {list_names(absent)}: {consequence}")


def list_names(names):
    """The names as text, at most five of them."""
    text = ", ".join(names[:5])
    return f"{text} and {len(names) - 5} more" if len(names) > 5 else text


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
def stratified_split(labels, seed, folder, names):
    """(train, validation) indices, int64, of labels [N] int64.

    Of every class, 84 % are for training and 16 % for validation, 4,200 and 800 of
    5,000; of a class with two images or more, at least one is for validation. folder
    and names, those of the classes, are for messages.
    """
    generator = make_generator("cpu", seed, SPLIT)
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    validates = torch.zeros_like(labels, dtype=torch.bool)
    without = []
    for label in labels.unique().tolist():
        members = order[labels[order] == label]
        count = max(1, round(VALIDATION_SHARE * len(members)))
        if len(members) < 2:
            without.append(names[label])
        else:
            validates[members[len(members) - count :]] = True

    if not validates.any():
        raise UserError(
            f"{folder} has one image per class, so none can be set aside to validate",
            "add some",
        )
    if without:
        print(
            f"note: {list_names(without)} in {folder} has one image only: it is used "
            "for training, and validation says nothing about that class"
        )
    train = (~validates).nonzero().flatten()
    validation = validates.nonzero().flatten()
    return train, validation
