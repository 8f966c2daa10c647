"""docs/your_own_pretext.md: its code, its table of tasks and its commands work."""

import re
import shlex
import signal
import sys
import types

import pytest
import torch
from conftest import ROOT
from PIL import Image
from records import checkpoint, same_results, signal_in_step, weights

import pretexts
from augmentations import PIXEL_MEAN, PIXEL_STD, normalize
from runtime.randomness import make_generator

PAGE = (ROOT / "docs/your_own_pretext.md").read_text(encoding="utf-8")
TASK_CODE, TABLE_CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)

# The columns of an image's random numbers.
ORDER = slice(4, 8)


@pytest.fixture
def tasks(monkeypatch):
    """The table of tasks as the page writes it; its new task is in pretexts.py too."""
    module = types.ModuleType("quarters")
    exec(TASK_CODE, vars(module))
    monkeypatch.setitem(sys.modules, "quarters", module)

    page = dict(vars(pretexts))
    exec(TABLE_CODE, page)
    tasks = page["PRETEXTS"]
    monkeypatch.setitem(pretexts.PRETEXTS, "quarters", tasks["quarters"])
    return tasks


@pytest.fixture
def quarters(tasks):
    """The class of the page."""
    return tasks["quarters"]


def command_of(script):
    """The arguments of the page's command for a script."""
    (command,) = re.findall(rf"^    python {script}\.py (.*)$", PAGE, re.MULTILINE)
    return shlex.split(command)


def make_uniforms(count, columns):
    return torch.rand(count, columns, generator=make_generator("cpu", 0))


def test_the_table_has_all_tasks_and_one_more(tasks):
    assert tasks == pretexts.PRETEXTS


@pytest.mark.parametrize("side", [36, 55, 96])
def test_shapes(quarters, side):
    task = quarters(0.5)
    generator = make_generator("cpu", 1)
    images = torch.rand(5, 3, side, side, generator=generator) * 255
    view = task(images, make_uniforms(5, task.uniforms))
    assert view.shape == (5 * task.inputs_per_image, 3, side // 2, side // 2)
    assert view.dtype == torch.float32
    assert view.is_contiguous(memory_format=torch.channels_last)

    for non_linear in (False, True):
        head = task.make_head(64, non_linear)
        features = torch.randn(5, task.inputs_per_image, 64)
        assert head(features).shape == (5, 128)


def test_the_quarters_are_those_of_the_image_in_their_order(quarters):
    """With a crop of the whole image and without colours."""
    image = torch.tensor([[20.0, 80.0], [140.0, 200.0]])
    image = image.repeat_interleave(24, 0).repeat_interleave(24, 1)
    images = image.expand(6, 3, 48, 48).contiguous()
    uniforms = make_uniforms(6, quarters.uniforms)
    uniforms[:, 0] = 1 - 2**-24
    uniforms[:, 1] = 0.5
    view = quarters(0.0)(images, uniforms).unflatten(0, (6, 4))

    orders = uniforms[:, ORDER].argsort(1)
    assert len(orders.unique(dim=0)) > 3
    for shown, order in zip(view, orders, strict=True):
        for quarter, place in zip(shown, order.tolist(), strict=True):
            value = 20 + 60 * place
            plain = torch.full((1, 3, 24, 24), value, dtype=torch.uint8)
            inner = (slice(None), slice(1, -1), slice(1, -1))
            expected = normalize(plain, PIXEL_MEAN, PIXEL_STD)[0]
            torch.testing.assert_close(
                quarter[inner], expected[inner], rtol=0, atol=1e-3
            )


def test_the_commands(quarters, call, tiny, data_dir, tmp_path):
    flags = command_of("pirl_stl_train_test")
    outcome = call("pirl_stl_train_test", *tiny, *flags, "--epochs", 1)
    assert outcome.status == 0, outcome.err
    assert "quarters: PIRL, quarters, " in outcome.out
    for content in (checkpoint(tmp_path, "quarters"), weights(tmp_path, "quarters")):
        assert content["settings"]["pretext"] == "quarters"

    out = tmp_path / "quarters.png"
    flags = command_of("pictures")
    outcome = call("pictures", *flags, "--data-dir", data_dir, "--out", out)
    assert outcome.status == 0, outcome.err
    with Image.open(out) as picture:
        # Two images in a row, each beside its quarters.
        assert picture.size == (4 * 200 + 8, 2 * 200 + 8)


def test_what_the_page_promises_of_resume(quarters, call, tiny, tmp_path, monkeypatch):
    def pretrain(name, *flags):
        flags = ("--experiment-name", name, "--epochs", 1, *flags)
        return call("pirl_stl_train_test", *tiny, *flags)

    assert pretrain("whole", "--pretext", "quarters").status == 0
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 3)
        assert pretrain("halves", "--pretext", "quarters").status == 143
    outcome = pretrain("halves", "--pretext", "jigsaw", "--resume")
    assert outcome.is_one_line_error("--pretext was quarters, is jigsaw")

    assert pretrain("halves", "--resume").status == 0
    assert same_results(tmp_path, "whole", "halves")
