"""Files that appear whole or not at all, and files of torch.save, read with care."""

import argparse
import os

import pytest
import torch

from runtime.errors import UserError
from runtime.files import (
    atomic_save,
    atomic_write,
    cpu_state_dict,
    explain_mismatch,
    read_torch_file,
)


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


# ---- Writing -------------------------------------------------------------------------
def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new/table.csv"
    with atomic_write(path, "w") as file:
        with atomic_write(path.with_suffix(".md")) as other:
            other.write(b"of the same stem")
            file.write("first")
        assert names_in(path.parent) == [".table.csv.part", "table.md"]
    path.with_suffix(".md").unlink()
    assert path.read_text() == "first"

    for error in (ValueError, KeyboardInterrupt, SystemExit):
        with pytest.raises(error), atomic_write(path) as file:  # noqa: PT012
            file.write(b"second")
            file.flush()
            raise error
        assert path.read_text() == "first"
        assert names_in(path.parent) == ["table.csv"]


def test_what_is_renamed_is_on_the_disk_before(tmp_path, monkeypatch):
    """Or a power cut would leave an empty file under the name."""
    path = tmp_path / "exp.ckpt"
    synced = []

    def fsync(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        assert not path.exists()

    monkeypatch.setattr(os, "fsync", fsync)
    with atomic_write(path) as file:
        file.write(b"content")
    assert synced == [7]
    assert path.read_bytes() == b"content"


def test_a_table_may_hold_any_file_name(tmp_path):
    """Linux allows any bytes in it."""
    path = tmp_path / "table.csv"
    with atomic_write(path, "w") as file:
        file.write(os.fsdecode(b"caf\xe9.jpg") + ", größe\r\n")
    assert path.read_bytes() == b"caf\xe9.jpg, gr\xc3\xb6\xc3\x9fe\r\n"


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_a_link(tmp_path, monkeypatch, exists):
    """Here, of two relative links, to a file on what may be another disk."""
    (tmp_path / "disk").mkdir()
    if exists:
        (tmp_path / "disk/real.pt").write_text("before")
    (tmp_path / "disk/middle.pt").symlink_to("real.pt")
    (tmp_path / "weights").mkdir()
    link = tmp_path / "weights/exp.pt"
    link.symlink_to("../disk/middle.pt")

    monkeypatch.chdir(tmp_path)
    with atomic_write("weights/exp.pt") as file:
        file.write(b"after")
    assert (tmp_path / "disk/real.pt").read_text() == "after"
    assert link.is_symlink()
    assert (tmp_path / "disk/middle.pt").is_symlink()
    assert names_in(tmp_path / "disk") == ["middle.pt", "real.pt"]
    assert names_in(tmp_path / "weights") == ["exp.pt"]


@pytest.mark.parametrize("kind", ["folder", "pipe", "link to a pipe"])
def test_what_is_no_regular_file_is_refused_and_kept(tmp_path, kind):
    """A rename would replace a device such as /dev/null for the whole machine."""
    path = tmp_path / "target"
    if kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    before = path.stat()
    name = path
    if kind == "link to a pipe":
        name = tmp_path / "link"
        name.symlink_to(path)

    with pytest.raises(UserError, match="is not a regular file: choose") as error:
        atomic_write(name).__enter__()
    assert str(name) in str(error.value)
    assert path.stat() == before
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_is_named_with_the_file(tmp_path):
    path = tmp_path / "exp.ckpt"
    with pytest.raises(OSError, match="No space") as error, atomic_write(path):
        raise OSError(28, "No space left on device")
    assert error.value.filename == str(path)
    with pytest.raises(OSError, match="No such") as error, atomic_write(path):
        raise FileNotFoundError(2, "No such file", "1.png")
    assert error.value.filename == "1.png", "another file's error keeps its name"
    assert names_in(tmp_path) == []


def test_a_full_disk_in_the_middle_of_a_checkpoint(
    pretrain, finished, tmp_path, monkeypatch
):
    """The last one stays whole, nothing half-written stays, and the run continues."""
    finished("exp")
    checkpoint = tmp_path / "weights/exp.ckpt"
    before = checkpoint.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    longer = ("--epochs", 3, "--checkpoint-minutes", 0, "--resume")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        outcome = pretrain("exp", *longer)
    assert outcome.is_one_line_error("exp.ckpt", "No space left on device")
    assert checkpoint.read_bytes() == before
    assert not list((tmp_path / "weights").glob("*.part"))
    assert not list((tmp_path / "weights").glob(".*.part"))

    outcome = pretrain("exp", *longer)
    assert outcome.status == 0, outcome.err


# ---- Reading -------------------------------------------------------------------------
def test_what_is_saved_is_read_back(tmp_path):
    path = tmp_path / "exp.ckpt"
    flags = argparse.Namespace(crops=[0.4, 1.0])  # as other projects save them
    atomic_save({"bank": torch.arange(4.0), "name": "ö", "args": flags}, path)
    content = read_torch_file(path)
    assert content["bank"].equal(torch.arange(4.0))
    assert content["name"] == "ö"
    assert content["args"] == flags
    assert names_in(tmp_path) == ["exp.ckpt"]


def test_a_checkpoint_of_a_gpu_is_read_onto_the_cpu(tmp_path, monkeypatch):
    path = tmp_path / "exp.ckpt"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        atomic_save({"bank": torch.arange(4.0)}, path)
    bank = read_torch_file(path)["bank"]
    assert bank.device == torch.device("cpu")
    assert bank.tolist() == [0, 1, 2, 3]


class Code:
    def __reduce__(self):
        return os.system, ("echo evil",)


def refusal(path):
    """The line by which a file is refused. It never advises to run what it holds."""
    with pytest.raises(UserError) as error:
        read_torch_file(path)
    line = str(error.value)
    assert line.startswith(f"{path} ")
    assert "\n" not in line
    assert "weights_only" not in line
    return line


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "before torch 1.6"])
def test_damaged_files_and_code(tmp_path, capfd, is_zip):
    path = tmp_path / "exp.ckpt"

    def saved(content):
        torch.save(content, path, _use_new_zipfile_serialization=is_zip)
        return path.read_bytes()

    whole = saved({"weight": torch.arange(1000.0)})
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    code = saved({"a": Code()})
    damaged = [b"", b"text", b"<html></html>", b"PK\3\4" + b"x" * 99]
    damaged += [whole[:50], whole[:1000], code]
    if is_zip:
        # Older files have no checksums.
        damaged.append(bytes(flipped))
    for content in damaged:
        path.write_bytes(content)
        assert "is damaged or was not written by torch.save" in refusal(path)
        assert path.read_bytes() == content
    assert "evil" not in capfd.readouterr().out


class Settings:
    """As a project may put into its checkpoint, beside the weights."""


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    "kind", ["a whole network", "an object of its own", "a type", "a protocol"]
)
def test_pickled_objects_are_not_called_damage(tmp_path, kind):
    network = torch.nn.Linear(2, 2)
    contents = {
        "a whole network": network,
        "an object of its own": {"weight": torch.ones(1), "settings": Settings()},
        "a type": {"weight": torch.ones(1), "parser": argparse.ArgumentParser},
        "a protocol": {"weight": torch.ones(1)},
    }
    path = tmp_path / "whole.pth"
    protocol = 4 if kind == "a protocol" else 2
    torch.save(contents[kind], path, pickle_protocol=protocol)
    line = refusal(path)
    assert line.endswith(
        "holds more than tensors: load it yourself, and save its state_dict"
    )

    # The advice helps.
    if kind == "a whole network":
        torch.save(torch.load(path, weights_only=False).state_dict(), path)
        assert read_torch_file(path)["weight"].equal(network.weight)


def test_what_is_not_the_file_s_fault(tmp_path, monkeypatch):
    """run_script() has a line for each, with advice that helps."""

    def full(*arguments, **options):
        raise MemoryError

    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError):
        read_torch_file(path)
    with pytest.raises(IsADirectoryError):
        read_torch_file(tmp_path)
    torch.save({"a": torch.ones(1)}, path)
    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(MemoryError):
        read_torch_file(path)
    with pytest.raises(torch.OutOfMemoryError), explain_mismatch("a.pt", "…"):
        raise torch.OutOfMemoryError("the card is full")


def test_a_mismatch_is_one_line(tmp_path):
    advice = "use another copy"
    with (
        pytest.raises(UserError, match=r"exp.pt does not fit .*KeyError") as error,
        explain_mismatch(tmp_path / "exp.pt", advice),
    ):
        {}["a\nb" * 1000]
    line = str(error.value)
    assert line.endswith(": use another copy")
    assert "\n" not in line
    assert len(line) < 200 + len(str(tmp_path)) + 100


def test_a_state_dict_is_a_copy():
    """What is kept of the best epoch must not change with the next one."""
    module = torch.nn.BatchNorm1d(2)
    kept = cpu_state_dict(module)
    before = {name: value.tolist() for name, value in kept.items()}
    module.train()(torch.randn(9, 2))
    module.weight.data += 1
    assert {name: value.tolist() for name, value in kept.items()} == before
    assert kept.keys() == module.state_dict().keys()
