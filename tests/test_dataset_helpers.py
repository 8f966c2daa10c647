"""Any folder of images to a tensor: files, formats, classes and splits."""

import argparse
import os
import struct
import unicodedata
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image, PngImagePlugin, features

import dataset_helpers
from dataset_helpers import (
    class_names,
    find_images,
    list_images,
    load_images,
    load_labelled,
    load_test,
    load_unlabelled,
    natural_key,
    read_image,
    square,
    stratified_split,
    unlabelled_folder,
)
from runtime.errors import UserError

CPU = torch.device("cpu")


def write_image(path, seed, size=(48, 48)):
    """A smooth random picture, in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)


def notes(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if "note" in line]


# ---- Files ---------------------------------------------------------------------------
def test_natural_order():
    expected = "01 1 1/3 2 9 10 10b 010c 99999999999 100000000000 B a a2 a2b a10 b1c10"
    expected = expected.split()
    names = expected[::-1]
    assert sorted(names, key=natural_key) == expected


def test_every_image_of_a_folder_is_found(tmp_path, capsys):
    expected = [f"deep/er/{i}.jpg" for i in range(8, 13)]
    expected += ["new 2.WEBP", "new 10.tiff", "odd näme (1).Jpg", "x.png/9.bmp"]
    expected += ["y (1).ppm", "z.pgm", "z.v2.jpeg"]
    for seed, name in enumerate(expected):
        write_image(tmp_path / name, seed)
    (tmp_path / "notes.txt").write_text("no image")
    for other in ("a.gif", "deep/Thumbs.db", "deep/er/jpg", ".hidden.txt"):
        (tmp_path / other).write_bytes(b"")
    for hidden in (".hidden.png", ".thumbnails/1.png", "deep/.thumbnails/1.png"):
        write_image(tmp_path / hidden, 99)

    assert find_images(tmp_path) == expected
    what = f"4 files in {tmp_path} are not images and are not used"
    assert notes(capsys) == [f"note: {what} (Thumbs.db, a.gif, jpg, …)"]
    assert list_images(tmp_path) == [tmp_path / name for name in expected]


def test_links_are_followed_and_each_real_folder_is_searched_once(
    tmp_path, capsys, monkeypatch
):
    """A link may lead back to a parent, or two of them to the same folder.

    The system lists a folder in any order: here from Z to A.
    """
    scandir = os.scandir

    def backwards(folder):
        return sorted(scandir(folder), key=lambda entry: entry.name, reverse=True)

    photos = tmp_path / "photos"
    write_image(photos / "2.png", 2)
    write_image(photos / "deep/2.png", 2)
    write_image(tmp_path / "elsewhere/1.png", 1)
    (photos / "deep/back").symlink_to(photos)
    (photos / "second").symlink_to(tmp_path / "elsewhere")
    (photos / "first").symlink_to(tmp_path / "elsewhere")
    (photos / "10.png").symlink_to(tmp_path / "elsewhere/1.png")
    (photos / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(photos / "pipe.png")  # reading it would wait for ever
    (photos / "x.txt").touch()

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", backwards)
        found = find_images(photos)
    assert found == ["2.png", "10.png", "deep/2.png", "first/1.png"]
    [note] = notes(capsys)
    assert "3 files" in note
    assert "(gone.png, pipe.png, x.txt)" in note

    (tmp_path / "link").symlink_to(photos)
    assert list_images(tmp_path / "link")[0] == tmp_path / "link/2.png"


# ---- From a file to a square ---------------------------------------------------------
@pytest.mark.parametrize("side", [96, 45])
@pytest.mark.parametrize("size", [(300, 200), (96, 96), (50, 121)])
def test_images_are_resized_and_cropped_as_pillow_does(tmp_path, size, side):
    write_image(tmp_path / "a.jpg", 3, size)
    with Image.open(tmp_path / "a.jpg") as image:
        scale = side / min(size)
        edges = [side if edge == min(size) else int(edge * scale) for edge in size]
        if size != (side, side):
            image = image.resize(edges, Image.Resampling.BICUBIC)
        left, top = (round((edge - side) / 2) for edge in edges)
        expected = np.asarray(image.crop((left, top, left + side, top + side)))

    read = read_image(tmp_path / "a.jpg", side)
    assert (read == expected.transpose(2, 0, 1)).all()


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000), (4000, 30)])
def test_long_flat_pictures_are_cropped_before_they_are_resized(monkeypatch, size):
    """A strip of 20,000 × 1 pixels, resized as a whole, would take gigabytes."""
    image = Image.new("RGB", size, "white")
    width, height = size
    left = width // 2 - 4 * min(size)
    top = height // 2 - 4 * min(size)
    middle = (left, top, left + 8 * min(size), top + 8 * min(size))
    image.paste((10, 10, 10), middle)

    sizes = []
    resize = dataset_helpers.TF.resize

    def recorded_resize(image, *rest):
        sizes.append(image.size)
        return resize(image, *rest)

    monkeypatch.setattr(dataset_helpers.TF, "resize", recorded_resize)
    read = np.asarray(square(image, 96))
    assert sorted(sizes[0]) == [min(size), 8 * min(size)]
    assert read.shape == (96, 96, 3)
    assert (read == 10).all(), "its middle"


# ---- EXIF ----------------------------------------------------------------------------
QUARTERS = np.kron([[250, 170], [90, 0]], np.ones((48, 48))).astype(np.uint8)
# A picture that EXIF turns, by the standard: where the file's first row and first
# column are to be shown.
SHOWN = {
    1: lambda pixels: pixels,  # top, left
    2: lambda pixels: pixels[:, ::-1],  # top, right
    3: lambda pixels: pixels[::-1, ::-1],  # bottom, right
    4: lambda pixels: pixels[::-1],  # bottom, left
    5: lambda pixels: pixels.T,  # left, top
    6: lambda pixels: pixels.T[:, ::-1],  # right, top
    7: lambda pixels: pixels.T[::-1, ::-1],  # right, bottom
    8: lambda pixels: pixels.T[::-1],  # left, bottom
}


def exif_tag(number, kind, count, value):
    return struct.pack("<HHI4s", number, kind, count, value)


def exif_of(orientation, *others):
    """EXIF data by hand: Pillow cannot write all that cameras do."""
    tags = [exif_tag(0x112, 3, 1, struct.pack("<H", orientation)), *others]
    content = struct.pack("<IH", 8, len(tags)) + b"".join(sorted(tags))
    return b"Exif\0\0II*\0" + content + bytes(4)


def assert_shown(read, orientation):
    """Tall pictures have the same middle as wide ones: all are squares of 96 pixels."""
    expected = SHOWN[orientation](QUARTERS)[8:88:16, 8:88:16].astype(int)
    for channel in read.astype(int):
        assert abs(channel[8:88:16, 8:88:16] - expected).max() < 12, orientation


@pytest.mark.parametrize(
    ("name", "mode", "options"),
    [
        ("a.jpg", "RGB", {"quality": 95}),
        ("a.jpg", "L", {"quality": 95}),
        ("a.png", "RGB", {}),
        ("a.png", "P", {}),
        ("a.png", "I;16", {}),
        ("a.webp", "RGB", {"lossless": True}),
        # Those that are not compressed are mapped into memory by Pillow.
        ("a.tif", "RGB", {}),
        ("a.tif", "L", {}),
        ("a.tif", "I;16", {}),
        ("a.tif", "RGB", {"compression": "tiff_lzw"}),
    ],
)
def test_photographs_of_a_turned_camera_stand_upright(tmp_path, name, mode, options):
    # Not a square: turned, its height and width change places.
    wide = np.pad(QUARTERS, ((0, 0), (20, 20)), "edge")
    image = Image.fromarray(wide)
    if mode == "I;16":
        image = Image.fromarray(wide.astype(np.uint16) * 257)
    elif mode == "RGB":
        image = image.convert("RGB")
    elif mode == "P":
        image = image.quantize(8)
    for orientation in SHOWN:
        exif = Image.Exif()
        exif[0x112] = orientation
        image.save(tmp_path / name, exif=exif, **options)
        assert_shown(read_image(tmp_path / name, 96), orientation)


ODD = {
    "resolution": exif_tag(0x11A, 2, 4, b"72\0\0"),
    "bytes": exif_tag(0x11A, 7, 4, b"\1\2\3\4"),
    "unit": exif_tag(0x128, 2, 2, b"2\0\0\0"),
    "compression": exif_tag(0x103, 1, 4, b"\1\2\3\4"),
    "negative width": exif_tag(0x100, 9, 1, struct.pack("<i", -5)),
    "offset": exif_tag(0x8769, 4, 1, struct.pack("<I", 99999)),
}


@pytest.mark.filterwarnings("error")  # Pillow's, which are of no use to anybody
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
@pytest.mark.parametrize(
    ("exif", "orientation"),
    [
        *((exif_of(6, odd), 6) for odd in ODD.values()),
        (b"Exif\0\0plain text", 1),
        (b"Exif\0\0" + bytes(40), 1),
        (exif_of(0), 1),
        (exif_of(9), 1),
        (exif_of(6)[:-8], 1),
    ],
    ids=[*ODD, "text", "zeros", "0", "9", "cut"],
)
def test_odd_metadata(tmp_path, exif, orientation, ending):
    """Beside the orientation, or in its place."""
    file = tmp_path / f"a.{ending}"
    Image.fromarray(QUARTERS).convert("RGB").save(file, exif=exif)
    [images, _] = load_images([file], 96, CPU, "images")
    assert_shown(images[0].numpy(), orientation)


# ---- Transparency and bits -----------------------------------------------------------
def write_png(path, bits, colour, rows, transparent, palette=b""):
    """A PNG by hand: Pillow cannot write all that others do."""

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 48, 48, bits, colour, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    content += chunk(b"PLTE", palette) if palette else b""
    content += chunk(b"tRNS", transparent) if transparent else b""
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(content + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


def halves(path):
    """The colours of the left and of the right half of a picture, as it is read."""
    read = read_image(path, 48)
    for half in (read[:, :, :24], read[:, :, 24:]):
        assert (half == half[:, :1, :1]).all()
    return read[:, 0, 0].tolist(), read[:, 0, 47].tolist()


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.tif", "lzw.tif", "a.gif"])
def test_transparent_pixels_are_white(tmp_path, name):
    """Whatever colour lies under them, in whichever frame comes first."""
    path = tmp_path / name
    options = {"lossless": True} if name == "a.webp" else {}
    if name == "lzw.tif":
        options["compression"] = "tiff_lzw"
    for hidden in ((0, 0, 0, 0), (0, 255, 0, 0)):
        pixels = np.full((48, 48, 4), (50, 60, 70, 255), np.uint8)
        pixels[:, :24] = hidden
        image = Image.fromarray(pixels)
        image.save(path, **options)
        assert halves(path) == ([255] * 3, [50, 60, 70])

        second = Image.new("RGBA", (48, 48), (255, 0, 0, 128))
        image.save(path, save_all=True, append_images=[second], **options)
        assert halves(path) == ([255] * 3, [50, 60, 70])


@pytest.mark.parametrize("mode", ["LA", "RGBa"])
def test_transparent_pixels_of_other_modes_are_white(mode):
    pixels = np.full((48, 48, 4), (60, 60, 60, 255), np.uint8)
    pixels[:, :24] = 0
    read = np.asarray(square(Image.fromarray(pixels).convert(mode), 48))
    assert (read[:, :24] == 255).all()
    assert (abs(read[:, 24:].astype(int) - 60) < 2).all()


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (48, 48), (0, 0, 200, 128)).save(tmp_path / "a.png")
    assert halves(tmp_path / "a.png")[0] == pytest.approx([127, 127, 227], abs=1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_the_transparent_gray_of_a_png(tmp_path, bits):
    """Of each number of bits: Pillow brings the pixels to 8, but not this gray."""
    path = tmp_path / "a.png"
    top = 2**bits - 1
    for key in {0, top // 3, top}:
        other = key ^ 1
        if bits == 16:
            row = struct.pack(">H", key) * 24 + struct.pack(">H", other) * 24
        else:
            text = f"{key:0{bits}b}" * 24 + f"{other:0{bits}b}" * 24
            row = int(text, 2).to_bytes(len(text) // 8, "big")
        write_png(path, bits, 0, [row] * 48, struct.pack(">H", key))
        assert halves(path) == ([255] * 3, [round(other * 255 / top)] * 3), key


@pytest.mark.parametrize(("bits", "unit"), [(8, 1), (16, 256)])
def test_the_transparent_colour_of_a_png(tmp_path, bits, unit):
    pixel = ">BBB" if bits == 8 else ">HHH"
    for key in [(0, 0, 0), (200 * unit, 10, 30 * unit)]:
        row = struct.pack(pixel, *key) * 24 + struct.pack(pixel, 0, unit, 9 * unit) * 24
        write_png(tmp_path / "a.png", bits, 2, [row] * 48, struct.pack(">HHH", *key))
        assert halves(tmp_path / "a.png") == ([255] * 3, [0, 1, 9])


@pytest.mark.parametrize("transparent", [b"\xff\0", b"\xff\0\xff"])
def test_the_transparent_colour_of_a_palette(tmp_path, transparent):
    """One index, or an opacity for each."""
    row = b"\1" * 24 + b"\2" * 24
    palette = bytes([9, 9, 9, 0, 0, 0, 10, 20, 30])
    write_png(tmp_path / "a.png", 8, 3, [row] * 48, transparent, palette)
    assert halves(tmp_path / "a.png") == ([255] * 3, [10, 20, 30])


@pytest.mark.parametrize("mode", ["P", "L"])
def test_a_turned_picture_stays_transparent(tmp_path, mode):
    """On the left it is transparent in the file, and on the right when it is turned."""
    columns = np.repeat([0, 1], 24)[None].repeat(48, 0)
    image = Image.fromarray((60 * columns).astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x112] = 2
    path = tmp_path / "a.png"
    image.save(path, exif=exif, transparency=image.getpixel((0, 0)))
    assert halves(path) == ([60] * 3, [255] * 3)


def ramp():
    """A ramp of 48 × 48 numbers of 16 bits, from 0 to 65,535."""
    return np.linspace(0, 65535, 48).astype(np.uint16)[None].repeat(48, 0)


def test_pixels_of_16_bits_are_scaled(tmp_path):
    """Pillow's own conversion would clip them at 255."""
    pixels = ramp()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    Image.fromarray(pixels.astype(">u2")).save(tmp_path / "big_endian.tif")
    # 16 bits that come as 32, as Pillow reads some files.
    Image.fromarray(pixels.astype(np.int32)).save(tmp_path / "b.tif")
    header = b"P5 48 48 65535\n"
    (tmp_path / "a.pgm").write_bytes(header + pixels.astype(">u2").tobytes())

    for name in ("a.png", "a.tif", "big_endian.tif", "b.tif", "a.pgm"):
        read = read_image(tmp_path / name, 48)
        assert (read == pixels >> 8).all(), name


@pytest.mark.parametrize(
    "pixels",
    [
        ramp().astype(np.int32) + 1,
        ramp().astype(np.int32) - 1,
        ramp().astype(np.float32) / 65535,
    ],
    ids=["17 bits", "negative", "float"],
)
def test_pixels_of_32_bits_are_refused(tmp_path, pixels):
    """Nobody knows what is black and what is white."""
    path = tmp_path / "a.tif"
    Image.fromarray(pixels).save(path)
    with pytest.raises(UserError, match=r"32-bit numbers .*repair or remove") as error:
        load_images([path], 48, CPU, "images")
    assert str(path) in str(error.value)


# ---- From files to a tensor ----------------------------------------------------------
def test_rows_are_the_files_in_order(tmp_path):
    names = ["2.png", "10.jpg", "1.bmp", "b/3.webp", "1.tif"]
    files = [tmp_path / name for name in names]
    for seed, file in enumerate(files):
        write_image(file, seed, (50 + 9 * seed, 80 - 9 * seed))
    images, fingerprint = load_images(files, 40, CPU, "images")
    assert images.shape == (5, 3, 40, 40)
    assert images.dtype == torch.uint8
    for row, file in zip(images, files, strict=True):
        assert (row.numpy() == read_image(file, 40)).all(), file
    assert fingerprint["checksum"] == zlib.crc32(images.numpy().tobytes())


def test_what_a_fingerprint_tells(tmp_path):
    files = [tmp_path / "1.png", tmp_path / "2.png"]
    for seed, file in enumerate(files):
        write_image(file, seed)

    def fingerprint(files):
        return load_images(files, 48, CPU, "images")[1]

    first = fingerprint(files)
    assert fingerprint(files) == first
    swapped = fingerprint(files[::-1])
    assert swapped["checksum"] != first["checksum"]
    assert swapped["files"] != first["files"]

    (tmp_path / "other").mkdir()
    moved = [file.rename(tmp_path / "other" / file.name) for file in files]
    assert fingerprint(moved) == first, "wherever the folder is"
    renamed = [moved[0], moved[1].rename(tmp_path / "3.png")]
    second = fingerprint(renamed)
    assert second["checksum"] == first["checksum"]
    assert second["files"] != first["files"]
    Image.open(renamed[1]).save(renamed[1], compress_level=0)
    third = fingerprint(renamed)
    assert third["checksum"] == second["checksum"]
    assert third["files"] != second["files"], "they differ in size"
    libjpeg = features.version("jpg")
    assert third["decoder"] == f"Pillow {PIL.__version__} with libjpeg {libjpeg}"


def damaged(path, how):
    if how == "179 million":
        write_png(path, 8, 0, [b""], b"")
        content = path.read_bytes()
        header = b"IHDR" + struct.pack(">IIBBBBB", 14000, 13000, 8, 0, 0, 0, 0)
        header += struct.pack(">I", zlib.crc32(header))
        path.write_bytes(content[:12] + header + content[33:])
    elif how == "a text in its metadata is too large":
        texts = PngImagePlugin.PngInfo()
        texts.add_text("a", "b" * 2**21, zip=True)
        Image.new("L", (48, 48)).save(path, pnginfo=texts)
    elif how == "truncated":
        write_image(path, 1)
        path.write_bytes(path.read_bytes()[:-60])
    else:
        path.write_bytes(b"no image")


@pytest.mark.parametrize(
    "reason",
    ["179 million", "a text in its metadata is too large", "truncated", "no image"],
)
def test_why_a_file_cannot_be_read(tmp_path, reason):
    files = [tmp_path / "1.png", tmp_path / "2.png"]
    write_image(files[0], 0)
    damaged(files[1], reason)
    with pytest.raises(UserError) as error:
        load_images(files, 48, CPU, "images")
    line = str(error.value)
    assert line.startswith(f"cannot read {files[1]} (")
    assert reason in line.split(" (", 1)[1]
    assert line.endswith(": repair or remove them")


# ---- Unlabelled images ---------------------------------------------------------------
def test_the_american_name_of_the_folder(tmp_path):
    (tmp_path / "unlabeled").mkdir()
    assert unlabelled_folder(tmp_path) == tmp_path / "unlabeled"
    (tmp_path / "unlabelled").mkdir()
    with pytest.raises(UserError, match=r"both .*unlabelled and .*unlabeled: move"):
        unlabelled_folder(tmp_path)
    (tmp_path / "unlabeled").rmdir()
    assert unlabelled_folder(tmp_path) == tmp_path / "unlabelled"


def test_what_is_said_of_a_folder_that_is_not_there(tmp_path):
    """--data-dir is often the folder of the images or of the classes itself."""

    def advice(read, data_dir):
        with pytest.raises(UserError) as error:
            read(data_dir)
        return str(error.value)

    def labelled(data_dir):
        load_labelled(data_dir, 36, CPU, 0)

    nowhere = tmp_path / "nowhere"
    images = tmp_path / "images"
    classes = tmp_path / "classes"
    empty = tmp_path / "empty"
    write_image(images / "1.JPG", 0)
    write_image(images / ".hidden/1.png", 0)
    write_image(classes / "cat/1.png", 0)
    (empty / ".cache").mkdir(parents=True)

    for read, name in ((unlabelled_folder, "unlabelled"), (labelled, "train")):
        message = advice(read, nowhere)
        assert message.startswith(f"{nowhere} does not exist: ")
        assert f"holds {name}/" in message
        for data_dir in (images, classes, empty):
            assert advice(read, data_dir).startswith(f"{data_dir} has no folder {name}")
        assert f"move its images to {images / name}" in advice(read, images)
        assert f"put images into {empty / name}" in advice(read, empty)
    assert "each class into a folder of its own" in advice(labelled, images)
    assert f"move them to {classes / 'train'}" in advice(labelled, classes)
    assert "classes" not in advice(unlabelled_folder, images)


def test_which_images_train_and_which_validate(tmp_path, monkeypatch, capsys):
    """Image number i is of the gray 5 · i."""
    for number in range(34):
        path = tmp_path / f"unlabeled/{number % 4}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (40, 50), 5 * number).save(path)

    args = argparse.Namespace(data_dir=tmp_path, image_size=36, images_on="auto")

    def load(only_train=False, seed=3):
        args.only_train = only_train
        args.seed = seed
        images, train_count, fingerprint = load_unlabelled(args, CPU, 0)
        assert images.shape[1:] == (3, 36, 36)
        numbers = (images[:, 0, 0, 0] // 5).tolist()
        assert fingerprint["checksum"] == zlib.crc32(images.numpy().tobytes())
        return numbers[:train_count], numbers[train_count:]

    train, validation = load()
    assert len(train) == 24
    assert sorted(train + validation) == list(range(34))
    assert load() == (train, validation)
    assert sorted(load(seed=4)[0]) != sorted(train)
    everything, nothing = load(only_train=True)
    assert sorted(everything) == list(range(34))
    assert everything != sorted(everything)
    assert nothing == []

    assert dataset_helpers.VALIDATION_IMAGES == 4096
    monkeypatch.setattr(dataset_helpers, "VALIDATION_IMAGES", 4)
    assert load(only_train=True) == (everything, [])
    capsys.readouterr()
    assert load() == (train, validation[:4])
    assert "28 images take 0.000109 GB" in capsys.readouterr().out
    for args.images_on, place in (("host", "cpu"), ("device", "meta")):
        images, _, _ = load_unlabelled(args, torch.device("meta"), 0)
        assert images.device.type == place


# ---- Labelled images -----------------------------------------------------------------
# The classes of a zoo, and the numbers of their images.
ZOO = {
    "1": [4, 9, 30, 100],
    "2": [*range(1, 14)],
    "10": [3],
    "ant": [2, 20],
    "Bee": [5, 6, 7, 8, 11, 12, 25],
}
ENDINGS = ["png", "JPG", "bmp", "webp"]


def write_zoo(folder, classes=ZOO, seed=0):
    """Images of several formats and sizes, those above 10 one folder deeper."""
    for label, (name, numbers) in enumerate(classes.items()):
        for number in numbers:
            inside = f"more/{number}" if number > 10 else f"{number}"
            path = folder / name / f"{inside}.{ENDINGS[number % 4]}"
            write_image(path, (seed, label, number), (40 + number % 3, 50))


def assert_row_by_row(data_dir, files, labels, images, folders):
    """Each row is the image of its file, and the label that of the file's folder."""
    assert len(files) == len(labels) == len(images)
    for file, label, image in zip(files, labels.tolist(), images, strict=True):
        folder = unicodedata.normalize("NFC", file.split("/")[1])
        assert folders[label] == folder
        assert (image.numpy() == read_image(data_dir / file, 36)).all(), file


def counts(data, rows):
    """How many of the rows are of each class, by its folder's name."""
    return Counter(data.folders[label] for label in data.labels[rows].tolist())


def test_classes_are_folders_and_labels_their_places(tmp_path, capsys):
    write_zoo(tmp_path / "train")
    (tmp_path / "train/notes.txt").write_text("")
    (tmp_path / "train/empty").mkdir()
    write_image(tmp_path / "train/.hidden/1.png", 0)
    for folder in ("b", "a", ".cache", "unlabeled", "test"):
        (tmp_path / folder).mkdir()

    data = load_labelled(tmp_path, 36, CPU, 5)
    assert data.folders == ["1", "2", "10", "Bee", "ant"]
    assert data.labels.dtype == torch.int64
    assert_row_by_row(tmp_path, data.files, data.labels, data.images, data.folders)
    # In the order of the names, whatever the class: folds count STL-10's images.
    numbers = [int(Path(file).stem) for file in data.files]
    assert numbers == sorted(number for zoo in ZOO.values() for number in zoo)
    assert data.files[:3] == ["train/2/1.JPG", "train/2/2.bmp", "train/ant/2.bmp"]

    assert sorted([*data.train.tolist(), *data.val.tolist()]) == list(range(27))
    assert counts(data, data.train) == {"1": 3, "2": 11, "10": 1, "ant": 1, "Bee": 6}
    assert counts(data, data.val) == {"1": 1, "2": 2, "ant": 1, "Bee": 1}
    assert not load_labelled(tmp_path, 36, CPU, 6).val.equal(data.val)
    assert notes(capsys)[:4] == [
        f"note: a/, b/ in {tmp_path} will not be read",
        f"note: 1 files in {tmp_path / 'train'} are in no class and are not used",
        f"note: {tmp_path / 'train/empty'} holds no images and is left out",
        f"note: 10 in {tmp_path / 'train'} has one image only: it is used "
        "for training, and validation says nothing about that class",
    ]


@pytest.mark.parametrize("split", ["train", "val"])
def test_labels_count_in_the_fingerprint(tmp_path, split):
    for folder in ("here", "there"):
        write_zoo(tmp_path / folder / "train")
        write_zoo(tmp_path / folder / "val")
    moved = tmp_path / "there" / split
    (moved / "2/2.bmp").rename(moved / "1/2.bmp")
    here, there = (load_labelled(tmp_path / f, 36, CPU, 0) for f in ("here", "there"))
    assert torch.equal(here.images, there.images)
    assert here.fingerprint["checksum"] != there.fingerprint["checksum"]
    assert here.fingerprint["files"] == there.fingerprint["files"]


@pytest.mark.parametrize("classes", [[], ["cat"]])
def test_less_than_two_classes_are_refused(tmp_path, classes):
    (tmp_path / "train").mkdir()
    for name in classes:
        write_image(tmp_path / "train" / name / "1.png", 0)
    with pytest.raises(UserError, match="or images of one class only: add images of"):
        load_labelled(tmp_path, 36, CPU, 0)


@pytest.mark.parametrize("name", ["val", "valid"])
def test_a_folder_of_validation_images(tmp_path, capsys, name):
    write_zoo(tmp_path / "train")
    write_zoo(tmp_path / name, {"2": [50], "Bee": [1, 10], "ant": [2], "1": [7]}, 1)
    data = load_labelled(tmp_path, 36, CPU, 0)
    assert_row_by_row(tmp_path, data.files, data.labels, data.images, data.folders)
    assert data.train.tolist() == list(range(27))
    assert all(data.files[row].startswith("train/") for row in data.train)
    val_files = [data.files[row] for row in data.val]
    assert [file.partition("/")[2] for file in val_files] == [
        *("Bee/1.JPG", "ant/2.bmp", "1/7.webp", "Bee/10.bmp", "2/more/50.bmp"),
    ]
    says = f"{tmp_path / name} has no images of 10: validation says nothing of them"
    assert notes(capsys) == [f"note: {says}"]


def test_validation_folders_that_are_refused(tmp_path):
    write_zoo(tmp_path / "train")
    (tmp_path / "val").mkdir()
    with pytest.raises(UserError, match="val holds no images of a class: remove it"):
        load_labelled(tmp_path, 36, CPU, 0)
    write_image(tmp_path / "val/bat/1.png", 0)
    with pytest.raises(UserError, match="val/bat is a class without training images"):
        load_labelled(tmp_path, 36, CPU, 0)
    (tmp_path / "valid").mkdir()
    with pytest.raises(UserError, match=r"both .*val and .*valid: remove one"):
        load_labelled(tmp_path, 36, CPU, 0)


def test_test_images(tmp_path, capsys):
    known = ["1", "2", "10", "Bee", "ant"]

    folder = tmp_path / "test"

    def load():
        test, checksum = load_test(tmp_path, 36, CPU, known)
        return test.images, test.labels, checksum, notes(capsys)

    def assert_nothing(said):
        images, labels, checksum, found = load()
        assert (images.shape, images.dtype) == ((0, 3, 36, 36), torch.uint8)
        assert (labels.shape, labels.dtype) == ((0,), torch.int64)
        assert checksum == 0
        assert found[-1:] == said

    assert_nothing([])
    # As Kaggle has it: images, but no classes.
    write_image(folder / "1.png", 0)
    said = [f"note: {folder} has no folders of classes with images: no test"]
    assert_nothing(said)
    (folder / "1.png").unlink()
    assert_nothing(said)

    write_zoo(folder, {"10": [2, 10], "2": [1, 3, 100], "ant": [9]})
    images, labels, checksum, said = load()
    files = ["2/1.JPG", "10/2.bmp", "2/3.webp", "ant/9.JPG", "10/10.bmp"]
    files = [f"test/{name}" for name in [*files, "2/more/100.png"]]
    assert_row_by_row(tmp_path, files, labels, images, known)
    assert said == [
        f"note: {folder} has no images of 1, Bee: their test accuracy is not measured"
    ]

    (folder / "2/3.webp").rename(folder / "10/3.webp")
    assert load()[2] != checksum, "the pixels are the same, the labels are not"
    write_image(folder / "lion/1.png", 0)
    with pytest.raises(UserError, match="test/lion is a class without training images"):
        load()


def test_a_class_in_both_forms_of_unicode(tmp_path):
    """macOS decomposes accents: é is one letter here, two there, or both."""
    composed, decomposed = (unicodedata.normalize(f, "café") for f in ("NFC", "NFD"))
    write_zoo(tmp_path / "train", {composed: [1, 12], decomposed: [2], "dog": [1, 2]})
    write_zoo(tmp_path / "val", {decomposed: [3], "dog": [5]})
    write_zoo(tmp_path / "test", {decomposed: [4], "dog": [1], composed: [11]})
    data = load_labelled(tmp_path, 36, CPU, 0)
    assert data.folders == [composed, "dog"]
    assert_row_by_row(tmp_path, data.files, data.labels, data.images, data.folders)
    assert data.labels.tolist() == [0, 1, 0, 1, 0, 0, 1]
    test, _ = load_test(tmp_path, 36, CPU, data.folders)
    assert test.labels.tolist() == [1, 0, 0]


def test_the_names_of_numbered_classes(tmp_path):
    numbers = ["1", "2", "3"]
    assert class_names(tmp_path, numbers) == numbers
    file = tmp_path / "class_names.txt"
    file.write_text("ant\nbee\ncat\n")
    assert class_names(tmp_path, numbers) == ["ant", "bee", "cat"]
    assert class_names(tmp_path, ["1", "2"]) == ["1", "2"], "of another data set"
    assert class_names(tmp_path, ["0", "1", "2"]) == ["0", "1", "2"]
    assert class_names(tmp_path, ["x", "y", "z"]) == ["x", "y", "z"]

    # As editors on Windows write it.
    file.write_bytes(b"\xef\xbb\xbfant\r\n\r\n bee \r\ncat\r\n\r\n")
    assert class_names(tmp_path, numbers) == ["ant", "bee", "cat"]


# ---- Splits --------------------------------------------------------------------------
def test_splits_are_disjoint_stratified_and_from_the_seed(capsys):
    sizes = [1, 2, 3, 9, 10, 500, 1000, 1, 1, 1, 1, 1]
    labels = torch.arange(12).repeat_interleave(torch.tensor(sizes))
    order = torch.randperm(len(labels), generator=torch.manual_seed(0))
    labels = labels[order]
    names = list("abcdefghijkl")
    train, validation = stratified_split(labels, 3, "photos", names)
    assert torch.cat([train, validation]).sort().values.equal(torch.arange(1530))
    expected = [0, 1, 1, 1, 2, 80, 160, 0, 0, 0, 0, 0]
    assert torch.bincount(labels[validation], minlength=12).tolist() == expected
    note = "note: a, h, i, j, k and 1 more in photos has one image only"
    assert note in capsys.readouterr().out

    assert stratified_split(labels, 3, "photos", names)[1].equal(validation)
    assert not stratified_split(labels, 4, "photos", names)[1].equal(validation)
    stratified_split(labels[labels < 11], 3, "photos", names)
    assert "a, h, i, j, k in photos" in capsys.readouterr().out


def test_one_image_per_class_leaves_none_to_validate():
    with pytest.raises(UserError, match="photos/train has one image per class"):
        stratified_split(torch.tensor([0, 1]), 0, "photos/train", ["cat", "dog"])
