"""Arbitrary bytes for the readers: a result or the one-line error, never anything else, and little memory."""

import io
import math
import resource
import zipfile

import numpy as np
import pytest
import torch
from run_helpers import UserError, read_torch_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import stl10_data_load
import train_stl_after_ssl
from dataset_helpers import IMAGE_BYTES, read_image

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
    except UserError as error:
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
    image = result_or_line(read_image, path, 96)
    assert image is None or (image.shape, image.dtype) == ((3, 96, 96), np.uint8)


@MODERATE
@given(st.one_of(st.binary(max_size=400), damaged(checkpoint()), damaged(checkpoint()[:600])))
def test_checkpoints(tmp_path, content):
    path = tmp_path / "run.ckpt"
    path.write_bytes(content)
    state = result_or_line(read_torch_file, path, "ours")
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
    assert result_or_line(read_torch_file, path, "ours") is None


def test_a_small_file_that_claims_a_huge_tensor(tmp_path):
    path = tmp_path / "run.ckpt"
    torch.save({"kind": "ours", "settings": {}, "bank": torch.zeros(1).expand(2**20, 2**20)}, path)
    assert path.stat().st_size < 10_000
    assert read_torch_file(path, "ours")["bank"].shape == (2**20, 2**20)  # a view of 4 bytes, refused by its shape


def nested(depth):
    """2 ** depth lists by their text, `depth` of them in memory."""
    value = []
    for _ in range(depth):
        value = [value, value]
    return value


ODD = {  # what no file of ours holds
    "sparse": lambda: torch.eye(3).to_sparse(),
    "compressed": lambda: torch.eye(3).to_sparse_csr(),
    "meta": lambda: torch.zeros(3, device="meta"),
    "complex": lambda: torch.zeros(3, dtype=torch.complex64),
    "gradient": lambda: torch.zeros(3, requires_grad=True),
    "half": lambda: torch.zeros(3, dtype=torch.float16),
    "bits": lambda: torch.zeros(3, dtype=torch.uint8).view(torch.bits8),
    "large number": lambda: 10**400,
    "set": lambda: {1, 2},
    "type": lambda: torch.float32,
}


@pytest.mark.parametrize("kind", ODD)
def test_checkpoints_of_odd_values(tmp_path, kind, recwarn):
    path = tmp_path / "run.ckpt"
    torch.save({"kind": "ours", "settings": {"lr": 0.1}, "model": {"w": [ODD[kind]()]}}, path)
    recwarn.clear()
    assert result_or_line(read_torch_file, path, "ours") is None
    assert not recwarn.list, "a warning would be a second line"


def alter(state, path, value):
    """The nested dicts `state` with another value in the place that the names in `path` lead to."""
    name, *rest = path.split("/", 1)
    name = int(name) if name.isdecimal() else name
    return {**state, name: alter(state[name], rest[0], value) if rest else value}


PIRL = [
    ("settings", {"lr": torch.zeros(3)}),
    ("settings", {"lr": nested(30)}),
    ("rows", [{"a": 1}]),
    ("rows", [{"epoch": nested(30)}]),
    ("seconds", math.nan),
    ("bank", torch.full((100, 128), torch.nan)),
    ("bank", torch.zeros(1).expand(2**20, 2**20)),
    ("statistics", torch.full((5, 2), torch.nan)),
    ("optimizer/state", {0: {"momentum_buffer": torch.zeros(2)}}),
    ("optimizer/state", {0: {"momentum_buffer": torch.full((64, 3, 7, 7), torch.inf)}}),
    ("optimizer/state", [1]),
    ("optimizer/param_groups", [{}]),
    ("optimizer/param_groups", 5),
    ("model/trunk/conv1.weight", torch.full((64, 3, 7, 7), torch.nan)),
    ("model/trunk/conv1.weight", "x"),
    ("model/trunk", [1]),
]


def test_checkpoints_of_pretraining_with_an_odd_field(call, tiny, tmp_path):
    flags = (*tiny, "--epochs", 1, "--experiment-name", "exp", "--only-train", "--batch-size", 20)
    assert call("pirl_stl_train_test", *flags).status == 0
    path, model = tmp_path / "weights/exp.ckpt", (tmp_path / "weights/exp.pt").read_bytes()
    good = torch.load(path, weights_only=True)
    for place, value in PIRL:
        torch.save(alter(good, place, value), path)
        assert call("pirl_stl_train_test", *flags, "--resume").is_one_line_error("exp.ckpt"), place
        assert (tmp_path / "weights/exp.pt").read_bytes() == model
    # what is of the right shape is taken for what it says, in memory of the run's own
    for place, value in (
        ("optimizer/state/0/momentum_buffer", torch.zeros(1).expand(64, 3, 7, 7)),
        ("optimizer/param_groups", [{**good["optimizer"]["param_groups"][0], "maximize": True, "momentum": "x"}]),
        ("statistics", torch.ones(1).expand(5, 2)),
    ):
        torch.save({**alter(good, place, value), "epoch": 1, "step": 3, "rows": []}, path)
        assert call("pirl_stl_train_test", *flags, "--resume").status == 0, place


LABELLED = [
    ("rows", [1]),
    ("rows", [{"stage": "full"}]),
    ("results", {"another": (0.5, 0.5)}),
    ("results", {"only the softmax layer, ten folds": []}),
    ("seconds", {"the whole network": math.nan}),
    ("results", {"only the softmax layer": 5}),
    ("results", {"only the softmax layer": ("x", "y")}),
    ("results", {"only the softmax layer, ten folds": [5]}),
    ("seconds", "x"),
    ("images", [torch.tensor([3, 4]), 1]),
    ("full_stage", 5),
    ("full_stage/best", {}),
    ("full_stage/best/val_acc", "x"),
    ("full_stage/best/model", None),
    ("full_stage/schedule/best", "x"),
    ("full_stage/schedule", {}),
    ("full_stage/optimizer/param_groups", [{"lr": "x", "params": []}]),
    ("full_stage/statistics", torch.full((4, 2), torch.nan)),
]


def test_checkpoints_of_fine_tuning_with_an_odd_field(call, tiny, tmp_path, monkeypatch):
    flags = (*tiny, "--experiment-name", "exp", "--full-fine-tune")
    with monkeypatch.context() as patch:
        patch.setattr(train_stl_after_ssl, "report", lambda run, experiment: None)
        patch.setattr(train_stl_after_ssl, "FULL", "stopped")  # a state in the middle of the full stage is kept
        assert call("train_stl_after_ssl", *flags).status == 0
    path = tmp_path / "weights/exp.previous.ckpt"
    good = torch.load(path, weights_only=True)
    assert good["full_stage"]
    (tmp_path / "weights/exp.previous.ckpt").unlink()
    for place, value in LABELLED:
        torch.save(alter(good, place, value), tmp_path / "weights/exp.ckpt")
        assert call("train_stl_after_ssl", *flags, "--resume").is_one_line_error("exp.ckpt"), place
    torch.save(good, tmp_path / "weights/exp.ckpt")
    assert call("train_stl_after_ssl", *flags, "--resume").status == 0


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
