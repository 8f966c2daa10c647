"""Arbitrary bytes for the readers: a result or the one-line error, in little memory."""

import io
import resource
import zipfile
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataset_helpers import load_images
from runtime.errors import UserError
from runtime.files import read_torch_file

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
MODERATE = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def little_memory():
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak < 2 * 2**30, f"{peak / 2**30:.1f} GB"


def picture(file_format="PNG", mode="RGB", size=(96, 96)):
    width, height = size
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (height, width, 4), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise, "RGBA").convert(mode).save(file, file_format)
    return file.getvalue()


def checkpoint():
    content = {
        "kind": "ours",
        "settings": {"lr": 0.1},
        "trunk": {"w": torch.arange(100.0)},
        "bank": torch.ones(9, 9),
        "training": {"history": [{"epoch": 1}]},
    }
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@st.composite
def damaged(draw, whole):
    """A whole file with stretches overwritten, cut out, doubled or put in."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.integers(0, 64)))
        how = draw(st.sampled_from(["overwrite", "cut", "end", "double", "insert"]))
        if how == "overwrite":
            length = stop - start
            content[start:stop] = draw(st.binary(min_size=length, max_size=length))
        elif how == "cut":
            del content[start:stop]
        elif how == "end":
            del content[start:]
        elif how == "double":
            content[start:start] = content[start:stop]
        else:
            content[start:start] = draw(st.binary(max_size=64))
    return bytes(content)


def result_or_line(function, path):
    """What the function returns; None if it ends in one line with the path.

    The line has the form "what is wrong: what to do".
    """
    try:
        return function(path)
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    assert str(path) in line
    assert ": " in line
    return None


image_bytes = st.one_of(
    st.binary(max_size=400),
    damaged(picture()),
    damaged(picture(mode="P")),
    damaged(picture(mode="L", size=(40, 40))),
    damaged(picture("JPEG", size=(60, 33))),
    damaged(picture("TIFF", "RGBA", (20, 30))),
    damaged(picture("WEBP", size=(30, 20))),
    damaged(picture("BMP", size=(30, 20))),
)


@MODERATE
@given(image_bytes)
def test_images(tmp_path, content):
    path = tmp_path / "3.png"
    path.write_bytes(content)
    result = result_or_line(
        lambda path: load_images([path], 96, torch.device("cpu"), "images"), path
    )
    if result is not None:
        images, fingerprint = result
        assert images.shape == (1, 3, 96, 96)
        assert images.dtype == torch.uint8
        assert fingerprint["checksum"] == zlib.crc32(images.numpy().tobytes())


checkpoint_bytes = st.one_of(
    st.binary(max_size=400),
    damaged(checkpoint()),
    damaged(checkpoint()[:600]),
)


@MODERATE
@given(checkpoint_bytes)
def test_checkpoints(tmp_path, content):
    path = tmp_path / "run.ckpt"
    path.write_bytes(content)
    state = result_or_line(read_torch_file, path)
    assert state is None or state["kind"] == "ours"


@MODERATE
@given(st.binary(max_size=300))
def test_checkpoints_whose_checksums_are_right(tmp_path, pickled):
    """Any pickle program in a whole archive of torch's layout."""
    path = tmp_path / "run.ckpt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled + b".")
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    state = result_or_line(read_torch_file, path)
    assert not isinstance(state, dict) or "kind" not in state
