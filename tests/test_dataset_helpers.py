"""Any folder of images to a tensor: files, formats, classes, memory and splits."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataset_helpers
from dataset_helpers import (
    class_names,
    list_images,
    load_images,
    load_labelled,
    natural_key,
    read_image,
    stratified_split,
    unlabelled_folder,
)
from runtime.errors import UserError
from runtime.memory import free_memory

CPU = torch.device("cpu")
ENDINGS = [".jpg", ".PNG", ".bmp", ".tif", ".webp", ".ppm"]
SIZES = [(96, 96), (300, 200), (50, 120), (64, 64)]


def write_image(path, seed, size=(48, 48)):
    """A smooth random picture, in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)


def write_classes(folder, classes, count, seed=0):
    """A folder of `count` images for each class."""
    for label, name in enumerate(classes):
        for i in range(count):
            write_image(folder / name / f"IMG {i}.jpg", (seed, label, i))


def write_mixed_folder(folder):
    """40 images of all formats and several sizes, and four files that are none."""
    for i in range(40):
        subfolder = folder if i % 3 else folder / "deep/er"
        ending = ENDINGS[i % 6]
        write_image(subfolder / f"odd näme ({i}){ending}", i, SIZES[i % 4])
    (folder / "notes.txt").write_text("no image")
    write_image(folder / ".hidden.png", 99)
    write_image(folder / ".thumbnails/1.png", 99)
    write_image(folder / "deep/.thumbnails/1.png", 99)


def relative_names(files, folder):
    return [file.relative_to(folder).as_posix() for file in files]


# ---- Files ---------------------------------------------------------------------------
def test_every_image_of_a_folder_is_found(tmp_path, capsys):
    write_mixed_folder(tmp_path)
    files = list_images(tmp_path)
    assert len(files) == 40
    assert capsys.readouterr().out.count("note: 1 files") == 1

    numbers = [int(re.search(r"\((\d+)\)", file.name)[1]) for file in files]
    expected = sorted(numbers, key=lambda i: (i % 3 != 0, i))
    assert numbers == expected, "folders first, numbers in their order"


def test_the_american_name_of_the_folder(tmp_path):
    assert unlabelled_folder(tmp_path) == tmp_path / "unlabelled"
    (tmp_path / "unlabeled").mkdir()
    assert unlabelled_folder(tmp_path) == tmp_path / "unlabeled"


def test_links_are_followed_and_what_is_no_file_is_counted(tmp_path, capsys):
    photos = tmp_path / "photos"
    write_image(tmp_path / "elsewhere/1.png", 1)
    write_image(photos / "2.png", 2)
    (photos / "more").symlink_to(tmp_path / "elsewhere")
    (photos / "gone.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(photos / "pipe.png")  # reading it would wait for ever

    files = list_images(photos)
    assert relative_names(files, photos) == ["2.png", "more/1.png"]
    assert "note: 2 files" in capsys.readouterr().out


def test_each_real_folder_is_searched_once(tmp_path):
    """A link may lead back to a parent, or two of them to the same folder."""
    photos = tmp_path / "photos"
    write_image(photos / "1.png", 1)
    write_image(photos / "deep/2.png", 2)
    (photos / "deep/back").symlink_to(photos)
    write_image(tmp_path / "elsewhere/3.png", 3)
    (photos / "first").symlink_to(tmp_path / "elsewhere")
    (photos / "second").symlink_to(tmp_path / "elsewhere")

    files = list_images(photos)
    assert relative_names(files, photos) == ["1.png", "deep/2.png", "first/3.png"]


def test_a_folder_that_is_itself_a_link(tmp_path):
    write_image(tmp_path / "elsewhere/1.png", 1)
    (tmp_path / "photos").symlink_to(tmp_path / "elsewhere")
    assert list_images(tmp_path / "photos") == [tmp_path / "photos/1.png"]


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    """As the kernel would say it: root may read any folder."""
    write_image(tmp_path / "open/1.png", 1)
    write_image(tmp_path / "secret/2.png", 2)
    scandir = os.scandir

    def refuse_secret(folder):
        if Path(folder).name == "secret":
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse_secret)
        with pytest.raises(PermissionError) as error:
            list_images(tmp_path)
    assert error.value.filename == str(tmp_path / "secret")


def test_folders_without_images(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist: .*stl10_data_load"):
        list_images(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(UserError, match=r"holds no images: .*stl10_data_load"):
        list_images(tmp_path)


def test_natural_order():
    names = ["10.png", "9.png", "a2", "a10", "1/3.png", "01.png", "B", "a"]
    expected = ["01.png", "1/3.png", "9.png", "10.png", "B", "a", "a2", "a10"]
    assert sorted(names, key=natural_key) == expected


# ---- Reading -------------------------------------------------------------------------
@pytest.mark.parametrize("side", [96, 48, 128])
@pytest.mark.parametrize(
    ("size", "name"),
    [((300, 200), "a.jpg"), ((96, 96), "a.png"), ((50, 120), "a.png")],
)
def test_images_are_resized_and_cropped_as_pillow_does(tmp_path, size, name, side):
    write_image(tmp_path / name, 3, size)
    with Image.open(tmp_path / name) as image:
        scale = side / min(size)
        edges = [side if edge == min(size) else int(edge * scale) for edge in size]
        if size != (side, side):
            image = image.resize(edges, Image.Resampling.BICUBIC)
        width, height = edges
        left = round((width - side) / 2)
        top = round((height - side) / 2)
        expected = np.asarray(image.crop((left, top, left + side, top + side)))

    read = read_image(tmp_path / name, side)
    assert (read == expected.transpose(2, 0, 1)).all()


def test_photographs_of_a_turned_camera_stand_upright(tmp_path):
    halves = np.uint8([[0, 255]]).repeat(48, 0).repeat(24, 1)
    image = Image.fromarray(halves).convert("RGB")
    exif = image.getexif()
    exif[0x0112] = 6  # the top of the picture is on its right
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)

    read = read_image(tmp_path / "a.jpg", 48)
    assert read[:, :20].mean() < 20
    assert read[:, 28:].mean() > 235


def ramp():
    """A ramp of 48 × 48 numbers of 16 bits, from 0 to 65,535."""
    return np.linspace(0, 65535, 48).astype(np.uint16)[None].repeat(48, 0)


def test_pixels_of_16_bits_are_scaled(tmp_path):
    """Pillow's own conversion would clip them at 255."""
    pixels = ramp()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    Image.fromarray(pixels.astype(">u2")).save(tmp_path / "big_endian.tif")
    # 16 bits that come as 32, as Pillow reads some PNG files.
    Image.fromarray(pixels.astype(np.int32)).save(tmp_path / "b.tif")

    for name in ("a.png", "a.tif", "big_endian.tif", "b.tif"):
        read = read_image(tmp_path / name, 48)
        assert (read == pixels >> 8).all(), name


@pytest.mark.parametrize(
    "pixels",
    [
        ramp().astype(np.int32) * 2,
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


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000), (4000, 30)])
def test_long_flat_pictures_are_cropped_before_they_are_resized(
    tmp_path, monkeypatch, size
):
    """A strip of 20,000 × 1 pixels, resized as a whole, would take gigabytes."""
    image = Image.new("RGB", size, "white")
    width, height = size
    left = width // 2 - 4 * min(size)
    top = height // 2 - 4 * min(size)
    middle = (left, top, left + 8 * min(size), top + 8 * min(size))
    image.paste((10, 10, 10), middle)
    image.save(tmp_path / "a.png")

    sizes = []
    resize = dataset_helpers.TF.resize

    def recorded_resize(image, *rest):
        sizes.append(image.size)
        return resize(image, *rest)

    monkeypatch.setattr(dataset_helpers.TF, "resize", recorded_resize)
    read = read_image(tmp_path / "a.png", 96)
    assert sorted(sizes[0]) == [min(size), 8 * min(size)]
    assert read.shape == (3, 96, 96)
    assert (read == 10).all(), "its middle"


def test_images_and_their_checksum(tmp_path):
    files = [tmp_path / "0.png", tmp_path / "1.png"]
    for seed, file in enumerate(files):
        write_image(file, seed)
    images, checksum = load_images(files, 48, CPU, "images")
    assert images.shape == (2, 3, 48, 48)
    assert images.dtype == torch.uint8
    assert (images[1].numpy() == read_image(files[1], 48)).all()

    assert load_images(files, 48, CPU, "images")[1] == checksum
    assert load_images(files[::-1], 48, CPU, "images")[1] != checksum


def test_unreadable_images_are_named_together(tmp_path):
    files = [tmp_path / f"{i}.png" for i in range(12)]
    for file in files:
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="and 2 more: repair or remove them"):
        load_images(files, 48, CPU, "images")


# ---- Memory --------------------------------------------------------------------------
def test_images_that_do_not_fit_in_memory(tmp_path, monkeypatch):
    write_image(tmp_path / "0.png", 0)
    files = [tmp_path / "0.png"] * 24
    monkeypatch.setattr(dataset_helpers, "free_memory", lambda device: 24 * 3 * 50 * 50)
    load_images(files, 50, CPU, "images")
    problem = r"24 images of 51 × 51 pixels take .* 0\.00018 GB"
    advice = "use a smaller --image-size or fewer images"
    with pytest.raises(UserError, match=f"{problem}.*: {advice}"):
        load_images(files, 51, CPU, "images")


def test_free_memory_is_what_linux_can_give(monkeypatch):
    text = "MemTotal: 9000000 kB\nMemFree: 10 kB\nMemAvailable:  2000000 kB\n"

    def read_text(path):
        assert path == Path("/proc/meminfo")
        return text

    monkeypatch.setattr(Path, "read_text", read_text)
    assert free_memory(CPU) == 1024 * 2_000_000


def test_a_system_without_proc(monkeypatch):
    def nothing(path, *_):
        raise FileNotFoundError(path)

    assert 10**8 < free_memory(CPU) < 10**14
    monkeypatch.setattr(Path, "read_text", nothing)
    assert free_memory(CPU) == float("inf")


# ---- Classes -------------------------------------------------------------------------
def test_classes_are_folders_and_labels_their_places(tmp_path, capsys):
    write_classes(tmp_path, ["zebra", "cat", "dog"], 14)
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden").mkdir()
    images, labels, classes, _ = load_labelled(tmp_path, 36, CPU)
    assert images.shape == (42, 3, 36, 36)
    assert classes == ["cat", "dog", "zebra"]
    assert labels.tolist() == [0, 1, 2] * 14, "in the order of the files' names"
    assert labels.dtype == torch.int64
    assert "note: 1 files" in capsys.readouterr().out


def test_classes_with_numbers_are_in_their_order(tmp_path):
    write_classes(tmp_path, ["10", "9", "1"], 2)
    _, _, classes, _ = load_labelled(tmp_path, 36, CPU)
    assert classes == ["1", "9", "10"]


def test_an_empty_folder_of_a_class_is_skipped_with_a_note(tmp_path, capsys):
    write_classes(tmp_path, ["cat", "zebra"], 2)
    (tmp_path / "dog").mkdir()
    (tmp_path / ".ipynb_checkpoints").mkdir()
    _, labels, classes, _ = load_labelled(tmp_path, 36, CPU)
    assert classes == ["cat", "zebra"]
    assert labels.tolist() == [0, 1, 0, 1]
    notes = capsys.readouterr().out.splitlines()
    assert notes == [f"note: {tmp_path / 'dog'} holds no images and is left out"]


def test_classes_of_another_folder(tmp_path):
    """Test images have the training images' labels; some classes may have none."""
    write_classes(tmp_path, ["dog", "zebra"], 2)
    known = ["cat", "dog", "zebra"]
    _, labels, classes, _ = load_labelled(tmp_path, 36, CPU, known)
    assert classes == known
    assert labels.tolist() == [1, 2, 1, 2]
    with pytest.raises(UserError, match="zebra is a class without training images: "):
        load_labelled(tmp_path, 36, CPU, ["cat", "dog"])


@pytest.mark.parametrize("classes", [[], ["cat"]])
def test_less_than_two_classes_are_refused(tmp_path, classes):
    write_classes(tmp_path, classes, 2)
    with pytest.raises(
        UserError, match="holds no images, or images of one class only: add"
    ):
        load_labelled(tmp_path, 36, CPU)


def test_the_names_of_numbered_classes(tmp_path):
    numbers = ["1", "2", "3"]
    assert class_names(tmp_path, numbers) == numbers
    file = tmp_path / "class_names.txt"
    file.write_text("ant\nbee\ncat\n")
    assert class_names(tmp_path, numbers) == ["ant", "bee", "cat"]
    assert class_names(tmp_path, ["1", "2"]) == ["1", "2"], "of another data set"
    assert class_names(tmp_path, ["x", "y", "z"]) == ["x", "y", "z"]

    # As editors on Windows write it.
    file.write_bytes(b"\xef\xbb\xbfant\r\n\r\n bee \r\ncat\r\n\r\n")
    assert class_names(tmp_path, numbers) == ["ant", "bee", "cat"]


# ---- Splits --------------------------------------------------------------------------
def test_splits_are_disjoint_stratified_and_from_the_seed():
    labels = torch.arange(5000) % 10
    train, validation = stratified_split(labels, 3, "train")
    assert len(train) == 4200
    assert len(validation) == 800
    assert torch.cat([train, validation]).sort().values.equal(torch.arange(5000))
    assert torch.bincount(labels[validation]).tolist() == [80] * 10

    _, again = stratified_split(labels, 3, "train")
    assert again.equal(validation)
    _, of_another_seed = stratified_split(labels, 4, "train")
    assert not of_another_seed.equal(validation)


def test_too_few_images_to_set_some_apart():
    with pytest.raises(UserError, match="photos/train has too few images per class"):
        stratified_split(torch.tensor([0, 1, 0, 1]), 0, "photos/train")
