"""Get the raw STL-10 binaries, check them and write them as folders of images.

python stl10_data_load.py        # downloads 2.6 GB unless the raw files are there

The folders are <data-dir>/{train,test,unlabelled}/.
"""

import gzip
import http.client
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import STL10
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import calculate_md5

from dataset_helpers import STL10_SIDE
from runtime.arguments import Parser, file_path
from runtime.bars import in_threads, progress_bar
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.script import run_script

SPLITS = {  # ours -> raw images, raw labels
    "train": ("train_X.bin", "train_y.bin"),
    "test": ("test_X.bin", "test_y.bin"),
    "unlabelled": ("unlabeled_X.bin", None),
}
EXTRAS = ("class_names.txt", "fold_indices.txt")  # copied where the release has them
IMAGE_BYTES = 3 * STL10_SIDE**2
TIMEOUT = 60  # seconds to wait for a server that sends nothing


def parse_args(argv=None):
    parser = Parser(
        "Get the raw STL-10 files and write them as image folders.",
        example="python stl10_data_load.py",
    )
    add = parser.add_argument
    # fmt: off
    add("--raw-dir", type=file_path, default=Path("raw_stl10"), metavar="PATH",
        help="folder for the archive and the raw files")
    add("--data-dir", type=file_path, default=Path("stl10_data"), metavar="PATH",
        help="folder in which the image folders are written")
    add("--url", default=STL10.url,
        help="address of the archive")
    add("--md5",
        help="MD5 of the archive; by default STL-10's, with the default --url")
    # fmt: on
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)

    # Someone who unpacked the archive by hand may have the files in the folder itself.
    raw = args.raw_dir / STL10.base_folder
    if (args.raw_dir / "train_X.bin").exists():
        raw = args.raw_dir
    if raw.exists():
        print(f"using the raw files in {raw}")
    else:
        archive = download(args.url, args.md5, args.raw_dir)
        extract(archive, raw)
    counts = check_raw(raw)

    # Images of an earlier run are compared with the raw files, pixel by pixel: so one
    # that was killed is completed, and folders of other images are left alone.
    missing = {split: missing_images(raw, args.data_dir, split) for split in SPLITS}
    to_write = sum(len(indices) for indices in missing.values())
    if to_write == 0:
        print(f"{args.data_dir} holds these images already: nothing to do")
        return

    args.data_dir.mkdir(parents=True, exist_ok=True)
    check_disk_space(args.data_dir, to_write)

    # The extras come first: once all images are there, nothing is copied any more.
    for name in EXTRAS:
        if (raw / name).exists():
            with atomic_write(args.data_dir / name) as file:
                file.write((raw / name).read_bytes())
    for split, indices in missing.items():
        write_split(raw, args.data_dir, split, indices)

    summary = ", ".join(f"{counts[split]} {split}" for split in SPLITS)
    print(f"wrote {args.data_dir}: {summary}")


# ---- From the server to raw files ----------------------------------------------------
def download(url, md5, raw_dir):
    """The archive under `raw_dir`, fetched unless it is there.

    md5: its checksum, or None. It has its name only once it is whole.
    """
    archive = raw_dir / STL10.filename
    if archive.is_file():
        # One that we fetched was checked before it got this name, and a user's own may
        # be another archive: it is compared only with an MD5 that was given.
        if md5 and calculate_md5(archive) != md5:
            raise UserError(
                f"the MD5 of {archive} is not {md5}",
                "remove it to have it fetched again",
            )
        print(f"using the archive {archive}")
        return archive

    raw_dir.mkdir(parents=True, exist_ok=True)
    part = raw_dir / f".{STL10.filename}.part"
    print(f"fetching {url}")
    try:
        fetch(url, part)
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        ConnectionError,
        TimeoutError,
        ValueError,  # not an address at all
    ) as error:
        reason = str(error) or type(error).__name__
        raise UserError(
            f"{url} could not be fetched ({reason})",
            "run this again to continue from there, or put the raw files into "
            f"{raw_dir}",
        ) from None

    if not md5 and url == STL10.url:
        md5 = STL10.tgz_md5
    if md5 and calculate_md5(part) != md5:
        # Nothing can continue from a damaged file: the next run begins again.
        part.unlink()
        raise UserError(
            f"the file at {url} is damaged or another one (its MD5 is not {md5})",
            "run this again",
        )
    os.replace(part, archive)
    return archive


def fetch(url, part):
    """Get `url` into the file `part`, continuing from its end where the server can."""
    done = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url)
    if done:
        request.add_header("Range", f"bytes={done}-")

    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        # Status 416: the server has no bytes from `done` on.
        no_more_bytes = error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE
        if not done or not no_more_bytes:
            raise
        if error.headers.get("Content-Range") == f"bytes */{done}":
            # Its file ends there: the last run got every byte, and was killed just
            # before it could say so.
            return
        # Its file is shorter, so the part is of another file. Start again, once:
        # without a part, no range is asked for, and there is no status 416.
        part.unlink()
        fetch(url, part)
        return

    # A server that cannot continue sends the whole file again, with another status.
    continued = response.status == http.client.PARTIAL_CONTENT
    if continued:
        # Bytes from elsewhere, behind those that are there, would make a damaged file.
        sent = response.headers.get("Content-Range", "")
        if not sent.startswith(f"bytes {done}-"):
            problem = "the server sent another part of the file than was asked for"
            raise ConnectionError(problem)
    else:
        done = 0

    total = None
    length = response.headers.get("Content-Length")
    if length:
        total = done + int(length)
    bar = progress_bar(total, "fetching", "B", done, unit_scale=True)
    with response, open(part, "ab" if continued else "wb") as file, bar:
        while True:
            block = response.read1(2**16)
            if not block:
                break
            file.write(block)
            bar.update(len(block))
        # A connection that breaks looks like the end of the file.
        if total and file.tell() != total:
            received = f"{file.tell()} of {total} bytes"
            raise ConnectionError(f"the connection broke after {received}")


def extract(archive, raw):
    """Unpack the archive's folder stl10_binary to `raw`, which appears only whole."""
    part = raw.with_name(f".{raw.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed
    part.mkdir(parents=True)
    print(f"unpacking {archive}")

    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|") as tar:
                # The filter refuses paths, links and devices that leave the folder.
                tar.extractall(part, filter="data")
            # tarfile stops at the archive's last member. gzip compares its checksum
            # only at the end of the stream, so read on to there.
            while stream.read(2**20):
                pass
    except tarfile.FilterError as error:
        raise UserError(
            f"{archive} is not to be trusted ({error})",
            "remove it and get another copy",
        ) from None
    except (
        tarfile.TarError,
        gzip.BadGzipFile,
        zlib.error,
        EOFError,
        ValueError,
        OverflowError,
    ) as error:
        raise UserError(
            f"{archive} is cut short or damaged ({error})",
            "remove it and run this again",
        ) from None

    unpacked = part / STL10.base_folder
    if not unpacked.is_dir():
        raise UserError(
            f"{archive} holds no folder {STL10.base_folder}",
            "remove it, and check --url",
        )
    os.replace(unpacked, raw)
    shutil.rmtree(part)


def check_raw(raw):
    """The number of images of every split, once all raw files have been checked."""
    counts = {}
    for split, (images_name, labels_name) in SPLITS.items():
        for name in (images_name, labels_name):
            if name and not (raw / name).is_file():
                raise UserError(
                    f"{raw / name} is missing",
                    f"put it there, or remove {raw} to have it fetched",
                )
        counts[split] = count_images(raw / images_name)
        if labels_name:
            check_labels(raw / labels_name, counts[split])
    return counts


def count_images(path):
    """How many images a raw file holds."""
    size = path.stat().st_size
    if size == 0:
        raise UserError(
            f"{path} is empty",
            "get it again",
        )
    if size % IMAGE_BYTES:
        raise UserError(
            f"{path} is cut short: {size} bytes, not a multiple of {IMAGE_BYTES}",
            "get it again",
        )
    return size // IMAGE_BYTES


def check_labels(path, count):
    """Refuse a raw file that does not hold `count` labels from 1 to 10."""
    # The size comes first: a file of another kind may be too large to read.
    size = path.stat().st_size
    if size != count:
        raise UserError(
            f"{path} has {size} labels for {count} images",
            "get both again",
        )
    labels = np.fromfile(path, np.uint8)
    wrong = labels[(labels < 1) | (labels > 10)]
    if len(wrong):
        raise UserError(
            f"{path} has the label {wrong[0]}, not from 1 to 10",
            "get it again",
        )


# ---- From raw files to folders of images ---------------------------------------------
def raw_images(raw, split):
    """The images of a raw file, uint8 [N, S, S, 3]; each is read when it is used."""
    images_name, _ = SPLITS[split]
    images = np.memmap(raw / images_name, np.uint8, "r")
    images = images.reshape(-1, 3, STL10_SIDE, STL10_SIDE)  # [N, channel, column, row]
    return images.transpose(0, 3, 2, 1)


def image_paths(raw, data_dir, split):
    """Where each raw image belongs: <data-dir>/<split>/[<label>/]<index>.png."""
    folder = data_dir / split
    _, labels_name = SPLITS[split]
    if labels_name is None:
        return [folder / f"{i}.png" for i in range(len(raw_images(raw, split)))]
    labels = np.fromfile(raw / labels_name, np.uint8)
    return [folder / str(label) / f"{i}.png" for i, label in enumerate(labels)]


def missing_images(raw, data_dir, split):
    """Indices of the raw images that are not written yet, or not whole.

    A folder that holds other images is refused before anything is written.
    """
    images = raw_images(raw, split)
    paths = image_paths(raw, data_dir, split)
    files = (data_dir / split).rglob("*")
    existing = {path for path in files if path.suffix.lower() in IMG_EXTENSIONS}
    if not existing.issubset(paths):
        raise UserError(
            f"{data_dir / split} holds other images than {raw}",
            "remove it, or choose another --data-dir",
        )

    def is_missing(index):
        path = paths[index]
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except Exception:
            # It does not exist, or a crash has cut it short: Pillow raises a dozen
            # kinds of errors for bytes that are not an image.
            return True
        if not np.array_equal(pixels, images[index]):
            raise UserError(
                f"{path} shows something else than the raw file",
                "choose another --data-dir",
            )
        return False

    with progress_bar(len(paths), f"comparing {split}", " images") as bar:
        found = in_threads(is_missing, range(len(paths)), bar)
    return [index for index, missing in enumerate(found) if missing]


def check_disk_space(folder, count):
    """Refuse to begin where `count` images do not fit on the disk."""
    needed_bytes = count * IMAGE_BYTES  # PNGs are a little smaller than raw images
    free_bytes = shutil.disk_usage(folder).free
    if needed_bytes > free_bytes:
        raise UserError(
            f"{folder} has {free_bytes / 1e6:.0f} MB of free disk, and "
            f"{needed_bytes / 1e6:.0f} MB will be written",
            "make room, or choose another folder",
        )


def write_split(raw, data_dir, split, indices=None):
    """Write images of a split as lossless PNGs; indices: which, by default all."""
    images = raw_images(raw, split)
    paths = image_paths(raw, data_dir, split)
    if indices is None:
        indices = range(len(paths))
    # Before the threads start: mkdir for each image would be 113,000 system calls.
    for folder in {path.parent for path in paths}:
        folder.mkdir(parents=True, exist_ok=True)

    def write(index):
        # Not by atomic_write: to wait for the disk 113,000 times takes longer than all
        # else, and the next run finds and rewrites what a crash cuts short.
        part = paths[index].with_suffix(".part")
        pixels = np.ascontiguousarray(images[index])
        image = Image.fromarray(pixels)
        image.save(part, "PNG", compress_level=1)  # twice as fast as the default, 6
        os.replace(part, paths[index])

    with progress_bar(len(indices), f"writing {split}", " images") as bar:
        in_threads(write, indices, bar)


if __name__ == "__main__":
    run_script(main)
