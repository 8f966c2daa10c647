"""The raw STL-10 files: download, extraction, checks, and folders of images."""

import gzip
import hashlib
import http.server
import io
import os
import tarfile
import threading
import time
import zlib

import numpy as np
import pytest
import torch
from conftest import write_raw
from PIL import Image
from records import interrupted
from torchvision.datasets import STL10

import stl10_data_load
from dataset_helpers import load_labelled
from stl10_data_load import IMAGE_BYTES

# More than ten of each, so that 10.png comes before 2.png in alphabetical order alone.
COUNTS = {"train": 23, "test": 11, "unlabelled": 13}
TORCHVISION_NAMES = {"train": "train", "test": "test", "unlabelled": "unlabeled"}


def write_small_raw(folder, seed=0):
    """A raw set whose labels are in no order, and differ between the splits.

    seed: of the images alone.
    """
    raw = write_raw(folder, COUNTS, seed)
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        _, labels_name = stl10_data_load.SPLITS[split]
        labels = np.concatenate([[1, 10], rng.integers(1, 11, COUNTS[split] - 2)])
        rng.permutation(labels).astype(np.uint8).tofile(raw / labels_name)
    return raw


@pytest.fixture(scope="module")
def raw_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_small_raw(folder)
    return folder


@pytest.fixture(scope="module")
def archive(raw_dir):
    return archive_of(raw_dir)


def command_for(raw, data=None):
    data = data or raw / "images"
    return "stl10_data_load", "--raw-dir", raw, "--data-dir", data


# ---- Folders of images ---------------------------------------------------------------
def test_folders_and_tensors_hold_what_torchvision_reads(
    call, raw_dir, tmp_path, monkeypatch
):
    defaults = stl10_data_load.parse_args([])
    assert defaults.raw_dir.name == "raw_stl10"
    data = tmp_path / defaults.data_dir
    outcome = call(*command_for(raw_dir, data))
    assert outcome.status == 0, outcome.err
    assert outcome.out.endswith("stl10_data: 23 train, 11 test, 13 unlabelled\n")

    # torchvision accepts the release alone.
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)
    for split, torchvision_name in TORCHVISION_NAMES.items():
        reference = STL10(raw_dir, split=torchvision_name)
        assert len(reference) == COUNTS[split]
        assert len(list((data / split).rglob("*.png"))) == COUNTS[split]
        for index, (image, label) in enumerate(reference):
            folder = data / split
            if split != "unlabelled":
                folder = folder / str(label + 1)
            with Image.open(folder / f"{index}.png") as written:
                assert (np.asarray(written) == np.asarray(image)).all()

    # And read back, they are in the order of the release, which its folds refer to.
    reference = STL10(raw_dir, split="train")
    labelled = load_labelled(data, 96, torch.device("cpu"), 0)
    assert (labelled.images.numpy() == reference.data).all()
    folders = [labelled.folders[label] for label in labelled.labels]
    assert folders == [str(label + 1) for label in reference.labels]


def test_a_second_run_does_nothing_and_an_interrupted_one_is_completed(
    call, raw_dir, tmp_path
):
    data = tmp_path / "data"
    arguments = command_for(raw_dir, data)
    assert call(*arguments).status == 0
    times = {file: file.stat().st_mtime_ns for file in data.rglob("*")}

    again = call(*arguments)
    assert again.status == 0
    assert "nothing to do" in again.out
    assert {file: file.stat().st_mtime_ns for file in data.rglob("*")} == times

    # As if it had been killed before the first one, and the machine had crashed with
    # the second one half on the disk, and the third one's place without its bytes.
    missing = data / "unlabelled/7.png"
    (short,) = data.glob("train/*/2.png")
    (empty,) = data.glob("test/*/0.png")
    content = {file: file.read_bytes() for file in (missing, short, empty)}
    missing.unlink()
    short.write_bytes(content[short][:100])
    empty.write_bytes(bytes(len(content[empty])))
    (data / "test/1/10.part").write_bytes(b"half")
    assert "nothing to do" not in call(*arguments).out
    assert {file: file.read_bytes() for file in content} == content
    untouched = data / "unlabelled/8.png"
    assert untouched.stat().st_mtime_ns == times[untouched]
    assert "nothing to do" in call(*arguments).out

    empty.unlink()
    assert "nothing to do" not in call(*arguments).out


def test_names_and_folds_are_there_before_the_images(call, tmp_path, monkeypatch):
    """A run that is stopped among the images may find "nothing to do" the next time."""
    raw = write_small_raw(tmp_path / "raw")
    data = tmp_path / "data"
    names = ("class_names.txt", "fold_indices.txt")
    for name in names:
        (raw / name).write_text(f"content of {name}")
    monkeypatch.setattr(stl10_data_load, "write_split", interrupted)
    outcome = call(*command_for(raw, data))
    assert outcome.status == 130
    for name in names:
        assert (data / name).read_text() == f"content of {name}"


def test_folders_of_other_images_are_left_alone(call, raw_dir, tmp_path):
    write_small_raw(tmp_path / "other", seed=9)
    data = tmp_path / "data"
    arguments = ("stl10_data_load", "--data-dir", data)
    assert call(*arguments, "--raw-dir", raw_dir).status == 0
    next(data.glob("test/*/0.png")).unlink()
    before = {file: file.read_bytes() for file in data.rglob("*.png")}

    outcome = call(*arguments, "--raw-dir", tmp_path / "other")
    assert outcome.is_one_line_error("--data-dir", "something else than the raw file")
    after = {file: file.read_bytes() for file in data.rglob("*.png")}
    assert after == before, "nothing is added, either"


@pytest.mark.parametrize(
    "name", ["train/cat/1.png", "unlabelled/2.PNG", "unlabelled/13.png", "test/a.tiff"]
)
def test_pictures_of_one_s_own_are_left_alone(call, raw_dir, tmp_path, name):
    """Whatever their format: no image of STL-10 is put among them."""
    picture = tmp_path / "pets" / name
    picture.parent.mkdir(parents=True)
    Image.new("RGB", (96, 96)).save(picture)
    arguments = ("--raw-dir", raw_dir, "--data-dir", tmp_path / "pets")
    outcome = call("stl10_data_load", *arguments)
    assert outcome.is_one_line_error("other images than")
    files = [path for path in (tmp_path / "pets").rglob("*") if path.is_file()]
    assert files == [picture]


# ---- The raw files -------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "damage", "parts"),
    [
        ("test_y.bin", None, ["missing"]),
        ("train_X.bin", IMAGE_BYTES * 22 + 5, ["27648"]),
        ("unlabeled_X.bin", 0, ["empty"]),
        ("train_y.bin", 22, ["22 labels for 23"]),
        ("train_y.bin", 2**40, ["1099511627776 labels for 23"]),
        ("train_y.bin", bytes(23), ["label 0"]),
        ("test_y.bin", bytes([1] * 10 + [11]), ["label 11"]),
    ],
)
def test_bad_raw_files(call, tmp_path, name, damage, parts):
    """damage: another size, another content, or None for no file at all."""
    path = write_small_raw(tmp_path) / name
    if damage is None:
        path.unlink()
    elif isinstance(damage, int):
        os.truncate(path, damage)
    else:
        path.write_bytes(damage)
    data = tmp_path / "data"
    outcome = call(*command_for(tmp_path, data))
    assert outcome.is_one_line_error(name, *parts)
    assert not data.exists()


def test_raw_files_straight_in_the_raw_folder(call, raw_dir, tmp_path):
    arguments = ("stl10_data_load", "--data-dir", tmp_path / "data")
    outcome = call(*arguments, "--raw-dir", raw_dir / "stl10_binary")
    assert outcome.status == 0, outcome.err
    assert "nothing to do" in call(*arguments, "--raw-dir", raw_dir).out


# ---- Downloads, from a server in this process ----------------------------------------
class Server:
    """An http.server with one archive, and with the faults that servers have."""

    def __init__(self):
        self.content = b""
        self.requests = []  # the first byte that each one asked for
        self.ranges = True  # whether a download can go on where it broke
        self.cut = None  # where the connection breaks
        self.silent = 0  # seconds without an answer at the end
        self.shift = 0  # how far behind the byte that was asked for it begins
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                server.answer(self)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(
            target=self.server.serve_forever, args=[0.01], daemon=True
        ).start()
        port = self.server.server_port
        self.url = f"http://127.0.0.1:{port}/stl10_binary.tar.gz"

    def answer(self, handler):
        start = 0
        if self.ranges:
            asked_for = handler.headers.get("Range", "bytes=0-")
            start = int(asked_for.removeprefix("bytes=").removesuffix("-"))
        self.requests.append(start)

        size = len(self.content)
        if start >= size:
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{size}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return

        handler.send_response(206 if start else 200)
        if start:
            part = f"bytes {start + self.shift}-{size - 1}/{size}"
            handler.send_header("Content-Range", part)
        handler.send_header("Content-Length", str(size - start))
        handler.end_headers()
        handler.wfile.write(self.content[start : self.cut])
        handler.wfile.flush()
        time.sleep(self.silent)


@pytest.fixture
def server():
    server = Server()
    yield server
    server.server.shutdown()


def archive_of(folder, extra=None):
    """The bytes of an archive of the raw files, and of an empty file `extra`."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder / "stl10_binary", "stl10_binary")
        if extra is not None:
            tar.addfile(extra, io.BytesIO(b"x" * extra.size))
    return buffer.getvalue()


def download_command(server, folder):
    return (*command_for(folder / "raw", folder / "data"), "--url", server.url)


def leave_part(folder, content):
    """As a download that was killed leaves it."""
    part = folder / "raw/.stl10_binary.tar.gz.part"
    part.parent.mkdir()
    part.write_bytes(content)


def test_download(call, server, archive, raw_dir, tmp_path):
    server.content = archive
    command = download_command(server, tmp_path)
    md5 = hashlib.md5(server.content).hexdigest()
    outcome = call(*command, "--md5", md5)
    assert outcome.status == 0, outcome.err
    for file in (raw_dir / "stl10_binary").iterdir():
        copy = tmp_path / "raw/stl10_binary" / file.name
        assert copy.read_bytes() == file.read_bytes()
    assert "nothing to do" in call(*command).out
    assert server.requests == [0], "raw data that is there is not fetched again"


def test_the_default_download_has_the_release_s_md5(
    call, server, archive, tmp_path, monkeypatch
):
    server.content = archive
    monkeypatch.setattr(STL10, "url", server.url)
    raw = tmp_path / "raw"
    command = ("stl10_data_load", "--raw-dir", raw, "--data-dir", tmp_path / "data")
    assert call(*command).is_one_line_error("MD5", STL10.tgz_md5)
    assert list(raw.iterdir()) == []

    md5 = hashlib.md5(server.content).hexdigest()
    monkeypatch.setattr(STL10, "tgz_md5", md5)
    assert call(*command).status == 0


def test_a_busy_server_costs_nothing_that_is_there(
    call, server, archive, tmp_path, monkeypatch
):
    server.content = archive
    leave_part(tmp_path, server.content[:20_000])
    command = download_command(server, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(server, "answer", lambda handler: handler.send_error(503))
        assert call(*command).is_one_line_error("503")
    part = tmp_path / "raw/.stl10_binary.tar.gz.part"
    assert part.stat().st_size == 20_000

    assert call(*command).status == 0
    assert server.requests == [20_000]


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("checksum", [True, False])
def test_a_cut_download_is_mended_by_the_next_run(
    call, server, archive, tmp_path, checksum, ranges
):
    server.content = archive
    server.cut = cut = len(archive) - 1
    server.ranges = ranges
    command = download_command(server, tmp_path)
    if checksum:
        command = (*command, "--md5", hashlib.md5(server.content).hexdigest())
    raw = tmp_path / "raw"

    assert call(*command).is_one_line_error(f"{cut} of", server.url)
    assert not (raw / "stl10_binary").exists()
    assert not (raw / "stl10_binary.tar.gz").exists()
    assert not (tmp_path / "data").exists()

    server.cut = None
    assert call(*command).status == 0
    assert server.requests == [0, cut if ranges else 0]
    assert (raw / "stl10_binary.tar.gz").read_bytes() == server.content


def test_leftover_of_a_larger_file_starts_over(call, server, archive, tmp_path):
    server.content = archive
    leave_part(tmp_path, b"x" * (len(server.content) + 1))
    assert call(*download_command(server, tmp_path)).status == 0


def test_a_leftover_of_something_else_never_passes_for_the_archive(
    call, server, archive, tmp_path
):
    server.content = archive
    md5 = hashlib.md5(server.content).hexdigest()
    leave_part(tmp_path, b"x" * 1000)
    command = (*download_command(server, tmp_path), "--md5", md5)
    assert call(*command).is_one_line_error("MD5")
    assert call(*command).status == 0


def test_a_silent_server_is_given_up(call, server, archive, tmp_path, monkeypatch):
    assert stl10_data_load.TIMEOUT == 60
    monkeypatch.setattr(stl10_data_load, "TIMEOUT", 0.3)
    server.content = archive
    server.cut = 1000
    server.silent = 2
    outcome = call(*download_command(server, tmp_path))
    assert outcome.is_one_line_error("timed out")


def test_another_part_than_was_asked_for(call, server, archive, tmp_path):
    server.content = archive
    server.cut = 20_000
    command = download_command(server, tmp_path)
    assert call(*command).is_one_line_error("20000 of")

    server.cut = None
    server.shift = 5
    assert call(*command).is_one_line_error("another part")

    server.shift = 0
    assert call(*command).status == 0
    assert server.requests == [0, 20_000, 20_000], "nothing is fetched twice"


def test_a_range_that_was_not_asked_for_is_refused(call, server, tmp_path):
    assert server.content == b"", "so that any answer is 416"
    outcome = call(*download_command(server, tmp_path))
    assert outcome.is_one_line_error("416")


def test_a_whole_leftover_is_not_fetched_again(call, server, archive, tmp_path):
    """As after a kill between the last byte and the renaming."""
    server.content = archive
    leave_part(tmp_path, server.content)
    md5 = hashlib.md5(server.content).hexdigest()
    assert call(*download_command(server, tmp_path), "--md5", md5).status == 0
    assert server.requests == [len(server.content)]


def test_server_that_is_not_there(call, tmp_path):
    arguments = ("stl10_data_load", "--raw-dir", tmp_path / "raw")
    outcome = call(*arguments, "--url", "http://127.0.0.1:9/a.tar.gz")
    assert outcome.is_one_line_error("could not be fetched")
    assert call(*arguments, "--url", "no-url").is_one_line_error("no-url")


# ---- Archives ------------------------------------------------------------------------
def put_archive(raw, content):
    raw.mkdir(parents=True, exist_ok=True)
    archive = raw / "stl10_binary.tar.gz"
    archive.write_bytes(content)
    return archive


def hostile(name, **attributes):
    member = tarfile.TarInfo(name)
    for key, value in attributes.items():
        setattr(member, key, value)
    return member


@pytest.mark.parametrize(
    "member",
    [
        hostile("../outside", size=1),
        hostile("stl10_binary/../../outside", size=1),
        hostile("stl10_binary/link", type=tarfile.SYMTYPE, linkname="../../outside"),
        hostile("stl10_binary/hard", type=tarfile.LNKTYPE, linkname="../../outside"),
        hostile("stl10_binary/device", type=tarfile.CHRTYPE),
    ],
    ids=lambda member: member.name,
)
def test_archives_that_leave_their_folder_are_refused(call, raw_dir, tmp_path, member):
    raw = tmp_path / "deep/raw"
    put_archive(raw, archive_of(raw_dir, member))
    data = tmp_path / "data"
    outcome = call(*command_for(raw, data))
    assert outcome.is_one_line_error("not to be trusted")
    assert not list(tmp_path.rglob("outside"))
    assert not (raw / "stl10_binary").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"no archive", b"\x1f\x8b" + b"\0" * 40],
    ids=["empty", "text", "gzip"],
)
def test_what_is_no_archive(call, tmp_path, content):
    archive = put_archive(tmp_path, content)
    command = command_for(tmp_path)
    assert call(*command).is_one_line_error("tar.gz")
    assert call(*command, "--md5", "0" * 32).is_one_line_error("MD5", archive)
    assert archive.exists(), "what the user put there is not ours to remove"


@pytest.mark.parametrize("damage", ["cut", "broken", "altered"])
def test_a_damaged_archive_of_one_s_own(call, archive, tmp_path, damage):
    """A browser cut it short, or bytes are wrong: an image's, or gzip's checksum."""
    content = bytearray(archive)
    if damage == "cut":
        del content[20_000:]
    elif damage == "broken":
        plain = gzip.decompress(archive)[:400_000]
        packer = zlib.compressobj(wbits=31)  # as gzip packs
        content = packer.compress(plain) + packer.flush(zlib.Z_SYNC_FLUSH)
        content += b"\xff" * 100  # no block begins so
    else:
        content[-6] ^= 1
    put_archive(tmp_path, content)
    outcome = call(*command_for(tmp_path))
    assert outcome.is_one_line_error("cut short or damaged", "tar.gz")
    assert not (tmp_path / "stl10_binary").exists()


def test_unpacking_starts_over_after_a_kill(call, archive, tmp_path):
    put_archive(tmp_path, archive)
    left = tmp_path / ".stl10_binary.part/stl10_binary/left.bin"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    command = command_for(tmp_path)
    assert call(*command).status == 0
    assert not (tmp_path / "stl10_binary/left.bin").exists()


def test_an_archive_of_something_else(call, tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.addfile(hostile("readme.txt", size=1), io.BytesIO(b"x"))
    put_archive(tmp_path, buffer.getvalue())
    command = command_for(tmp_path)
    assert call(*command).is_one_line_error("holds no folder stl10_binary")
