"""Files that appear whole or not at all, and files of torch.save, read with care."""

import argparse
import contextlib
import io
import os
import zipfile
import zlib
from pathlib import Path

import torch

from runtime.errors import UserError, first_line


@contextlib.contextmanager
def atomic_write(path, mode="wb"):
    """Open a file that appears under `path` whole or not at all.

    It is written beside `path`, synced and renamed, so a kill or a full disk leaves
    what was there before. A link stays a link: the file that it points to is replaced.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UserError(
            f"{path} is not a regular file",
            "choose another name",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    options = {}
    if "b" not in mode:
        # Linux allows any bytes in a file name, and some of our tables hold names.
        options = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    try:
        with open(part, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError) and not error.filename:
            # A write to a full disk raises an error without a file name, and
            # run_script() prints the name.
            error.filename = str(path)
        raise


def atomic_save(content, path):
    """torch.save to a file that appears whole or not at all."""
    # By way of memory: on a full disk, torch's own writer fails with a RuntimeError
    # that looks like a bug; a plain write fails with an OSError.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def read_torch_file(path):
    """What torch.save wrote, on the CPU: nothing but tensors and plain values."""
    is_archive = False
    try:
        is_archive = zipfile.is_zipfile(path)
        if is_archive:
            # torch.load does not look at the checksums of the archive's members.
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"the checksum of {damaged} is wrong")
        # The checkpoints of many projects hold the arguments of the run, too.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError, MemoryError):
        # The content is not to blame for these: run_script() prints them.
        raise
    except Exception as error:
        # torch refuses a class as an unsupported global, and another pickle protocol as
        # an unsupported operand. It says the latter of any text, too, such as a saved
        # error page.
        refusal = "Unsupported" if is_archive else "Unsupported global"
        if refusal in str(error):
            raise UserError(
                f"{path} holds more than tensors",
                "load it yourself, and save its state_dict",
            ) from None
        # Arbitrary bytes make zipfile and the unpickler raise almost anything. torch
        # then advises weights_only=False, which would run code that the file holds.
        reason = first_line(error)
        if "Weights only load failed" in reason:
            reason = "it cannot be unpickled"
        raise UserError(
            f"{path} is damaged or was not written by torch.save ({reason})",
            "use another copy",
        ) from None


@contextlib.contextmanager
def explain_mismatch(path, advice):
    """Inside, the content of a file is used; if it does not fit, one line says so."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # a RuntimeError, but the file is not to blame for it
    except (RuntimeError, LookupError, TypeError, ValueError, AttributeError) as error:
        # torch lists every missing key of a state dict: the beginning is enough.
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} does not fit this run ({type(error).__name__}: {reason})",
            advice,
        ) from None


def cpu_state_dict(module):
    """A copy of a module's state dict on the CPU, which loads on any machine."""
    return {name: value.cpu().clone() for name, value in module.state_dict().items()}


def weights_checksum(module):
    """The CRC-32 of a module's state dict: almost surely different if a weight is."""
    checksum = 0
    for value in module.state_dict().values():
        checksum = zlib.crc32(value.cpu().contiguous().numpy(), checksum)
    return checksum
