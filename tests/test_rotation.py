"""Rotation, and rotation with jigsaw: the turns, the views, the heads and the flag."""

import pytest
import torch
from conftest import make_trainer
from records import checkpoint, table, weights

from augmentations import (
    IMAGE_VIEW_UNIFORMS,
    ColourJitter,
    box_transforms,
    crop_box,
    sample,
)
from jigsaw import Jigsaw
from pretexts import PRETEXTS
from rotation import JigsawRotation, Rotation, quarter_turns
from runtime.randomness import make_generator

TASKS = list(PRETEXTS)


def make_images(count, side):
    generator = make_generator("cpu", 1)
    return torch.rand(count, 3, side, side, generator=generator) * 255


def make_uniforms(count, columns, seed=0):
    return torch.rand(count, columns, generator=make_generator("cpu", seed))


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


# ---- The views -----------------------------------------------------------------------
@pytest.mark.parametrize(("side", "strength"), [(36, 0.5), (55, 1.5)])
def test_the_view_is_cropped_then_coloured_then_turned(side, strength):
    """By 4, 6 and 1 random numbers of the image, with a fifth of its area or more."""
    images = make_images(20, side)
    uniforms = make_uniforms(20, 11)
    uniforms[:4, 10] = torch.tensor([0.1, 0.3, 0.6, 0.9])
    corner, size = crop_box(uniforms[:, :4], side, (0.2, 1.0))
    crops = sample(images, box_transforms(corner, size, side), side)
    upright = ColourJitter(strength)(crops, uniforms[:, 4:10])
    expected = rotate_each(upright, (4 * uniforms[:, 10]).int().tolist())

    view = Rotation(strength)(images, uniforms)
    torch.testing.assert_close(view, expected, rtol=0, atol=1e-5)
    assert view.dtype == torch.float32
    assert view.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("task", TASKS)
def test_a_view_does_not_depend_on_the_rest_of_the_batch(task):
    pretext = PRETEXTS[task](0.5)
    images = make_images(5, 48)
    uniforms = make_uniforms(5, pretext.uniforms)
    together = pretext(images, uniforms).unflatten(0, (5, pretext.inputs_per_image))
    for i in range(5):
        alone = pretext(images[i : i + 1], uniforms[i : i + 1])
        torch.testing.assert_close(together[i], alone, rtol=0, atol=1e-4)


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


# ---- The head ------------------------------------------------------------------------
@pytest.mark.parametrize("non_linear", [False, True])
def test_the_head_is_one_layer_on_the_features_or_two_with_a_relu(non_linear):
    head = Rotation().make_head(64, non_linear)
    layers = [m for m in head.modules() if isinstance(m, torch.nn.Linear)]
    features = torch.randn(5, 1, 64)
    expected = layers[0](features[:, 0])
    if non_linear:
        expected = layers[1](expected.relu())
    assert len(layers) == 1 + non_linear
    assert expected.shape == (5, 128)
    assert head(features).equal(expected)


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
