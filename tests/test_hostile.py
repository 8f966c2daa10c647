"""Arbitrary bytes for the readers: a result or the one-line error, never anything else, and little memory."""

import io
import resource
import zipfile

import run_helpers as rh
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import dataset_helpers as dh
import stl10_data_load

IMAGE_BYTES = stl10_data_load.IMAGE_BYTES
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")
MODERATE = settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(autouse=True)
def little_memory():
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert peak < 2 * 2**30, f"{peak / 2**30:.1f} GB"


def png(mode="RGB", size=(96, 96), **options):
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    Image.fromarray(noise, "RGBA").convert(mode).save(file, "PNG", **options)
    return file.getvalue()


def checkpoint():
    file = io.BytesIO()
    content = {"model": {"w": torch.arange(100.0)}, "rows": [{"epoch": 1}], "bank": torch.ones(9, 9)}
    torch.save({"kind": "ours", "settings": {"lr": 0.1}, **content}, file)
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
            content[start:stop] = draw(st.binary(min_size=stop - start, max_size=stop - start))
        elif how == "cut":
            del content[start:stop]
        elif how == "end":
            del content[start:]
        elif how == "double":
            content[start:start] = content[start:stop]
        else:
            content[start:start] = draw(st.binary(max_size=64))
    return bytes(content)


def result_or_line(function, path, *arguments):
    """What the function returns; None if it ends in one line of the form "what is wrong: what to do" with the path."""
    try:
        return function(path, *arguments)
    except rh.UserError as error:
        line = str(error)
    assert "\n" not in line
    assert str(path) in line
    assert ": " in line
    return None


@MODERATE
@given(st.one_of(st.binary(max_size=400), damaged(png()), damaged(png("P")), damaged(png("L", (40, 40)))))
def test_images(tmp_path, content):
    path = tmp_path / "3.png"
    path.write_bytes(content)
    images = result_or_line(lambda path: dh.load_images([path], 96, torch.device("cpu"), "images")[0], path)
    assert images is None or (images.shape, images.dtype) == ((1, 3, 96, 96), torch.uint8)


@MODERATE
@given(st.one_of(st.binary(max_size=400), damaged(checkpoint()), damaged(checkpoint()[:600])))
def test_checkpoints(tmp_path, content):
    path = tmp_path / "run.ckpt"
    path.write_bytes(content)
    state = result_or_line(rh.read_torch_file, path)
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
    state = result_or_line(rh.read_torch_file, path)
    assert not isinstance(state, dict) or "kind" not in state


raw_files = st.fixed_dictionaries(
    {
        name: st.one_of(
            st.none(),
            st.binary(max_size=50),
            st.integers(0, 3).map(lambda count: bytes(count * IMAGE_BYTES)),
            st.tuples(st.integers(1, 3), st.integers(-2, 2)).map(lambda n: bytes(n[0] * IMAGE_BYTES + n[1])),
            st.lists(st.integers(1, 10), max_size=3).map(bytes),
        )
        for names in stl10_data_load.SPLITS.values()
        for name in names
        if name
    }
)


@MODERATE
@given(raw_files)
def test_raw_files(tmp_path, files):
    for name, content in files.items():
        (tmp_path / name).unlink(missing_ok=True)
        if content is not None:
            (tmp_path / name).write_bytes(content)
    counts = result_or_line(stl10_data_load.check_raw, tmp_path)
    for split, (images, labels) in stl10_data_load.SPLITS.items() if counts else ():
        assert len(files[images]) == counts[split] * IMAGE_BYTES > 0
        assert labels is None or len(files[labels]) == counts[split]
        assert labels is None or set(files[labels]) <= set(range(1, 11))
