"""Image folders to tensors on the training device, splits, and the augmentations as batched tensor operations.

A split is one uint8 tensor [N, 3, S, S] on the device; a batch is rows of it. What is random about a view of an image
is a row of numbers, uniform in [0, 1): a function of (seed, epoch, image), whatever else is in the batch.
"""

import contextlib
import glob
import math
import re
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import run_helpers as rh
import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

STL10_SIDE = 96  # pixels
MEAN = (0.4467, 0.4398, 0.4066)  # of STL-10's unlabelled images, RGB in [0, 1]
STD = (0.2603, 0.2566, 0.2713)
VALIDATION_IMAGES = 4096  # at most so many of the unlabelled images that are not trained on


# ---- From files to a tensor ------------------------------------------------------------------------------------------
def natural(text):
    """A key by which 2.png comes before 10.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(text))], str(text)


def image_files(folder):
    """All images of a folder, at any depth, in natural order. Hidden files are skipped; other files get a note."""
    if not folder.is_dir():
        raise rh.UserError(f"{folder} does not exist: give the folder of your images, or run stl10_data_load.py first")
    paths = [folder / name for name in glob.glob("**", root_dir=folder, recursive=True)]  # it skips hidden ones
    files = [path for path in paths if path.suffix.lower() in IMG_EXTENSIONS and path.is_file()]
    if others := sorted(path.name for path in set(paths).difference(files) if not path.is_dir()):
        more = ", …" if len(others) > 3 else ""
        print(f"note: {len(others)} files in {folder} are no images and are not used ({', '.join(others[:3])}{more})")
    if not files:
        raise rh.UserError(f"{folder} holds no images: give another folder, or run stl10_data_load.py first")
    return sorted(files, key=lambda path: natural(path.relative_to(folder)))


def read_image(path, side):
    """An image file of any size and mode as uint8 [3, side, side] RGB: resized to the shorter side, centre-cropped."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16 bits; convert() would clip instead of scale
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        image = TF.resize(image.convert("RGB"), side, TF.InterpolationMode.BICUBIC)
        return np.asarray(TF.center_crop(image, side)).transpose(2, 0, 1)


def load_images(files, side, device, what):
    """(uint8 [N, 3, side, side] on `device`, a CRC-32 of it) of image files in this order, by a thread per core."""
    need, free = len(files) * 3 * side**2, free_memory(device)
    if need > free:
        fits = math.isqrt(int(free) // (3 * len(files)))
        advice = f"use --image-size {fits} or smaller" if fits >= 36 else "use fewer images"
        sizes = f"{side} × {side} pixels take {need / 1e9:.3g} GB and {free / 1e9:.3g} GB are free"
        raise rh.UserError(f"{len(files)} images of {sizes}: {advice}")
    images, bad = np.empty((len(files), 3, side, side), np.uint8), []

    def read(row):
        try:
            images[row] = read_image(files[row], side)
        except Exception as error:  # Pillow raises a dozen kinds for bytes that are no image
            bad.append(f"{files[row]} ({error})")
        bar.update()

    bar = rh.progress_bar(len(files), f"reading {what}", " images")
    with warnings.catch_warnings(action="ignore"), bar, ThreadPoolExecutor() as pool:
        list(pool.map(read, range(len(files))))
    if bad:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise rh.UserError(f"cannot read {', '.join(sorted(bad)[:10])}{more}: repair or remove them")
    return torch.from_numpy(images).to(device), zlib.crc32(images)


def free_memory(device):
    """Bytes that are free on the host, and on the card if that is less."""
    free = math.inf
    with contextlib.suppress(OSError, TypeError):  # elsewhere than on Linux the system itself will refuse
        free = 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    return min(free, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free


def unlabelled_folder(data_dir):
    return data_dir / ("unlabeled" if (data_dir / "unlabeled").is_dir() else "unlabelled")


def load_unlabelled(args, device):
    """The unlabelled images that a run uses: a random 70 %, or all, to train on, then at most 4,096 of the others.

    Returns (images uint8 [N, 3, S, S] on `device`, the number of training images, checksum).
    """
    folder = unlabelled_folder(args.data_dir)
    files = image_files(folder)
    train_count = len(files) if args.only_train else round(0.7 * len(files))
    order = torch.randperm(len(files), generator=rh.generator("cpu", args.seed, rh.SPLIT)).tolist()
    files = [files[row] for row in order[: train_count + VALIDATION_IMAGES]]
    images, checksum = load_images(files, args.image_size, device, folder.name)
    return images, train_count, checksum


def load_labelled(folder, side, device, classes=None):
    """(images uint8 [N, 3, side, side], labels int64 [N], class names, checksum) of <folder>/<class>/…/<image>.

    Classes are in natural order; classes: names that these must be among. Images are in the order of their file names,
    whatever their class: STL-10's keep the order of the release, which its folds refer to.
    """
    entries = [path for path in folder.iterdir() if path.name[0] != "."] if folder.is_dir() else []
    names = sorted((path.name for path in entries if path.is_dir()), key=natural)
    if len(names) < len(entries):
        print(f"note: {len(entries) - len(names)} files in {folder} are in no folder of a class and are not used")
    if unknown := [name for name in names if classes is not None and name not in classes]:
        raise rh.UserError(f"{folder / unknown[0]} is a class without training images: remove it, or add some")
    classes = classes or names
    found = [(file, classes.index(name)) for name in names for file in image_files(folder / name)]
    if len(classes) < 2 or not found:
        needs = "images of two or more classes, each in a folder"
        raise rh.UserError(f"{folder} holds no images, or of one class: add {needs}, or run stl10_data_load.py first")
    found.sort(key=lambda pair: (natural(pair[0].name), pair[1]))
    images, checksum = load_images([file for file, _ in found], side, device, folder.name)
    labels = np.array([label for _, label in found])
    return images, torch.from_numpy(labels).to(device), classes, zlib.crc32(labels, checksum)


def class_names(data_dir, classes):
    """The lines of class_names.txt where the folders are named 1, 2, … by them; else the folders' names."""
    path = data_dir / "class_names.txt"
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return lines if classes == [str(number + 1) for number in range(len(lines))] else classes


# ---- Splits and random numbers ---------------------------------------------------------------------------------------
def stratified_split(labels, seed, folder):
    """(train, validation) indices, int64, of labels [N] int64: 84 % and 16 % of every class, 4,200 and 800 of 5,000.

    folder is named where there are too few images to do so.
    """
    order = torch.randperm(len(labels), generator=rh.generator("cpu", seed, rh.SPLIT)).to(labels.device)
    validates = torch.zeros_like(labels, dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        validates[members[len(members) - round(0.16 * len(members)) :]] = True
    if not validates.any():
        raise rh.UserError(f"{folder} has too few images per class to set 16 % apart for validation: add some")
    return (~validates).nonzero().flatten(), validates.nonzero().flatten()


def uniform_draws(count, columns, *key, device):
    """A row of numbers, uniform in [0, 1), for each of `count` images: float32 [count, columns], from `key`."""
    return torch.rand(count, columns, generator=rh.generator(device, *key), device=device)


# ---- Augmentation: images are float32 [B, 3, S, S] in 0 … 255 until they are coloured and normalised -----------------
CROP_DRAWS, COLOUR_DRAWS = 4, 6
IMAGE_VIEW_DRAWS = CROP_DRAWS + 1 + COLOUR_DRAWS
LABELLED_VIEW_DRAWS = CROP_DRAWS + 3

CROP_AREA = (0.2, 1.0)  # of the image's area
CROP_ASPECT = (3 / 4, 4 / 3)  # width to height
COLOUR_RANGE = 0.4  # brightness, contrast and saturation are factors from 1 − x to 1 + x, at strength 1
COLOUR_STRENGTH = 0.5
HUE = 0.1  # of a full turn, either way, at strength 1
JITTER_SHARE = 0.8  # of the images; the others keep their colours
GRAY_SHARE = 0.2

YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))  # luma and two axes of colour
CONSTANTS = {}  # of colour_constants(), by device


def image_view(images, draws, least_area=CROP_AREA[0], strength=COLOUR_STRENGTH):
    """The image view I: random resized crop, flip, colour jitter, grayscale (paper, appendix A).

    images [B, 3, S, S] float32 in 0 … 255, draws [B, 11] -> [B, 3, S, S] float32, normalised, channels-last.
    least_area: of the crop, as a fraction of the image's; strength: see jitter().
    """
    crop, flip, colour = draws.split([CROP_DRAWS, 1, COLOUR_DRAWS], 1)
    y, x = whole_crop(crop, flip, images.shape[-1], (least_area, CROP_AREA[1]))
    return recolour(sample(images, y, x), *jitter(colour, strength))


def labelled_view(images, draws):
    """The view for fine-tuning: crop of at least 20 %, rotation by up to 15°, flip, brightness 0.6 … 1.4.

    images [B, 3, S, S] float32 in 0 … 255, draws [B, 7] -> [B, 3, S, S] float32, normalised, channels-last.
    """
    crop, flip, angle, light = draws.split([CROP_DRAWS, 1, 1, 1], 1)
    middle, angle = (images.shape[-1] - 1) / 2, ((2 * angle - 1) * math.radians(15))[..., None, None]
    y, x = (edge - middle for edge in whole_crop(crop, flip, images.shape[-1], CROP_AREA))
    y, x = y * angle.cos() + x * angle.sin(), x * angle.cos() - y * angle.sin()
    one = torch.ones_like(light[:, 0])
    return recolour(sample(images, y + middle, x + middle), 0.6 + 0.8 * light[:, 0], one, one, 0 * one)


def crop_box(draws, side, area):
    """A box of random area (a fraction of side²), aspect ratio (log-uniform) and place that fits inside the image.

    draws [B, 4] -> (corner, size), each [B, 2], vertical and horizontal, in pixels, real numbers.
    """
    pixels = draws[:, :1] * ((area[1] - area[0]) * side**2) + area[0] * side**2
    ratio = (draws[:, 1:2] * math.log(CROP_ASPECT[1] / CROP_ASPECT[0]) + math.log(CROP_ASPECT[0])).exp()
    width = (pixels * ratio).sqrt().clamp(max=side).maximum(pixels / side)  # else the height would not fit
    size = torch.cat([pixels / width, width], 1)
    return draws[:, 2:] * (side - size), size


def crop_coordinates(corner, size, pixels, side):
    """Where pixels of the crop, once resized to side × side, lie in the image it was cut from.

    corner and size [B, …, 2, 1]; pixels, whole numbers, broadcast against them, rows and columns in the dimension of 2;
    so does the result. What would lie outside the crop by up to half a pixel takes the crop's edge, as when the crop is
    cut out first.
    """
    inside = (pixels + 0.5) * (size / side) - 0.5
    return corner + inside.minimum(size - 1).clamp(min=0)


def whole_crop(draws, flip, side, area):
    """(y [B, 1, S, 1], x [B, 1, 1, S]): rows and columns of a random crop; for half of `flip` [B, 1] mirrored."""
    corner, size = (edge[..., None] for edge in crop_box(draws, side, area))
    y, x = crop_coordinates(corner, size, torch.arange(side, device=draws.device), side).unbind(1)
    return y[:, None, :, None], torch.where(flip < 0.5, x, x.flip(1))[:, None, None, :]


def sample(images, y, x):
    """Bilinear samples of images [B, 3, S, S] at (y, x), in pixels, broadcast to [B, R, H, W] -> [B·R, 3, H, W]."""
    side = images.shape[-1]
    grid = torch.stack(torch.broadcast_tensors(x, y), -1) * (2 / side) + (1 / side - 1)  # to grid_sample's −1 … 1
    sampled = F.grid_sample(images, grid.flatten(1, 2), padding_mode="border", align_corners=False)
    return sampled.unflatten(2, (grid.shape[1], -1)).transpose(1, 2).flatten(0, 1)


def jitter(draws, strength=COLOUR_STRENGTH):
    """draws [N, 6] -> brightness, contrast, saturation (0 is gray) and hue angle in radians, each [N].

    strength multiplies how far the first three may go from 1, and how far colours may turn. With strength 0 all images
    keep their colours, grayscale included.
    """
    kept, gray = draws[:, 4:5], draws[:, 5]
    change = (2 * draws[:, :4] - 1) * (kept < JITTER_SHARE)
    brightness, contrast, saturation = (change[:, :3] * (strength * COLOUR_RANGE) + 1).unbind(1)
    saturation = saturation * (gray >= (GRAY_SHARE if strength else 0))
    return brightness, contrast, saturation, change[:, 3] * (strength * HUE * 2 * math.pi)


def recolour(images, brightness, contrast, saturation, hue):
    """Colour jitter, grayscale and normalisation as one affine map of RGB per image.

    Scaling (brightness), blending with the mean gray (contrast) and each pixel's gray (saturation), as in torchvision,
    and turning the colour plane of YIQ (hue) are linear and commute: any order will do. Clipped once, at the end.

    images [N, 3, H, W] in 0 … 255, parameters [N] -> [N, 3, H, W] normalised, channels-last.
    """
    parts, luma, scale, low, high = colour_constants(images.device)
    scaled = brightness * contrast
    vivid = scaled * saturation
    matrix = torch.stack([scaled, vivid * hue.cos(), vivid * hue.sin()], 1) @ parts
    offset = torch.addcmul(low, ((brightness - scaled) * (images.mean((2, 3)) @ luma))[:, None, None], scale)
    coloured = torch.baddbmm(offset, matrix.view(-1, 3, 3), images.flatten(2)).clamp_(low, high)
    return coloured.view_as(images).contiguous(memory_format=torch.channels_last)


@torch.compiler.assume_constant_result  # which a functools.cache around it would hide from torch.compile
def colour_constants(device):
    """What recolour() multiplies by, to normalised from RGB in 0 … 255.

    parts [3, 9]: the matrices RGB → gray, → colour part, → that part turned by 90°; luma [3]: RGB → mean gray;
    scale, low, high [3, 1]: 1 / STD, and black and white once they are normalised.
    """
    if device in CONSTANTS:
        return CONSTANTS[device]
    yiq, mean, std = torch.tensor(YIQ), torch.tensor(MEAN)[:, None], torch.tensor(STD)[:, None]
    to_gray, turn = yiq[0].expand(3, 3), torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    parts = torch.stack([to_gray, torch.eye(3) - to_gray, torch.linalg.inv(yiq) @ turn @ yiq]) / std / 255
    constants = (parts.flatten(1), yiq[0] / 255, 1 / std, -mean / std, (1 - mean) / std)
    return CONSTANTS.setdefault(device, [constant.to(device) for constant in constants])


def normalised(images):
    """uint8 [B, 3, S, S] -> float32, normalised, channels-last: an image as evaluation sees it."""
    *_, scale, low, _ = colour_constants(images.device)
    return (images / 255 * scale[..., None] + low[..., None]).contiguous(memory_format=torch.channels_last)


def pixels_of(views):
    """The inverse of normalised(): float [N, 3, H, W] -> RGB in 0 … 1."""
    *_, scale, low, _ = colour_constants(views.device)
    return (views - low[..., None]) / scale[..., None]
