"""Image folders to tensors on the training device, splits, and the augmentations as batched tensor operations.

A split is one uint8 tensor [N, 3, S, S] on the device; a batch is rows of it. What is random about a view of an image
is a row of numbers, uniform in [0, 1): a function of (seed, epoch, image), whatever else is in the batch.
"""

import contextlib
import fcntl
import functools
import hashlib
import math
import os
import threading
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from run_helpers import SPLIT, UserError, generator, rank, sync_folder

STL10_SIDE = 96  # pixels
IMAGE_BYTES = 3 * STL10_SIDE**2
MEAN = (0.4467, 0.4398, 0.4066)  # of STL-10's unlabelled images, RGB in [0, 1]
STD = (0.2603, 0.2566, 0.2713)
CLASSES = 10
BLOCK, TASK = 512, 32  # images decoded at a time (14 MB at 96 pixels), and by one call of a thread

# ---------------------------------------------------------------------------------------------------------------------
# From files to a tensor
# ---------------------------------------------------------------------------------------------------------------------


def image_files(folder):
    """The <index>.png of a folder, in the order of their indices."""
    try:
        entries = [entry for entry in os.scandir(folder) if entry.name.endswith(".png")]
    except FileNotFoundError:
        raise UserError(
            f"{folder} does not exist: run stl10_data_load.py first, or name its folder by --data-dir"
        ) from None
    for entry in entries:
        if not entry.name[:-4].isdecimal() or not entry.is_file():
            raise UserError(f"{entry.path} is no file named <index>.png: move it out of the folder")
    return sorted((Path(entry.path) for entry in entries), key=lambda file: int(file.stem))


def read_image(path, side):
    """One PNG of 96 × 96 pixels, any mode, as uint8 [3, side, side] RGB; scaled if side is not 96."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an oversized image ends in the error below, undecoded
            with Image.open(path, formats=["PNG"]) as image:
                if image.size != (STL10_SIDE, STL10_SIDE):
                    raise UserError(
                        f"{path} has {image.width} × {image.height} pixels instead of {STL10_SIDE} × {STL10_SIDE}: "
                        "mend or remove it"
                    )
                if image.mode.startswith("I"):  # 16 bits; convert() would clip instead of scale
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = image.convert("RGB")
                if side != STL10_SIDE:
                    image = image.resize((side, side), Image.Resampling.BICUBIC)
                return np.asarray(image).transpose(2, 0, 1)
    except UserError:
        raise
    except Exception as error:  # Pillow raises a dozen kinds for bytes that are no image
        raise UserError(
            f"{path} cannot be read as a PNG ({error}): remove it, or run stl10_data_load.py again"
        ) from None


def decoded_blocks(files, side, what):
    """The images of `files` in order, as blocks uint8 [up to 512, 3, side, side].

    A thread per core decodes (Pillow frees the GIL). The next block is under way while the caller works on one.
    """

    def fill(block, first, files):
        for row, file in enumerate(files, first):
            block[row] = read_image(file, side)
        bar.update(len(files))

    def begin(start):
        chunk = files[start : start + BLOCK]
        block = np.empty((len(chunk), side, side, 3), np.uint8).transpose(0, 3, 1, 2)  # in memory as Pillow has it
        return block, [pool.submit(fill, block, i, chunk[i : i + TASK]) for i in range(0, len(chunk), TASK)]

    bar = progress_bar(len(files), what, " images")
    with bar, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        under_way = begin(0)
        for start in range(BLOCK, len(files) + BLOCK, BLOCK):
            block, tasks = under_way
            under_way = begin(start)
            for task in tasks:
                task.result()
            yield block


def image_blocks(files, folder, side):
    """All images of a folder in order, in blocks uint8 [up to 512, side, side, 3], decoded or from the decoded copy.

    Yields (block, CRC-32 of the images so far). The copy is a file beside the folder. Its name has a digest of the
    names, sizes and times of change of all images: it is used only while it matches. It is made if it is not there,
    and may be deleted at any time. The CRC-32 of all images stands at its end.
    """
    digest, start = hashlib.sha256(b"images, rows, columns, colours, checksum"), len(str(folder)) + 1
    for name in map(str, files):
        status = os.stat(name)
        line = f"{name[start:]} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n"
        digest.update(line.encode(errors="surrogateescape"))
    path = folder.with_name(f".{folder.name}.{side}.{digest.hexdigest()[:32]}.npy")
    part, shape = path.with_name(f".{path.name}.part"), (len(files), side, side, 3)
    checksum, copy, out = 0, None, None
    with contextlib.ExitStack() as held:
        try:
            lock = held.enter_context(open(folder.with_name(f".{folder.name}.lock"), "w"))
            fcntl.flock(lock, fcntl.LOCK_EX)  # another run may be making it just now
            copy = open_copy(path, shape)
            if copy is None:
                for stale in folder.parent.glob(f".*{folder.name}.{side}.*.npy*"):  # with what a kill left of one
                    stale.unlink()
                out = held.enter_context(open(part, "wb"))
                np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
        except OSError as error:
            copy = open_copy(path, shape)
            if copy is None:
                out = give_up_copy(part, error)
        if copy is not None:
            images, expected = copy
            for start in range(0, len(files), BLOCK):
                block = images[start : start + BLOCK]
                checksum = zlib.crc32(block, checksum)
                yield block, checksum
            if checksum != expected:
                raise UserError(f"{path}, a decoded copy of {folder}, is damaged: remove it to have another made")
            return
        try:
            for block in decoded_blocks(files, side, f"decoding {folder.name}"):
                block = block.transpose(0, 2, 3, 1)
                checksum = zlib.crc32(block, checksum)
                try:
                    if out:
                        out.write(block)
                except OSError as error:
                    out = give_up_copy(part, error)
                yield block, checksum
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        if out:
            threading.Thread(target=keep_copy, args=(out, part, path, checksum, held.pop_all())).start()


def open_copy(path, shape):
    """(the decoded copy uint8 `shape`, mapped, not read; the CRC-32 at its end), or None if there is no such copy."""
    if not path.is_file():
        return None
    try:
        images = np.load(path, mmap_mode="c")
        with open(path, "rb") as file:
            file.seek(images.offset + images.nbytes)
            end = file.read(5)
        good = images.dtype == np.uint8 and images.shape == shape and images.flags.c_contiguous and len(end) == 4
    except OSError:
        raise
    except Exception:  # numpy raises many kinds for bytes that are no array
        return None
    return (images, int.from_bytes(end, "little")) if good else None


def give_up_copy(part, error):
    with contextlib.suppress(OSError):  # on a read-only disk even if it is not there
        part.unlink()
    print(f"no decoded copy is kept beside the images ({error.strerror}): they will be decoded at every start")


def keep_copy(out, part, path, checksum, held):
    """Let a decoded copy be durable before it has its name. A thread does it: the run need not wait for the disk."""
    with held:  # the file and the lock
        try:
            out.write(checksum.to_bytes(4, "little"))
            out.flush()
            os.fsync(out.fileno())
            os.replace(part, path)
            sync_folder(path.parent)
        except OSError as error:
            give_up_copy(part, error)


def load_images(files, folder, rows, side, device):
    """(uint8 [len(rows), 3, side, side] on `device`, checksum): the images `rows` of a folder's `files`, in that order.

    The checksum, a CRC-32, depends on the rows and on every pixel of the folder.
    """
    rows = torch.as_tensor(rows)
    place = torch.full((len(files),), -1)
    place[rows] = torch.arange(len(rows))
    images, checksum = torch.empty(len(rows), 3, side, side, dtype=torch.uint8, device=device), 0
    for places, (block, so_far) in zip(place.split(BLOCK), image_blocks(files, folder, side), strict=True):
        wanted = places >= 0
        if not wanted.all():
            places, block = places[wanted], block[wanted.numpy()]
        images.index_copy_(0, places.to(device), torch.from_numpy(block).to(device).permute(0, 3, 1, 2))
        checksum = so_far
    return images, zlib.crc32(rows.numpy(), checksum)


def progress_bar(total, what, unit, done=0):
    """A tqdm bar, on a terminal only; of several ranks, that of rank 0."""
    hide = None if rank() == 0 else True
    return tqdm(total=total, initial=done, desc=what, unit=unit, disable=hide, dynamic_ncols=True, leave=False)


def unlabelled_files(data_dir):
    files = image_files(data_dir / "unlabelled")
    if not files:
        raise UserError(f"{data_dir / 'unlabelled'} holds no images: run stl10_data_load.py")
    return files


def load_unlabelled(data_dir, side, device, seed, only_train, val_images):
    """The unlabelled images that a run uses: those to train on, then at most `val_images` of the others.

    val_images None: 4 % of those to train on, from 256 to 4096, so that validation takes 1.3 % of an epoch.
    Returns (images uint8 [N, 3, side, side] on `device`, the number of training images, checksum).
    """
    files = unlabelled_files(data_dir)
    train, validation = unlabelled_split(len(files), seed, only_train)
    val_images = val_images or min(4096, max(256, len(train) // 25))
    rows = torch.cat([train, validation[:val_images]]).tolist()
    images, checksum = load_images(files, data_dir / "unlabelled", rows, side, device)
    return images, len(train), checksum


def load_labelled(folder, side, device):
    """(images uint8 [N, 3, side, side], labels int64 [N] from 0, checksum) of <folder>/<label from 1>/<index>.png."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: run stl10_data_load.py first, or name its folder by --data-dir")
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    for name in classes:
        if not name.isdecimal() or not 1 <= int(name) <= 10:
            raise UserError(f"{folder / name} is not named by a label from 1 to 10: move it out of the folder")
    files = [(file, int(name) - 1) for name in classes for file in image_files(folder / name)]
    if not files:
        raise UserError(f"{folder} holds no images: run stl10_data_load.py")
    files.sort(key=lambda pair: int(pair[0].stem))
    images, checksum = load_images([file for file, _ in files], folder, list(range(len(files))), side, device)
    labels = np.array([label for _, label in files])
    return images, torch.from_numpy(labels).to(device), zlib.crc32(labels, checksum)


# ---------------------------------------------------------------------------------------------------------------------
# Splits and random numbers
# ---------------------------------------------------------------------------------------------------------------------


def unlabelled_split(count, seed, only_train):
    """(train, validation) indices, int64: 70 % and 30 % at random, or all and none."""
    order = torch.randperm(count, generator=generator("cpu", seed, SPLIT))
    train_count = count if only_train else round(0.7 * count)
    return order[:train_count], order[train_count:]


def stratified_split(labels, seed):
    """(train, validation) indices, int64, of labels [N] int64: 84 % and 16 % of every class, 4,200 and 800 of 5,000."""
    order = torch.randperm(len(labels), generator=generator("cpu", seed, SPLIT))
    train, validation = [], []
    for label in labels.unique():
        members = order[labels[order] == label]
        cut = len(members) - round(0.16 * len(members))
        train.append(members[:cut])
        validation.append(members[cut:])
    return torch.cat(train).sort().values, torch.cat(validation).sort().values


def uniform_draws(count, columns, *key, device):
    """A row of numbers, uniform in [0, 1), for each of `count` images: float32 [count, columns], from `key`."""
    return torch.rand(count, columns, generator=generator(device, *key), device=device)


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation: images are float32 [B, 3, S, S] in 0 … 255 until they are coloured and normalised
# ---------------------------------------------------------------------------------------------------------------------

CROP_DRAWS, COLOUR_DRAWS = 4, 6
IMAGE_VIEW_DRAWS = CROP_DRAWS + 1 + COLOUR_DRAWS
LABELLED_VIEW_DRAWS = CROP_DRAWS + 3

CROP_AREA = (0.2, 1.0)  # of the image's area
CROP_ASPECT = (3 / 4, 4 / 3)  # width to height
BRIGHTNESS = CONTRAST = SATURATION = 0.4  # factors from 1 − x to 1 + x, at strength 1
COLOUR_STRENGTH = 0.5
HUE = 0.05  # of a full turn, either way
JITTER_SHARE = 0.8  # of the images; the others keep their colours
GRAY_SHARE = 0.2

LUMA = (0.299, 0.587, 0.114)
YIQ = ((*LUMA,), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))  # luma and two axes of colour


def image_view(images, draws, least_area=CROP_AREA[0], strength=COLOUR_STRENGTH, hue=HUE):
    """The image view I: random resized crop, flip, colour jitter, grayscale (paper, appendix A).

    images [B, 3, S, S] float32 in 0 … 255, draws [B, 11] -> [B, 3, S, S] float32, normalised, channels-last.
    least_area: of the crop, as a share of the image's; strength and hue: see jitter().
    """
    crop, flip, colour = draws.split([CROP_DRAWS, 1, COLOUR_DRAWS], 1)
    side = images.shape[-1]
    pixels = torch.arange(side, device=images.device)
    columns = torch.where(flip < 0.5, pixels, pixels.flip(0))
    y, x = crop_coordinates(crop_box(crop, side, (least_area, CROP_AREA[1]), CROP_ASPECT), pixels[None], columns, side)
    return recolour(sample(images, y[:, None, :, None], x[:, None, None, :]), *jitter(colour, strength, hue))


def labelled_view(images, draws):
    """The view for fine-tuning: crop of at least 60 %, rotation by up to 15°, flip, brightness 0.6 … 1.4.

    images [B, 3, S, S] float32 in 0 … 255, draws [B, 7] -> [B, 3, S, S] float32, normalised, channels-last.
    """
    crop, flip, angle, light = draws.split([CROP_DRAWS, 1, 1, 1], 1)
    side = images.shape[-1]
    pixels = torch.arange(side, device=images.device)
    columns = torch.where(flip < 0.5, pixels, pixels.flip(0))
    y, x = crop_coordinates(crop_box(crop, side, (0.6, 1.0), CROP_ASPECT), pixels[None], columns, side)
    middle, angle = (side - 1) / 2, ((2 * angle - 1) * math.radians(15))[..., None]
    y, x = y[:, :, None] - middle, x[:, None, :] - middle
    y, x = y * angle.cos() + x * angle.sin(), x * angle.cos() - y * angle.sin()
    one = torch.ones_like(light[:, 0])
    return recolour(
        sample(images, (y + middle)[:, None], (x + middle)[:, None]), 0.6 + 0.8 * light[:, 0], one, one, 0 * one
    )


def crop_box(draws, side, area, aspect):
    """A box of random area (a share of side²), aspect ratio (log-uniform) and place that fits inside the image.

    draws [B, 4] -> (top, left, height, width), each [B, 1] in pixels, real numbers.
    """
    u_area, u_aspect, u_top, u_left = draws.split(1, 1)
    pixels = (area[0] + (area[1] - area[0]) * u_area) * side**2
    ratio = (math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * u_aspect).exp()
    width = (pixels * ratio).sqrt().clamp(max=side).maximum(pixels / side)  # else the height would not fit
    height = pixels / width
    return u_top * (side - height), u_left * (side - width), height, width


def crop_coordinates(box, rows, columns, side):
    """Where the pixels (rows, columns) of the crop, once resized to side × side, lie in the image it was cut from.

    box: four [B, 1]; rows and columns broadcast against them; returns (y, x) in the image's pixels. What would lie
    outside the crop by up to half a pixel takes the crop's edge, as when the crop is cut out first.
    """
    top, left, height, width = box
    y = (rows + 0.5) * (height / side) - 0.5
    x = (columns + 0.5) * (width / side) - 0.5
    return top + y.minimum(height - 1).clamp(min=0), left + x.minimum(width - 1).clamp(min=0)


def sample(images, y, x):
    """Bilinear samples of images [B, 3, S, S] at (y, x), in pixels, broadcast to [B, R, H, W] -> [B·R, 3, H, W]."""
    side = images.shape[-1]
    grid = torch.stack(torch.broadcast_tensors(x, y), -1) * (2 / side) + (1 / side - 1)  # to grid_sample's −1 … 1
    regions = grid.shape[1]
    sampled = F.grid_sample(images, grid.flatten(1, 2), padding_mode="border", align_corners=False)
    if regions == 1:
        return sampled
    return sampled.unflatten(2, (regions, -1)).transpose(1, 2).flatten(0, 1)


def jitter(draws, strength=COLOUR_STRENGTH, hue=HUE):
    """draws [N, 6] -> brightness, contrast, saturation (0 is gray) and hue angle in radians, each [N].

    strength multiplies how far the first three may go from 1; hue is how far colours may turn, of a full turn. With
    strength 0 all images keep their colours, grayscale included.
    """
    brightness, contrast, saturation, turn, kept, gray = draws.unbind(1)
    jittered = (kept < JITTER_SHARE).to(draws.dtype)
    brightness = 1 + jittered * (strength * BRIGHTNESS) * (2 * brightness - 1)
    contrast = 1 + jittered * (strength * CONTRAST) * (2 * contrast - 1)
    saturation = 1 + jittered * (strength * SATURATION) * (2 * saturation - 1)
    turn = jittered * (hue * 2 * math.pi if strength else 0) * (2 * turn - 1)
    return brightness, contrast, saturation * (gray >= (GRAY_SHARE if strength else 0)), turn


def recolour(images, brightness, contrast, saturation, hue):
    """Colour jitter, grayscale and normalisation as one affine map of RGB per image.

    Scaling by the brightness, blending with the mean gray (contrast) and with each pixel's gray (saturation), as in
    torchvision, and turning the colour plane of YIQ by the hue angle are linear and commute, so their order is of no
    account. Clipped once, at the end.

    images [N, 3, H, W] in 0 … 255, parameters [N] -> [N, 3, H, W] normalised, channels-last.
    """
    luma, to_gray, colour, quarter_turn, mean, std = colour_constants(images.device)
    turn = hue.cos()[:, None, None] * colour + hue.sin()[:, None, None] * quarter_turn
    matrix = (brightness * contrast / 255)[:, None, None] * (to_gray + saturation[:, None, None] * turn)
    mean_gray = images.mean((2, 3)) @ luma
    offset = (brightness * (1 - contrast) / 255 * mean_gray)[:, None]
    coloured = torch.baddbmm(((offset - mean) / std)[..., None], matrix / std[:, None], images.flatten(2)).view_as(
        images
    )
    limits = [((bound - mean) / std)[:, None, None] for bound in (0, 1)]
    return coloured.clamp_(*limits).contiguous(memory_format=torch.channels_last)


@functools.cache
def colour_constants(device):
    """(luma weights [3], RGB → gray, RGB → colour part, that part turned by 90° (each [3, 3]), mean [3], std [3])."""
    yiq = torch.tensor(YIQ)
    luma, to_gray = yiq[0], yiq[0].expand(3, 3)
    quarter_turn = torch.linalg.inv(yiq) @ torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ yiq
    constants = (luma, to_gray, torch.eye(3) - to_gray, quarter_turn, torch.tensor(MEAN), torch.tensor(STD))
    return tuple(constant.to(device) for constant in constants)


def normalised(images):
    """uint8 [B, 3, S, S] -> float32, normalised, channels-last: an image as evaluation sees it."""
    *_, mean, std = colour_constants(images.device)
    view = (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
    return view.contiguous(memory_format=torch.channels_last)


def pixels_of(views):
    """The inverse of normalised(): float [N, 3, H, W] -> RGB in 0 … 1."""
    *_, mean, std = colour_constants(views.device)
    return views * std[:, None, None] + mean[:, None, None]
