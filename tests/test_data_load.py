import hashlib
import http.server
import io
import os
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from conftest import COUNTS, write_raw
from PIL import Image
from torchvision.datasets import STL10

import dataset_helpers as dh
import stl10_data_load


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_folders_hold_what_torchvision_reads(call, raw_dir, tmp_path, monkeypatch):
    outcome = call("stl10_data_load", "--raw-dir", raw_dir, "--data-dir", tmp_path / "data")
    assert outcome.status == 0, outcome.err
    assert "not the STL-10 release" in outcome.out
    monkeypatch.setattr(STL10, "_check_integrity", lambda self: True)  # it accepts the release alone
    for split, theirs in (("train", "train"), ("test", "test"), ("unlabelled", "unlabeled")):
        reference = STL10(raw_dir, split=theirs)
        assert len(reference) == COUNTS[split] == len(list((tmp_path / "data" / split).rglob("*.png")))
        for index, (image, label) in enumerate(reference):
            folder = tmp_path / "data" / split / ("" if split == "unlabelled" else str(label + 1))
            assert (pixels(folder / f"{index}.png") == np.asarray(image)).all()


def test_the_tensors_are_the_raw_images_and_labels_in_order(data_dir, raw_dir):
    raw = np.fromfile(raw_dir / "stl10_binary/train_X.bin", np.uint8).reshape(-1, 3, 96, 96).transpose(0, 1, 3, 2)
    images, labels, *_ = dh.load_labelled(data_dir / "train", 96, torch.device("cpu"))
    assert images.dtype == torch.uint8
    assert (images.numpy() == raw).all()
    assert labels.tolist() == [i % 10 for i in range(COUNTS["train"])]


def test_a_second_run_does_nothing_and_an_interrupted_one_is_completed(call, raw_dir, tmp_path):
    data = tmp_path / "data"
    arguments = ("stl10_data_load", "--raw-dir", raw_dir, "--data-dir", data)
    assert call(*arguments).status == 0
    times = {file: file.stat().st_mtime_ns for file in data.rglob("*")}
    again = call(*arguments)
    assert "nothing to do" in again.out
    assert {file: file.stat().st_mtime_ns for file in data.rglob("*")} == times

    (data / ".complete.json").unlink()  # as if it had been killed ...
    missing, short = data / "unlabelled/7.png", data / "train/3/2.png"
    content = {file: file.read_bytes() for file in (missing, short)}
    missing.unlink()  # ... before this one, and the machine crashed with this one half on the disk
    short.write_bytes(content[short][:100])
    (data / "test/1/10.part").write_bytes(b"half")
    assert call(*arguments).status == 0
    assert {file: file.read_bytes() for file in content} == content
    untouched = data / "unlabelled/8.png"
    assert untouched.stat().st_mtime_ns == times[untouched]
    missing.unlink()  # the marker alone is not believed
    assert "nothing to do" not in call(*arguments).out
    assert missing.exists()


def test_folders_of_other_images_are_left_alone(call, raw_dir, tmp_path):
    write_raw(tmp_path / "other", COUNTS, seed=9)
    data = tmp_path / "data"
    assert call("stl10_data_load", "--raw-dir", raw_dir, "--data-dir", data).status == 0
    before = (data / "train/1/0.png").read_bytes()
    outcome = call("stl10_data_load", "--raw-dir", tmp_path / "other", "--data-dir", data)
    assert outcome.is_one_line_error("--data-dir")
    assert (data / "train/1/0.png").read_bytes() == before


def test_more_images_than_the_raw_file_has(call, raw_dir, tmp_path):
    data = tmp_path / "data"
    (data / "unlabelled").mkdir(parents=True)
    Image.new("RGB", (96, 96)).save(data / "unlabelled/5000.png")
    assert call("stl10_data_load", "--raw-dir", raw_dir, "--data-dir", data).is_one_line_error("other images than")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda raw: (raw / "test_y.bin").unlink(), ["test_y.bin", "missing"]),
        (lambda raw: os.truncate(raw / "train_X.bin", 27648 * 59 + 5), ["train_X.bin", "27648"]),
        (lambda raw: os.truncate(raw / "unlabeled_X.bin", 0), ["unlabeled_X.bin", "empty"]),
        (lambda raw: os.truncate(raw / "train_y.bin", 59), ["train_y.bin", "59 labels for 60"]),
        (lambda raw: os.truncate(raw / "train_y.bin", 2**40), ["train_y.bin", "1099511627776 labels for 60"]),
        (lambda raw: (raw / "train_y.bin").write_bytes(bytes(60)), ["train_y.bin", "label 0"]),
        (lambda raw: (raw / "test_y.bin").write_bytes(bytes([11] * 40)), ["test_y.bin", "label 11"]),
    ],
)
def test_bad_raw_files(call, tmp_path, damage, parts):
    damage(write_raw(tmp_path, COUNTS))
    outcome = call("stl10_data_load", "--raw-dir", tmp_path, "--data-dir", tmp_path / "data")
    assert outcome.is_one_line_error(*parts)
    assert not (tmp_path / "data").exists()


def test_raw_files_straight_in_the_raw_folder(call, raw_dir, tmp_path):
    outcome = call("stl10_data_load", "--raw-dir", raw_dir / "stl10_binary", "--data-dir", tmp_path / "data")
    assert outcome.status == 0, outcome.err
    assert "nothing to do" in call("stl10_data_load", "--raw-dir", raw_dir, "--data-dir", tmp_path / "data").out


def test_the_release_is_recognised_by_its_checksums(call, tmp_path, monkeypatch):
    raw = write_raw(tmp_path, COUNTS)
    sums = {name: hashlib.md5((raw / name).read_bytes()).hexdigest() for name in stl10_data_load.MD5}
    monkeypatch.setattr(stl10_data_load, "MD5", sums)
    assert "the STL-10 release" in call("stl10_data_load", "--raw-dir", tmp_path, "--data-dir", tmp_path / "data").out


# ---------------------------------------------------------------------------------------------------------------------
# Downloads, from a server in this process
# ---------------------------------------------------------------------------------------------------------------------


class Server:
    """http.server with one archive; `cut` is where the connection breaks, `ranges` whether it can go on from there."""

    def __init__(self):
        self.content, self.cut, self.ranges, self.requests, self.silent, self.shift = b"", None, True, [], 0, 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if outer.ranges else 0
                outer.requests.append(start)
                if start >= len(outer.content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(outer.content)}")
                    self.send_header("Content-Length", "0")
                    return self.end_headers()
                self.send_response(206 if start else 200)
                if start:
                    first = start + outer.shift  # of a server that sends another part than was asked for
                    self.send_header("Content-Range", f"bytes {first}-{len(outer.content) - 1}/{len(outer.content)}")
                self.send_header("Content-Length", str(len(outer.content) - start))
                self.end_headers()
                self.wfile.write(outer.content[start : outer.cut])
                self.wfile.flush()
                time.sleep(outer.silent)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/stl10_binary.tar.gz"


@pytest.fixture
def server():
    server = Server()
    yield server
    server.server.shutdown()


def archive_of(folder, extra=None):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder / "stl10_binary", "stl10_binary")
        if extra is not None:
            tar.addfile(extra, io.BytesIO(b"x" * extra.size))
    return buffer.getvalue()


def test_download(call, server, raw_dir, tmp_path):
    server.content = archive_of(raw_dir)
    arguments = ("stl10_data_load", "--url", server.url, "--raw-dir", tmp_path / "raw", "--data-dir", tmp_path / "data")
    outcome = call(*arguments, "--md5", hashlib.md5(server.content).hexdigest())
    assert outcome.status == 0, outcome.err
    for file in (raw_dir / "stl10_binary").iterdir():
        assert (tmp_path / "raw/stl10_binary" / file.name).read_bytes() == file.read_bytes()
    assert "nothing to do" in call(*arguments).out
    assert server.requests == [0], "raw data that is there is not fetched again"


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("checksum", [True, False])
def test_a_cut_download_is_mended_by_the_next_run(call, server, raw_dir, tmp_path, checksum, ranges):
    server.content, server.cut, server.ranges = archive_of(raw_dir), 20_000, ranges
    arguments = ["stl10_data_load", "--url", server.url, "--raw-dir", tmp_path / "raw", "--data-dir", tmp_path / "data"]
    arguments += ["--md5", hashlib.md5(server.content).hexdigest()] if checksum else []
    assert call(*arguments).is_one_line_error("20000 of", server.url)
    assert not (tmp_path / "raw/stl10_binary").exists()
    assert not (tmp_path / "raw/stl10_binary.tar.gz").exists()
    assert not (tmp_path / "data").exists()
    server.cut = None
    assert call(*arguments).status == 0
    assert server.requests == [0, 20_000 if ranges else 0]
    assert (tmp_path / "raw/stl10_binary.tar.gz").read_bytes() == server.content
    assert (tmp_path / "raw/stl10_binary/unlabeled_X.bin").stat().st_size == COUNTS["unlabelled"] * 27648


def test_leftover_of_a_larger_file_begins_anew(call, server, raw_dir, tmp_path):
    server.content = archive_of(raw_dir)
    (tmp_path / ".stl10_binary.tar.gz.part").write_bytes(b"x" * (len(server.content) + 1))
    assert call("stl10_data_load", "--url", server.url, "--raw-dir", tmp_path, "--data-dir", tmp_path / "d").status == 0


def test_a_leftover_of_something_else_never_passes_for_the_archive(call, server, raw_dir, tmp_path):
    server.content = archive_of(raw_dir)
    md5 = hashlib.md5(server.content).hexdigest()
    (tmp_path / ".stl10_binary.tar.gz.part").write_bytes(b"x" * 1000)
    arguments = ("stl10_data_load", "--url", server.url, "--raw-dir", tmp_path, "--data-dir", tmp_path / "d")
    assert call(*arguments, "--md5", md5).is_one_line_error("MD5")
    assert call(*arguments, "--md5", md5).status == 0


def test_a_silent_server_is_given_up(call, server, raw_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(stl10_data_load, "TIMEOUT", 0.3)
    server.content, server.cut, server.silent = archive_of(raw_dir), 1000, 2
    assert call("stl10_data_load", "--url", server.url, "--raw-dir", tmp_path).is_one_line_error("timed out")


def test_another_part_than_was_asked_for(call, server, raw_dir, tmp_path):
    server.content, server.cut = archive_of(raw_dir), 20_000
    arguments = ("stl10_data_load", "--url", server.url, "--raw-dir", tmp_path, "--data-dir", tmp_path / "d")
    assert call(*arguments).is_one_line_error("20000 of")
    server.cut, server.shift = None, 5
    assert call(*arguments).is_one_line_error("another part")
    server.shift = 0
    assert call(*arguments).status == 0
    assert server.requests == [0, 20_000, 20_000], "nothing is fetched twice"


def test_a_range_that_was_not_asked_for_is_refused(call, server, tmp_path):
    assert call("stl10_data_load", "--url", server.url, "--raw-dir", tmp_path).is_one_line_error("416")


def test_a_whole_leftover_is_not_fetched_again(call, server, raw_dir, tmp_path):
    """As after a kill between the last byte and the renaming."""
    server.content = archive_of(raw_dir)
    (tmp_path / ".stl10_binary.tar.gz.part").write_bytes(server.content)
    arguments = ("stl10_data_load", "--url", server.url, "--raw-dir", tmp_path, "--data-dir", tmp_path / "d")
    assert call(*arguments, "--md5", hashlib.md5(server.content).hexdigest()).status == 0
    assert server.requests == [len(server.content)]


def test_wrong_checksum_leaves_nothing_that_looks_whole(call, server, raw_dir, tmp_path):
    server.content = archive_of(raw_dir)
    outcome = call("stl10_data_load", "--url", server.url, "--raw-dir", tmp_path / "raw", "--md5", "0" * 32)
    assert outcome.is_one_line_error("MD5")
    assert list((tmp_path / "raw").iterdir()) == []


def test_server_that_is_not_there(call, tmp_path):
    outcome = call("stl10_data_load", "--url", "http://127.0.0.1:9/a.tar.gz", "--raw-dir", tmp_path / "raw")
    assert outcome.is_one_line_error("could not be fetched")
    assert call("stl10_data_load", "--url", "no-url", "--raw-dir", tmp_path / "raw").is_one_line_error("no-url")


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
    raw.mkdir(parents=True)
    (raw / "stl10_binary.tar.gz").write_bytes(archive_of(raw_dir, member))
    outcome = call("stl10_data_load", "--raw-dir", raw, "--data-dir", tmp_path / "data")
    assert outcome.is_one_line_error("not to be trusted")
    assert not list(tmp_path.rglob("outside"))
    assert not (raw / "stl10_binary").exists()


def test_an_absolute_path_in_an_archive_stays_in_its_folder(call, raw_dir, tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "stl10_binary.tar.gz").write_bytes(archive_of(raw_dir, hostile(f"{tmp_path}/outside", size=1)))
    assert call("stl10_data_load", "--raw-dir", raw, "--data-dir", tmp_path / "data").status == 0
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b" + b"\0" * 40], ids=["empty", "text", "gzip"])
def test_what_is_no_archive(call, tmp_path, content):
    archive = tmp_path / "stl10_binary.tar.gz"
    archive.write_bytes(content)
    assert call("stl10_data_load", "--raw-dir", tmp_path, "--data-dir", tmp_path / "d").is_one_line_error("tar.gz")
    outcome = call("stl10_data_load", "--raw-dir", tmp_path, "--data-dir", tmp_path / "d", "--md5", "0" * 32)
    assert outcome.is_one_line_error("MD5", archive)
    assert archive.exists(), "what the user put there is not ours to remove"


def test_an_altered_archive_is_noticed(call, raw_dir, tmp_path):
    content = bytearray(archive_of(raw_dir))
    content[-6] ^= 1  # in gzip's checksum
    (tmp_path / "stl10_binary.tar.gz").write_bytes(content)
    assert call("stl10_data_load", "--raw-dir", tmp_path, "--data-dir", tmp_path / "d").is_one_line_error("damaged")
    assert not (tmp_path / "stl10_binary").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Images
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "1", "LA", "I;16"])
def test_other_modes_are_converted(tmp_path, mode):
    gray = (np.add.outer(np.arange(96), np.arange(96)) // 2 * 2).astype(np.uint8)
    image = Image.fromarray(gray)
    image = Image.fromarray(gray.astype(np.uint16) * 256) if mode == "I;16" else image.convert(mode)
    image.save(tmp_path / "0.png")
    result = dh.read_image(tmp_path / "0.png", 96)
    assert result.shape == (3, 96, 96)
    assert result.dtype == np.uint8
    if mode != "1":
        assert abs(result[0].astype(int) - gray).max() <= 4  # a palette is coarser


def test_smaller_images_are_scaled_with_antialiasing(data_dir):
    files = dh.image_files(data_dir / "unlabelled")[:3]
    full = torch.from_numpy(np.stack([dh.read_image(file, 96) for file in files]))
    half = torch.from_numpy(np.stack([dh.read_image(file, 48) for file in files]))
    expected = torch.nn.functional.interpolate(full.float(), (48, 48), mode="bicubic", antialias=True)
    assert half.shape == (3, 3, 48, 48)
    assert (half - expected.clamp(0, 255)).abs().mean() < 1
