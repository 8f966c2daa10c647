"""Get the raw STL-10 binaries, check them, and write them as image folders: <data-dir>/{train,test,unlabelled}/.

python stl10_data_load.py                # downloads 2.6 GB unless the raw files are there
python stl10_data_load.py --synthetic    # no download: ten made-up classes in the same layout
"""

import contextlib
import gzip
import http.client
import json
import math
import os
import shutil
import signal
import tarfile
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import STL10
from torchvision.datasets.utils import calculate_md5
from tqdm import tqdm

from dataset_helpers import IMAGE_BYTES, STL10_SIDE, progress_bar, read_image
from run_helpers import (
    Parser,
    UserError,
    check_space,
    number,
    read_text,
    run_script,
    storage_error,
    sync_folder,
    whole_file,
)

MD5 = dict(STL10.train_list + STL10.test_list)
SPLITS = {  # ours -> raw images, raw labels
    "train": ("train_X.bin", "train_y.bin"),
    "test": ("test_X.bin", "test_y.bin"),
    "unlabelled": ("unlabeled_X.bin", None),
}
SYNTHETIC_COUNTS = {"train": 2000, "test": 2000, "unlabelled": 2000}
IMAGES_PER_TASK = 64
SILENT_SECONDS = 60  # until a server is given up
SLOWEST = 1000  # bytes per second
BAD_HEADERS = (EOFError, ValueError, OverflowError, RecursionError)  # what tarfile raises besides errors of its own


def parse_args(argv=None):
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--raw-dir", type=Path, default=Path("raw_stl10"), help="the raw files are in its folder stl10_binary")
    add("--data-dir", type=Path, default=Path("stl10_data"), help="where the image folders are written")
    add("--url", default=STL10.url, help="of the archive, should the raw files not be there")
    add("--md5", help="checksum of the archive (default: the release's, if it is fetched from the release's --url)")
    parser.add_switch("--synthetic", False, "write a small made-up raw set to --raw-dir first")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of --synthetic")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    raw = args.raw_dir / STL10.base_folder
    if raw.exists():
        print(f"using the raw files in {raw}{'; remove them to have others made' if args.synthetic else ''}")
    elif args.synthetic:
        write_synthetic(raw, args.seed)
    else:
        extract(download(args.url, args.md5, args.raw_dir), raw)
    counts = check_raw(raw)
    if is_done(raw, args.data_dir, counts):
        print(f"{args.data_dir} holds these images already: nothing to do")
        return
    args.data_dir.mkdir(parents=True, exist_ok=True)
    written = sum(file.stat().st_size for file in args.data_dir.rglob("*.png"))
    check_space(args.data_dir, sum(counts.values()) * IMAGE_BYTES, written)  # PNGs are smaller, if not by much
    print(f"these files are {'the STL-10 release' if is_release(raw) else 'not the STL-10 release'}")
    for split in SPLITS:
        write_split(raw, args.data_dir, split)
    write_marker(raw, args.data_dir, counts)
    print(f"wrote {args.data_dir}: " + ", ".join(f"{counts[split]} {split}" for split in SPLITS))


# ---------------------------------------------------------------------------------------------------------------------
# The raw files
# ---------------------------------------------------------------------------------------------------------------------


def download(url, md5, raw_dir):
    """The archive under `raw_dir`, fetched unless it is there. It has its name only once it is whole."""
    archive, part = raw_dir / STL10.filename, raw_dir / f".{STL10.filename}.part"
    if archive.is_file():
        if md5 and calculate_md5(archive) != md5:
            raise UserError(f"the MD5 of {archive} is not {md5}: remove it to have it fetched again")
        print(f"using the archive {archive}")
        return archive
    raw_dir.mkdir(parents=True, exist_ok=True)
    print(f"fetching {url}")
    try:
        fetch(url, part)
    except (OSError, http.client.HTTPException, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and storage_error(error):
            raise
        raise UserError(
            f"{url} could not be fetched ({str(error) or type(error).__name__}): run this again to go on from there, "
            f"or put the raw files into {raw_dir}"
        ) from None
    md5 = md5 or (STL10.tgz_md5 if url == STL10.url else None)
    if md5 and calculate_md5(part) != md5:
        part.unlink()
        raise UserError(f"what came from {url} is not what it should be (its MD5 is not {md5}): run this again")
    os.replace(part, archive)
    sync_folder(raw_dir)
    return archive


def fetch(url, part):
    """Get `url` into the file `part`, going on from its present end where the server can."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with no_silence() as note:
        try:
            response = urllib.request.urlopen(request, timeout=SILENT_SECONDS)
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
            check_space(part.parent, total or 0, file.tell())
            bar = tqdm(total=total, initial=file.tell(), unit="B", unit_scale=True, desc="fetching", disable=None)
            with bar:
                while block := response.read1(2**16):  # what has come: read() would wait for all of it
                    file.write(block)
                    bar.update(len(block))
                    note(len(block))
            if total and file.tell() != total:
                raise ConnectionError(f"the connection broke after {file.tell()} of {total} bytes")
    with open(part, "rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def no_silence():
    """Raise TimeoutError inside when fewer than SLOWEST bytes per second come; yields the function to tell of them.

    An alarm looks every SILENT_SECONDS: a socket's time-out starts anew with each byte, of headers as well.
    """
    come = 0

    def note(count):
        nonlocal come
        come += count

    def look(number, frame):
        nonlocal come
        if come < SLOWEST * SILENT_SECONDS:
            raise TimeoutError(f"fewer than {SLOWEST} bytes per second")
        come = 0

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, SILENT_SECONDS, SILENT_SECONDS)
    try:
        yield note
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Header(tarfile.TarInfo):
    """A member's header; one whose name or further fields are said to take over a megabyte is refused, not read."""

    @classmethod
    def frombuf(cls, *arguments):
        header = super().frombuf(*arguments)
        if header.size > 2**20 and not header.isreg():
            raise tarfile.ReadError(f"a header of {header.size} bytes")
        return header


def extract(archive, raw):
    """Unpack the archive's folder stl10_binary to `raw`, which appears only once it is whole."""
    part = raw.with_name(f".{raw.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    print(f"unpacking {archive}")

    def checked(member, path):
        check_space(path, member.size)
        if not (member.isfile() or member.isdir()) or member.name.startswith("/"):  # the library lets some of them pass
            raise UserError(
                f"{archive} is not to be trusted ({member.name} is a link, a device or an absolute path): remove it "
                "and get another copy"
            )
        return tarfile.data_filter(member, path)

    try:
        with gzip.open(archive) as stream:
            with tarfile.open(fileobj=stream, mode="r|", tarinfo=Header) as tar:
                tar.extractall(part, filter=checked)
            while stream.read(2**20):  # to the end, where gzip keeps its checksum
                pass
    except tarfile.FilterError as error:
        raise UserError(f"{archive} is not to be trusted ({error}): remove it and get another copy") from None
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, *BAD_HEADERS) as error:
        raise UserError(f"{archive} is cut short or damaged ({error}): remove it and run this again") from None
    if not (part / raw.name).is_dir():
        raise UserError(f"{archive} holds no folder {raw.name}: remove it, and check --url")
    durable_rename(part / raw.name, raw)
    shutil.rmtree(part)


def durable_rename(part, folder):
    """Give a folder its name once what is in it is on the disk."""
    os.sync()
    os.replace(part, folder)
    sync_folder(folder.parent)


def check_raw(raw):
    """The number of images of every split, after checking sizes and labels of all raw files."""
    counts = {}
    for split, names in SPLITS.items():
        for name in filter(None, names):
            if not (raw / name).is_file():
                raise UserError(f"{raw / name} is missing: put it there, or remove {raw} to fetch or make it anew")
        images, labels = names
        size = (raw / images).stat().st_size
        if size == 0 or size % IMAGE_BYTES:
            what = "is empty" if size == 0 else f"has {size} bytes, no multiple of {IMAGE_BYTES}: it is cut short"
            raise UserError(f"{raw / images} {what}: get it again")
        counts[split] = size // IMAGE_BYTES
        if labels:
            count = (raw / labels).stat().st_size
            if count != counts[split]:
                raise UserError(f"{raw / labels} has {count} labels for {counts[split]} images: get both files again")
            values = np.fromfile(raw / labels, np.uint8)
            if values.min() < 1 or values.max() > 10:
                wrong = values[(values < 1) | (values > 10)][0]
                raise UserError(f"{raw / labels} has the label {wrong}, not from 1 to 10: get it again")
    return counts


def is_release(raw):
    """Whether these are the files of the STL-10 release, by torchvision's MD5s, the smallest file first."""
    names = sorted(MD5, key=lambda name: (raw / name).stat().st_size)
    return all(calculate_md5(raw / name) == MD5[name] for name in names)


def raw_images(raw, name):
    """The images of a raw file, mapped, not read: uint8 [N, 3, 96 columns, 96 rows]."""
    return np.memmap(raw / name, np.uint8, "r").reshape(-1, 3, STL10_SIDE, STL10_SIDE)


# ---------------------------------------------------------------------------------------------------------------------
# The image folders
# ---------------------------------------------------------------------------------------------------------------------


def write_split(raw, data_dir, split):
    """Every image as a lossless PNG, <split>/[<label>/]<index>.png, by a thread per core; whole ones are left alone."""
    images_name, labels_name = SPLITS[split]
    images = raw_images(raw, images_name)
    folders = [data_dir / split] * len(images)
    if labels_name:
        folders = [data_dir / split / str(label) for label in np.fromfile(raw / labels_name, np.uint8)]
    for folder in set(folders):
        folder.mkdir(parents=True, exist_ok=True)

    def write(start):
        for index in range(start, min(start + IMAGES_PER_TASK, len(images))):
            write_png(folders[index] / f"{index}.png", images[index].transpose(2, 1, 0))
            bar.update()

    started = time.monotonic()
    bar = progress_bar(len(images), f"writing {split}", " images")
    with bar, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(write, range(0, len(images), IMAGES_PER_TASK)))
    print(f"{split}: {len(images)} images, {len(images) / (time.monotonic() - started):.0f} per second")
    if len(list((data_dir / split).rglob("*.png"))) != len(images):
        raise UserError(
            f"{data_dir / split} holds images that are not of {raw}: remove it, or choose another --data-dir"
        )


def write_png(path, pixels):
    """pixels uint8 [96, 96, 3] under `path`, whole or not at all, unless it is there already."""
    if path.is_file():
        try:
            if (read_image(path, STL10_SIDE).transpose(1, 2, 0) == pixels).all():
                return
        except UserError:
            pass  # cut short by a crash: written anew
        else:
            raise UserError(
                f"{path} shows something else than the raw file: remove its folder, or choose another --data-dir"
            )
    part = path.with_suffix(".part")
    Image.fromarray(np.ascontiguousarray(pixels)).save(part, "PNG", compress_level=1)  # 1: as small as 6, twice as fast
    os.replace(part, path)


def fingerprint(raw, counts):
    """What tells these raw files from others without reading them."""
    files = [raw / name for names in SPLITS.values() for name in names if name]
    return {"counts": counts, "raw": {f.name: [f.stat().st_size, f.stat().st_mtime_ns] for f in files}}


def is_done(raw, data_dir, counts):
    """Whether the folders were completed from these very raw files and still hold as many images."""
    try:
        if json.loads(read_text(data_dir / ".complete.json")) != fingerprint(raw, counts):
            return False
    except (FileNotFoundError, ValueError, RecursionError):
        return False
    return all(len(list((data_dir / split).rglob("*.png"))) == counts[split] for split in SPLITS)


def write_marker(raw, data_dir, counts):
    """Note that the folders are complete, once they are on the disk."""
    os.sync()
    for extra in ("class_names.txt", "fold_indices.txt"):
        if (raw / extra).exists():
            text = read_text(raw / extra)
            with whole_file(data_dir / extra, "w") as file:
                file.write(text)
    with whole_file(data_dir / ".complete.json", "w") as file:
        json.dump(fingerprint(raw, counts), file)


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic images
# ---------------------------------------------------------------------------------------------------------------------

PATTERNS = {  # name: intensity about 0 … 1 from coordinates x, y in −1 … 1, already turned, scaled and shifted
    "stripes": lambda x, y: wave(x),
    "checks": lambda x, y: sharp(np.sin(9 * x) * np.sin(9 * y)),
    "dots": lambda x, y: sharp(np.cos(9 * x) + np.cos(9 * y) - 0.8),
    "rings": lambda x, y: wave(np.hypot(x, y)),
    "rays": lambda x, y: sharp(np.sin(8 * np.arctan2(y, x))),
    "disc": lambda x, y: sharp(3 * (0.6 - np.hypot(x, y))),
    "square": lambda x, y: sharp(3 * (0.55 - np.maximum(abs(x), abs(y)))),
    "triangle": lambda x, y: sharp(3 * (0.35 - np.maximum(abs(x) * 0.866 + y * 0.5, -y))),
    "cross": lambda x, y: sharp(4 * (0.2 - np.minimum(np.maximum(abs(x), abs(y) / 4), np.maximum(abs(y), abs(x) / 4)))),
    "zigzag": lambda x, y: wave(x + 0.35 * abs((2 * y) % 2 - 1)),
}


def sharp(value):
    """A soft step from 0 to 1."""
    return 1 / (1 + np.exp(-np.clip(8 * value, -30, 30)))


def wave(value):
    return sharp(np.sin(9 * value))


def synthetic_image(label, rng):
    """uint8 [96, 96, 3]: a class's pattern in two random colours, at a random place, size and angle, unevenly lit."""
    y, x = np.mgrid[-1 : 1 : STL10_SIDE * 1j, -1 : 1 : STL10_SIDE * 1j]
    angle, size, (dy, dx) = rng.uniform(0, 2 * math.pi), rng.uniform(0.6, 1.4), rng.uniform(-0.35, 0.35, 2)
    u = ((x - dx) * math.cos(angle) + (y - dy) * math.sin(angle)) / size
    v = ((y - dy) * math.cos(angle) - (x - dx) * math.sin(angle)) / size
    intensity = list(PATTERNS.values())[label](u, v)[..., None]
    # Faint colours, or they would be the easiest way to tell one image from the others.
    first, second = rng.permutation([rng.uniform(0.1, 0.35), rng.uniform(0.65, 0.9)])
    first, second = (level + rng.uniform(-0.1, 0.1, 3) for level in (first, second))
    image = first * intensity + second * (1 - intensity)
    light = 1 + 0.4 * (x * math.cos(angle * 3) + y * math.sin(angle * 3))[..., None]
    return (255 * np.clip(image * light + rng.normal(0, 0.05, image.shape), 0, 1)).astype(np.uint8)


def write_synthetic(raw, seed):
    """A raw set in STL-10's layout: ten classes of pattern. Colour, place, size and angle say nothing of the class."""
    part = raw.with_name(f".{raw.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    print(f"making synthetic images, seed {seed}")
    for stream, (split, count) in enumerate(SYNTHETIC_COUNTS.items()):
        rng = np.random.default_rng((seed, stream))
        labels = rng.permutation(np.arange(count) % 10)
        images_name, labels_name = SPLITS[split]
        with open(part / images_name, "wb") as file, progress_bar(count, f"making {split}", " images") as bar:
            for label in labels:
                file.write(synthetic_image(label, rng).transpose(2, 1, 0).tobytes())
                bar.update()
        if labels_name:
            (labels + 1).astype(np.uint8).tofile(part / labels_name)
    (part / "class_names.txt").write_text("\n".join(PATTERNS) + "\n")
    durable_rename(part, raw)


if __name__ == "__main__":
    run_script(main)
