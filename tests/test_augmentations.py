"""Views against torchvision's transforms, and the ranges of their parameters."""

import math

import pytest
import torch
import torchvision.transforms.functional as TF

from augmentations import (
    COLOUR_UNIFORMS,
    CROP_UNIFORMS,
    IMAGE_VIEW_UNIFORMS,
    LABELLED_VIEW_UNIFORMS,
    PIXEL_MEAN,
    PIXEL_STD,
    YIQ,
    ColourJitter,
    ImageView,
    LabelledView,
    crop_box,
    normalize,
    unnormalize,
)
from jigsaw import Jigsaw
from runtime.randomness import make_generator

ALMOST_ONE = 1 - 2**-24  # the largest number that torch.rand gives


def make_uniforms(count, columns, seed=0):
    return torch.rand(count, columns, generator=make_generator("cpu", seed))


def to_unit(view):
    """Normalised views to RGB in 0 … 1."""
    std = torch.tensor(PIXEL_STD)[:, None, None]
    mean = torch.tensor(PIXEL_MEAN)[:, None, None]
    return view * std + mean


# ---- Whole views ---------------------------------------------------------------------
@pytest.mark.parametrize(
    ("view", "columns", "area"),
    [
        (ImageView(), IMAGE_VIEW_UNIFORMS, (0.2, 1.0)),
        (ImageView(min_area=0.7), IMAGE_VIEW_UNIFORMS, (0.7, 1.0)),
        (LabelledView(PIXEL_MEAN, PIXEL_STD), LABELLED_VIEW_UNIFORMS, (0.2, 1.0)),
    ],
    ids=["image", "image, 70 %", "labelled"],
)
def test_a_view_is_the_crop_of_its_numbers_mirrored_by_the_fifth(view, columns, area):
    """If red is the row and green the column, a pixel says where it is from."""
    side = 48
    uniforms = make_uniforms(40, columns, seed=11)
    # Its own colours; or neither turned nor brighter.
    uniforms[:, 5:] = 0.99 if columns == IMAGE_VIEW_UNIFORMS else 0.5
    place = torch.arange(48.0)
    y, x = torch.meshgrid(place, place, indexing="ij")
    images = torch.stack([y, x, 0 * x]).repeat(40, 1, 1, 1) * 5
    seen = to_unit(view(images, uniforms)) * 255 / 5

    corners, sizes = crop_box(uniforms[:, :4], side, area)
    for row, shown, corner, size in zip(uniforms, seen, corners, sizes, strict=True):
        down = corner[0] + (place + 0.5) * size[0] / side - 0.5
        right = corner[1] + (place + 0.5) * size[1] / side - 0.5
        if row[4] >= 0.5:
            right = right.flip(0)
        down = down.clamp(0, side - 1)[:, None].expand(side, side)
        right = right.clamp(0, side - 1).expand(side, side)
        torch.testing.assert_close(shown[0], down, rtol=0, atol=0.02)
        torch.testing.assert_close(shown[1], right, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("view", "columns"),
    [
        (ImageView(), IMAGE_VIEW_UNIFORMS),
        (LabelledView(PIXEL_MEAN, PIXEL_STD), LABELLED_VIEW_UNIFORMS),
    ],
)
def test_views_differ_within_a_batch_and_do_not_depend_on_it(view, columns):
    """They are channels-last, and normalised after they are clipped."""
    image = torch.rand(3, 96, 96, generator=make_generator("cpu", 1)) * 255
    images = image.repeat(8, 1, 1, 1)
    uniforms = make_uniforms(8, columns)

    together = view(images, uniforms)
    assert together.shape == (8, 3, 96, 96)
    assert together.is_contiguous(memory_format=torch.channels_last)
    assert to_unit(together).min() >= -1e-5
    assert to_unit(together).max() <= 1 + 1e-5
    for i in range(8):
        for j in range(i):
            assert (together[i] - together[j]).abs().mean() > 0.01

    order = torch.tensor([5, 2, 7])
    alone = view(images[order], uniforms[order])
    torch.testing.assert_close(alone, together[order], rtol=0, atol=1e-5)


def test_views_have_nothing_to_save():
    """Their constants follow them to a GPU, and stay out of checkpoints."""
    for module in (ImageView(), LabelledView(PIXEL_MEAN, PIXEL_STD), Jigsaw()):
        assert list(module.buffers())
        assert not list(module.parameters())
        assert not module.state_dict()


def test_plain_images_and_their_way_back():
    images = torch.randint(0, 256, (4, 3, 48, 48), dtype=torch.uint8)
    out = normalize(images, PIXEL_MEAN, PIXEL_STD)
    assert out.dtype == torch.float32
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(to_unit(out), images / 255, rtol=0, atol=1e-5)
    torch.testing.assert_close(unnormalize(out), images / 255, rtol=0, atol=1e-5)


# ---- Crops, flips and rotations ------------------------------------------------------
def test_a_crop_s_box_by_hand():
    """A number each for the area, the aspect ratio, the row and the column."""
    uniforms = make_uniforms(300, CROP_UNIFORMS, seed=9)
    corners, sizes = crop_box(uniforms, 96, (0.2, 1.0))
    limited = 0
    for row, corner, size in zip(uniforms, corners, sizes, strict=True):
        area, aspect, down, right = row.double().tolist()
        pixels = (0.2 + 0.8 * area) * 96**2
        width = math.sqrt(pixels * 3 / 4 * ((4 / 3) / (3 / 4)) ** aspect)
        limited += not pixels / 96 <= width <= 96
        width = max(min(width, 96), pixels / 96)
        height = pixels / width
        assert size.tolist() == pytest.approx([height, width], rel=1e-4)
        place = [down * (96 - height), right * (96 - width)]
        assert corner.tolist() == pytest.approx(place, abs=0.01)
    assert 10 < limited < 100


def test_labelled_view_turns_about_the_middle():
    uniforms = make_uniforms(200, LABELLED_VIEW_UNIFORMS, seed=5)
    uniforms[:, 0] = ALMOST_ONE  # the whole image
    uniforms[:, 1] = 0.5
    uniforms[:, 4] = 0.0  # not mirrored
    uniforms[:, 6] = 0.5  # as bright as it is

    # If red is the row and green the column, a pixel says where it is from.
    place = torch.arange(48.0)
    y, x = torch.meshgrid(place, place, indexing="ij")
    images = torch.stack([y, x, 0 * x]).repeat(200, 1, 1, 1) * 4
    view = to_unit(LabelledView(PIXEL_MEAN, PIXEL_STD)(images, uniforms)) * 255 / 4
    view = view[:, :, 12:36, 12:36]

    angle = (2 * uniforms[:, 5] - 1) * math.radians(15)
    cos = angle.cos()[:, None, None]
    sin = angle.sin()[:, None, None]
    y = y[12:36, 12:36] - 23.5
    x = x[12:36, 12:36] - 23.5
    expected_y = y * cos + x * sin + 23.5
    expected_x = x * cos - y * sin + 23.5
    torch.testing.assert_close(view[:, 0], expected_y, rtol=0, atol=0.01)
    torch.testing.assert_close(view[:, 1], expected_x, rtol=0, atol=0.01)


def test_labelled_view_changes_the_brightness_and_clips():
    """And it is normalised as the trunk wants it: here not as STL-10."""
    mean = torch.tensor([0.1, 0.2, 0.3])
    std = torch.tensor([0.4, 0.5, 0.6])
    labelled_view = LabelledView(tuple(mean.tolist()), tuple(std.tolist()))
    uniforms = make_uniforms(200, LABELLED_VIEW_UNIFORMS, seed=6)
    factors = 0.6 + 0.8 * uniforms[:, 6]
    for value in (100, 220):
        images = torch.full((200, 3, 36, 36), float(value))
        view = labelled_view(images, uniforms)
        view = view * std[:, None, None] + mean[:, None, None]
        expected = (value / 255 * factors).clamp(max=1)
        expected = expected[:, None, None, None].expand_as(view)
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-4)


# ---- Colour --------------------------------------------------------------------------
def recolour(images, brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0):
    """The colours of images [2, 3, H, W] in 0 … 255, changed like this; in 0 … 1.

    At strength 1, factors reach from 0.6 to 1.4, and the hue a tenth of a turn.
    Saturation 0 is the grayscale of some images.
    """
    is_gray = saturation == 0
    uniforms = torch.tensor(
        [
            0.5 + (brightness - 1) / 0.8,
            0.5 + (contrast - 1) / 0.8,
            0.5 if is_gray else 0.5 + (saturation - 1) / 0.8,
            0.5 + hue / (2 * math.pi) / 0.2,
            0.0,  # jittered
            0.0 if is_gray else 0.99,
        ]
    )
    return to_unit(ColourJitter(1)(images, uniforms.repeat(2, 1)))


def gentle_images():
    """Colours in the middle of the range, where nothing is clipped."""
    return 80 + 90 * torch.rand(2, 3, 16, 16, generator=make_generator("cpu", 3))


@pytest.mark.parametrize(
    ("name", "factor"),
    [
        *(("brightness", 0.7), ("brightness", 1.3)),
        *(("contrast", 0.7), ("contrast", 1.3)),
        *(("saturation", 0.7), ("saturation", 1.3), ("saturation", 0)),
    ],
)
def test_jitter_equals_torchvision(name, factor):
    change = getattr(TF, f"adjust_{name}")
    images = gentle_images()
    changed = recolour(images, **{name: factor})
    expected = change(images / 255, factor)
    torch.testing.assert_close(changed, expected, rtol=0, atol=2e-3)


def test_jitter_of_several_kinds_equals_torchvision():
    images = gentle_images()
    changed = recolour(images, brightness=1.2, contrast=0.8, saturation=1.3)

    expected = TF.adjust_brightness(images / 255, 1.2)
    expected = TF.adjust_contrast(expected, 0.8)
    expected = TF.adjust_saturation(expected, 1.3)
    torch.testing.assert_close(changed, expected, rtol=0, atol=3e-3)


def test_hue_turns_colours_and_keeps_luma_and_saturation():
    images = gentle_images()
    angle = 0.5
    yiq = torch.tensor(YIQ)
    before = torch.einsum("ij,bjhw->bihw", yiq, images / 255)
    after = torch.einsum("ij,bjhw->bihw", yiq, recolour(images, hue=angle))
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=1e-4)

    i = before[:, 1]
    q = before[:, 2]
    turned_i = i * math.cos(angle) - q * math.sin(angle)
    turned_q = i * math.sin(angle) + q * math.cos(angle)
    expected = torch.stack([turned_i, turned_q], dim=1)
    torch.testing.assert_close(after[:, 1:], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("colour_jitter", "strength"),
    [
        (ImageView().colour_jitter, 0.5),
        (Jigsaw().colour_jitter, 0.5),
        (ImageView(colour_strength=1.5).colour_jitter, 1.5),
        (Jigsaw(colour_strength=1.5).colour_jitter, 1.5),
    ],
)
def test_jitter_parameters_are_those_that_are_documented(colour_jitter, strength):
    """Four images of five are jittered, and one of five becomes gray."""
    uniforms = make_uniforms(300, COLOUR_UNIFORMS, seed=4)
    parameters = torch.stack(colour_jitter.parameters_of(uniforms), dim=1)
    for row, actual in zip(uniforms.tolist(), parameters, strict=True):
        *changes, jittered, gray = row
        reach = strength * (jittered < 0.8)
        expected = [1 + 0.4 * reach * (2 * change - 1) for change in changes]
        expected[3] = 2 * math.pi * 0.1 * reach * (2 * changes[3] - 1)
        if gray < 0.2:
            expected[2] = 0
        assert actual.tolist() == pytest.approx(expected, abs=1e-5)


def test_with_strength_0_all_images_keep_their_colours():
    uniforms = make_uniforms(100, COLOUR_UNIFORMS, seed=4)
    images = torch.randint(0, 256, (100, 3, 8, 8)).float()
    view = to_unit(ColourJitter(0)(images, uniforms))
    torch.testing.assert_close(view, images / 255, rtol=0, atol=1e-5)
