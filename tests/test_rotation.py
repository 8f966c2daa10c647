"""Rotation, and rotation with jigsaw: the turns, the views, the heads and the flag."""

import signal

import pytest
import torch
import torch.nn.functional as F
from conftest import make_trainer
from records import (
    TRAINED,
    checkpoint,
    parts_of,
    same,
    same_results,
    signal_in_step,
    table,
    weights,
)

from augmentations import IMAGE_VIEW_UNIFORMS, normalize, unnormalize
from jigsaw import Jigsaw
from models import PatchHead
from pretexts import PRETEXTS
from rotation import JigsawRotation, Rotation, quarter_turns
from runtime.randomness import make_generator

# The columns of an image's random numbers for rotation.
CROP = slice(0, 4)
COLOURS = slice(4, 10)
TURN = 10

TASKS = list(PRETEXTS)


def make_images(count, side):
    generator = make_generator("cpu", 1)
    return torch.rand(count, 3, side, side, generator=generator) * 255


def make_uniforms(count, columns, seed=0):
    return torch.rand(count, columns, generator=make_generator("cpu", seed))


def without_colour(uniforms):
    """The same random numbers, but with no colour jitter and no gray."""
    uniforms = uniforms.clone()
    uniforms[:, COLOURS] = 0.99
    return uniforms


def of_whole_image(uniforms):
    """The same random numbers, but with the crop being the whole image."""
    uniforms = uniforms.clone()
    uniforms[:, 0] = 1 - 2**-24
    uniforms[:, 1] = 0.5
    return uniforms


def turned_by(uniforms, turns):
    """The same random numbers for rotation, but with this number of quarter turns."""
    uniforms = uniforms.clone()
    uniforms[:, TURN] = (turns + 0.5) / 4
    return uniforms


def rotate_each(images, turns):
    """torch.rot90 of one image after another."""
    rotated = []
    for image, turn in zip(images, turns, strict=True):
        rotated.append(torch.rot90(image, turn, (1, 2)))
    return torch.stack(rotated)


# ---- The turns -----------------------------------------------------------------------
def test_a_turn_is_rot90_to_the_bit():
    images = make_images(8, 9)
    uniforms = torch.tensor([0, 0.2499, 0.25, 0.4999, 0.5, 0.7499, 0.75, 1 - 2**-24])
    expected = rotate_each(images, [0, 0, 1, 1, 2, 2, 3, 3])
    assert quarter_turns(images, uniforms).equal(expected)


# ---- The view of rotation ------------------------------------------------------------
@pytest.mark.parametrize("side", [36, 55])
def test_the_view_is_that_of_turn_0_turned(side):
    images = make_images(6, side)
    uniforms = make_uniforms(6, Rotation.uniforms)
    upright = Rotation()(images, turned_by(uniforms, 0))
    for turns in range(4):
        view = Rotation()(images, turned_by(uniforms, turns))
        assert view.equal(upright.rot90(turns, (2, 3))), turns


def test_the_whole_image_without_colours_is_the_image_turned():
    images = make_images(4, 48)
    uniforms = of_whole_image(without_colour(make_uniforms(4, Rotation.uniforms)))
    uniforms[:, TURN] = torch.tensor([0.1, 0.3, 0.6, 0.9])
    view = Rotation()(images, uniforms)
    expected = normalize(rotate_each(images, [0, 1, 2, 3]))
    torch.testing.assert_close(view, expected, rtol=0, atol=1e-3)


def test_crops_lie_in_the_image_and_have_a_fifth_of_it_or_more():
    """If red is the row and green the column, their ranges are the crop's sides."""
    side = 48
    place = torch.arange(side).float()
    red = place[:, None].expand(side, side)
    image = torch.stack([red, red.T, torch.zeros(side, side)])
    count = 200
    uniforms = turned_by(without_colour(make_uniforms(count, Rotation.uniforms)), 0)
    view = Rotation()(image.repeat(count, 1, 1, 1), uniforms)

    pixels = unnormalize(view) * 255
    heights = pixels[:, 0, -1, 0] - pixels[:, 0, 0, 0]
    widths = pixels[:, 1, 0, -1] - pixels[:, 1, 0, 0]
    areas = heights * widths / side**2
    assert areas.min() > 0.18
    assert areas.min() < 0.25
    assert areas.max() > 0.9


def test_each_image_has_its_own_colours():
    images = torch.full((8, 3, 40, 40), 120.0)
    images[:, 0] = 180.0
    images[:, 2] = 60.0
    uniforms = make_uniforms(8, Rotation.uniforms, seed=7)
    colours = unnormalize(Rotation()(images, uniforms)).mean((2, 3))  # [8, 3]
    different = {tuple(round(value, 2) for value in c.tolist()) for c in colours}
    assert len(different) >= 6

    plain = Rotation(colour_strength=0.0)(images, uniforms)
    torch.testing.assert_close(plain, normalize(images), rtol=0, atol=1e-4)


@pytest.mark.parametrize("task", TASKS)
def test_a_view_does_not_depend_on_the_rest_of_the_batch(task):
    pretext = PRETEXTS[task](0.5)
    images = make_images(5, 48)
    uniforms = make_uniforms(5, pretext.uniforms)
    together = pretext(images, uniforms).unflatten(0, (5, pretext.inputs_per_image))
    for i in range(5):
        alone = pretext(images[i : i + 1], uniforms[i : i + 1])
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-4)


@pytest.mark.parametrize("side", [36, 55, 96])
def test_shape_type_and_memory_format(side):
    images = make_images(5, side)
    view = Rotation()(images, make_uniforms(5, Rotation.uniforms))
    assert view.shape == (5, 3, side, side)
    assert view.dtype == torch.float32
    assert view.is_contiguous(memory_format=torch.channels_last)


# ---- Rotation with jigsaw ------------------------------------------------------------
@pytest.mark.parametrize("side", [36, 96])
def test_the_combination_is_the_jigsaw_of_turned_images(side):
    images = make_images(12, side)
    uniforms = make_uniforms(12, JigsawRotation.uniforms)
    patches = JigsawRotation()(images, uniforms)

    turns = (4 * uniforms[:, 0]).int().tolist()
    assert set(turns) == {0, 1, 2, 3}
    expected = Jigsaw()(rotate_each(images, turns), uniforms[:, 1:])
    assert patches.equal(expected)
    assert patches.is_contiguous(memory_format=torch.channels_last)


# ---- The heads -----------------------------------------------------------------------
def test_the_linear_head_is_one_layer_on_the_features():
    head = Rotation().make_head(64, non_linear=False)
    (layer,) = [m for m in head.modules() if isinstance(m, torch.nn.Linear)]
    features = torch.randn(5, 1, 64)
    expected = F.linear(features[:, 0], layer.weight, layer.bias)
    assert expected.shape == (5, 128)
    assert head(features).equal(expected)


def test_the_non_linear_head_has_a_relu_and_a_second_layer():
    head = Rotation().make_head(64, non_linear=True)
    first, second = [m for m in head.modules() if isinstance(m, torch.nn.Linear)]
    features = torch.randn(5, 1, 64)
    expected = second(first(features[:, 0]).relu())
    assert expected.shape == (5, 128)
    assert head(features).equal(expected)


def test_the_combination_has_the_head_of_the_jigsaw():
    head = JigsawRotation().make_head(64, non_linear=False)
    assert isinstance(head, PatchHead)


# ---- --pretext -----------------------------------------------------------------------
@pytest.mark.parametrize("task", TASKS)
def test_a_step_trains_the_trunk_by_the_pretext_view(tiny, task):
    """With a loss of the pretext term alone, without f(φ(I)) in it."""
    flags = ("--pretext", task, "--loss-weight", 1, "--batch-negatives", "False")
    trainer = make_trainer([*tiny, *flags])
    uniforms = trainer.epoch_uniforms(1)
    assert type(trainer.pretext) is PRETEXTS[task]
    assert uniforms.shape == (100, IMAGE_VIEW_UNIFORMS + trainer.pretext.uniforms)

    trainer.train_step(torch.arange(16), uniforms, 1, 0)
    model = trainer.model
    for parameter in (model.trunk.conv1.weight, *model.head_g.parameters()):
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()


@pytest.mark.parametrize("task", TASKS)
def test_from_pretraining_to_fine_tuning(pretrain, call, tiny, tmp_path, task):
    outcome = pretrain("exp", "--pretext", task, "--epochs", 1)
    assert outcome.status == 0, outcome.err
    assert f"exp: PIRL, {task}, " in outcome.out
    for content in (checkpoint(tmp_path, "exp"), weights(tmp_path, "exp")):
        assert content["settings"]["pretext"] == task
    last_line = table(tmp_path, "exp")[-1]
    assert 0 <= float(last_line["knn_acc"]) <= 1

    # Both stages of fine-tuning.
    flags = ("--pirl-model-name", "exp", "--experiment-name", "fine", "--epochs", 1)
    flags = (*flags, "--full-fine-tune", "True", "--full-epochs", 1)
    outcome = call("train_stl_after_ssl", *tiny, *flags)
    assert outcome.status == 0, outcome.err
    assert set(weights(tmp_path, "fine")["results"]) >= {"softmax", "full"}


@pytest.mark.parametrize("task", ["rotation"])
def test_resume_keeps_the_task_and_is_exact(pretrain, tmp_path, monkeypatch, task):
    flags = ("--pretext", task, "--epochs", 1)
    assert pretrain("whole", *flags).status == 0
    with monkeypatch.context() as patch:
        signal_in_step(patch, signal.SIGTERM, 3)
        assert pretrain("halves", *flags).status == 143

    outcome = pretrain("halves", "--epochs", 1, "--resume")
    assert outcome.status == 0, outcome.err
    assert same_results(tmp_path, "whole", "halves")
    whole_run = parts_of(checkpoint(tmp_path, "whole"), TRAINED)
    halves = parts_of(checkpoint(tmp_path, "halves"), TRAINED)
    assert same(whole_run, halves)


def test_resume_with_another_task_is_refused_by_name(pretrain, finished, tmp_path):
    """Even with the combination, whose network is the same."""
    finished("exp", "--epochs", 1)
    before = (tmp_path / "weights/exp.ckpt").read_bytes()
    for task in ("rotation", "jigsaw-rotation"):
        outcome = pretrain("exp", "--pretext", task, "--resume")
        assert outcome.is_one_line_error(f"--pretext was jigsaw, is {task}")
    assert (tmp_path / "weights/exp.ckpt").read_bytes() == before


@pytest.mark.parametrize(
    ("before", "others"),
    [("jigsaw", ["rotation"]), ("rotation", ["jigsaw", "jigsaw-rotation"])],
)
def test_a_warm_start_with_another_head_is_refused(pretrain, tmp_path, before, others):
    assert pretrain("first", "--pretext", before, "--epochs", 1).status == 0
    for now in others:
        flags = ("--pretext", now, "--warm-start", "--pirl-model-name", "first")
        outcome = pretrain("second", *flags)
        assert outcome.is_one_line_error("first.pt", "--pretext")
        assert not list((tmp_path / "weights").glob("second.*"))


def test_no_such_task(pretrain):
    outcome = pretrain("exp", "--pretext", "colouring")
    assert outcome.is_one_line_error("--pretext", *TASKS, status=2)
