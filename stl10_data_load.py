"""Get the raw STL-10 binaries, check them, and write them as image folders: <data-dir>/{train,test,unlabelled}/.

python stl10_data_load.py        # downloads 2.6 GB unless the raw files are there
"""

import contextlib
import gzip
import http.client
import json
import os
import shutil
import tarfile
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import run_helpers as rh
import numpy as np
from PIL import Image
from torchvision.datasets import STL10
from torchvision.datasets.utils import calculate_md5

from dataset_helpers import STL10_SIDE, read_image

MD5 = dict(STL10.train_list + STL10.test_list)
SPLITS = {  # ours -> raw images, raw labels
    "train": ("train_X.bin", "train_y.bin"),
    "test": ("test_X.bin", "test_y.bin"),
    "unlabelled": ("unlabeled_X.bin", None),
}
IMAGE_BYTES = 3 * STL10_SIDE**2
TIMEOUT = 60  # seconds of silence until a server is given up


def main():
    parser = rh.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--raw-dir", type=Path, default=Path("raw_stl10"), help="the folder for the archive and the raw files")
    add("--data-dir", type=Path, default=Path("stl10_data"), help="the folder in which the image folders are written")
    add("--url", default=STL10.url, help="the address of the archive")
    add("--md5", help="the MD5 of the archive; None is the release's for a download from the default --url")
    args = parser.parse_args()
    raw = args.raw_dir if (args.raw_dir / "train_X.bin").exists() else args.raw_dir / STL10.base_folder
    if raw.exists():
        print(f"using the raw files in {raw}")
    else:
        extract(download(args.url, args.md5, args.raw_dir), raw)
    counts = check_raw(raw)
    files = [raw / name for names in SPLITS.values() for name in names if name]
    known = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
    marker, fingerprint = args.data_dir / ".complete.json", json.dumps({"counts": counts, "raw": known})
    there = {split: len(list((args.data_dir / split).rglob("*.png"))) for split in SPLITS}
    if there == counts and marker.is_file() and marker.read_text() == fingerprint:
        print(f"{args.data_dir} holds these images already: nothing to do")
        return
    args.data_dir.mkdir(parents=True, exist_ok=True)
    need = (sum(counts.values()) - sum(there.values())) * IMAGE_BYTES
    free = shutil.disk_usage(args.data_dir).free  # PNGs are a little smaller than raw images
    if need > free:
        sizes = f"{free / 1e6:.0f} MB of free disk, and {need / 1e6:.0f} MB will be written"
        raise rh.UserError(f"{args.data_dir} has {sizes}: make room, or choose another folder")
    files.sort(key=lambda file: file.stat().st_size)  # others than the release are told apart by a small one already
    release = all(calculate_md5(file) == MD5[file.name] for file in files)
    print(f"these files are {'' if release else 'not '}the STL-10 release")
    for split in SPLITS:
        write_split(raw, args.data_dir, split)
    for extra in ("class_names.txt", "fold_indices.txt"):
        if (raw / extra).exists():
            shutil.copy(raw / extra, args.data_dir)
    with rh.whole_file(marker, "w") as file:
        file.write(fingerprint)
    print(f"wrote {args.data_dir}: " + ", ".join(f"{counts[split]} {split}" for split in SPLITS))


def download(url, md5, raw_dir):
    """The archive under `raw_dir`, fetched unless it is there. It has its name only once it is whole."""
    archive, part = raw_dir / STL10.filename, raw_dir / f".{STL10.filename}.part"
    if archive.is_file():
        if md5 and calculate_md5(archive) != md5:
            raise rh.UserError(f"the MD5 of {archive} is not {md5}: remove it to have it fetched again")
        print(f"using the archive {archive}")
        return archive
    raw_dir.mkdir(parents=True, exist_ok=True)
    print(f"fetching {url}")
    try:
        fetch(url, part)
    except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException, ValueError) as error:
        advice = f"run this again to go on from there, or put the raw files into {raw_dir}"
        raise rh.UserError(f"{url} could not be fetched ({str(error) or type(error).__name__}): {advice}") from None
    md5 = md5 or (STL10.tgz_md5 if url == STL10.url else None)
    if md5 and calculate_md5(part) != md5:
        part.unlink()
        raise rh.UserError(f"the file at {url} is damaged or another one (its MD5 is not {md5}): run this again")
    os.replace(part, archive)
    return archive


def fetch(url, part):
    """Get `url` into the file `part`, going on from its present end where the server can."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
            raise
        if error.headers.get("Content-Range") != f"bytes */{have}":  # else it had come to its end
            part.unlink()  # of another file than the server's: from the start
            fetch(url, part)
        return
    further = response.status == http.client.PARTIAL_CONTENT
    if further and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        raise ConnectionError("the server sent another part of the file than was asked for")
    with response, open(part, "ab" if further else "wb") as file:
        length = response.headers.get("Content-Length")
        total = length and file.tell() + int(length)
        with rh.progress_bar(total, "fetching", "B", file.tell(), unit_scale=True) as bar:
            while block := response.read1(2**16):
                file.write(block)
                bar.update(len(block))
        if total and file.tell() != total:
            raise ConnectionError(f"the connection broke after {file.tell()} of {total} bytes")


def extract(archive, raw):
    """Unpack the archive's folder stl10_binary to `raw`, which appears only once it is whole."""
    part = raw.with_name(f".{raw.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    print(f"unpacking {archive}")
    try:
        with gzip.open(archive) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            tar.extractall(part, filter="data")
            while stream.read(2**20):  # to the end, where gzip keeps its checksum
                pass
    except tarfile.FilterError as error:
        raise rh.UserError(f"{archive} is not to be trusted ({error}): remove it and get another copy") from None
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, OverflowError) as error:
        raise rh.UserError(f"{archive} is cut short or damaged ({error}): remove it and run this again") from None
    if not (part / STL10.base_folder).is_dir():
        raise rh.UserError(f"{archive} holds no folder {STL10.base_folder}: remove it, and check --url")
    os.replace(part / STL10.base_folder, raw)
    shutil.rmtree(part)


def check_raw(raw):
    """The number of images of every split, after checking sizes and labels of all raw files."""
    counts = {}
    for split, (images, labels) in SPLITS.items():
        if missing := [raw / name for name in (images, labels) if name and not (raw / name).is_file()]:
            raise rh.UserError(f"{missing[0]} is missing: put it there, or remove {raw} to have it fetched")
        size = (raw / images).stat().st_size
        if size == 0 or size % IMAGE_BYTES:
            what = "is empty" if size == 0 else f"has {size} bytes, no multiple of {IMAGE_BYTES}: it is cut short"
            raise rh.UserError(f"{raw / images} {what}: get it again")
        counts[split] = size // IMAGE_BYTES
        if labels:
            if (count := (raw / labels).stat().st_size) != counts[split]:
                raise rh.UserError(f"{raw / labels} has {count} labels for {counts[split]} images: get both again")
            values = np.fromfile(raw / labels, np.uint8)
            if len(wrong := values[(values < 1) | (values > 10)]):
                raise rh.UserError(f"{raw / labels} has the label {wrong[0]}, not from 1 to 10: get it again")
    return counts


def write_split(raw, data_dir, split):
    """Every image as a lossless PNG, <split>/[<label>/]<index>.png, by a thread per core; whole ones are left alone."""
    images_name, labels_name = SPLITS[split]
    images = np.memmap(raw / images_name, np.uint8, "r").reshape(-1, 3, STL10_SIDE, STL10_SIDE)  # column by column
    labels = np.fromfile(raw / labels_name, np.uint8) if labels_name else [""] * len(images)
    folders = [data_dir / split / str(label) for label in labels]
    for folder in set(folders):
        folder.mkdir(parents=True, exist_ok=True)

    def write(index):
        path, pixels, there = folders[index] / f"{index}.png", images[index].transpose(2, 1, 0), None
        with contextlib.suppress(Exception):  # it does not exist, or a crash has cut it short
            there = read_image(path, STL10_SIDE).transpose(1, 2, 0)
        if there is None:
            part = path.with_suffix(".part")
            Image.fromarray(np.ascontiguousarray(pixels)).save(part, "PNG", compress_level=1)  # twice as fast as 6
            os.replace(part, path)
        elif not (there == pixels).all():
            raise rh.UserError(f"{path} shows something else than the raw file: choose another --data-dir")
        bar.update()

    with rh.progress_bar(len(images), f"writing {split}", " images") as bar, ThreadPoolExecutor() as pool:
        list(pool.map(write, range(len(images))))
    if len(list((data_dir / split).rglob("*.png"))) != len(images):
        raise rh.UserError(f"{data_dir / split} holds other images than {raw}: remove it, or choose another --data-dir")


if __name__ == "__main__":
    rh.run_script(main)
