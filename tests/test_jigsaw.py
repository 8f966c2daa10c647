"""The jigsaw view: which pixels its patches are, and their colours."""

import pytest
import torch

from augmentations import PIXEL_MEAN, PIXEL_STD, crop_box
from jigsaw import Jigsaw, patch_sizes
from runtime.randomness import make_generator

# The columns of an image's random numbers.
CROP = slice(0, 4)
OFFSETS = slice(4, 22)
COLOURS = slice(22, 76)
ORDER = slice(76, 85)


def make_uniforms(count, seed=0):
    return torch.rand(count, Jigsaw.uniforms, generator=make_generator("cpu", seed))


def without_colour(uniforms):
    """The same random numbers, but with no colour jitter and no gray."""
    uniforms = uniforms.clone()
    colours = uniforms[:, COLOURS].unflatten(1, (9, 6))
    colours[..., 4] = 0.99
    colours[..., 5] = 0.99
    return uniforms


def of_whole_image(uniforms):
    """The same random numbers, but with the crop being the whole image."""
    uniforms = uniforms.clone()
    uniforms[:, 0] = 1 - 2**-24
    uniforms[:, 1] = 0.5
    return uniforms


def to_pixels(patches, count):
    """Back to 0 … 255: [B, 9, 3, P, P]."""
    mean = torch.tensor(PIXEL_MEAN)[:, None, None]
    std = torch.tensor(PIXEL_STD)[:, None, None]
    return ((patches * std + mean) * 255).unflatten(0, (count, 9))


def places_of(uniforms, side):
    """Where the paper would cut, in plain Python.

    For each image a list of its patches in the order of presentation, each a
    (cell, top, left).
    """
    cell_side = side // 3
    patch = min(cell_side, 30 * side // 96)
    free = cell_side - patch + 1

    result = []
    for row in uniforms:
        offsets = row[OFFSETS].view(9, 2).tolist()
        order = row[ORDER].tolist()
        presented = sorted(range(9), key=lambda cell: order[cell])
        places = []
        for cell, (y, x) in zip(presented, offsets, strict=True):
            top = cell // 3 * cell_side + int(y * free)
            left = cell % 3 * cell_side + int(x * free)
            places.append((cell, top, left))
        result.append(places)
    return result


# ---- Pixels --------------------------------------------------------------------------
@pytest.mark.parametrize("side", [96, 50])
def test_every_patch_is_the_pixels_it_claims_to_be(side):
    """Crop of the whole image, no colours: each patch is a copy of a square of it."""
    images = torch.randint(0, 256, (6, 3, side, side)).float()
    uniforms = of_whole_image(without_colour(make_uniforms(6)))
    view = Jigsaw()(images, uniforms)
    assert view.dtype == torch.float32
    assert view.is_contiguous(memory_format=torch.channels_last)
    patches = to_pixels(view, 6)

    _, size = patch_sizes(side)
    assert patches.shape == (6, 9, 3, size, size)
    places_of_images = places_of(uniforms, side)
    for image, shown, places in zip(images, patches, places_of_images, strict=True):
        cells = [cell for cell, _, _ in places]
        assert sorted(cells) == list(range(9)), "all nine cells, each once"
        for patch, (_, top, left) in zip(shown, places, strict=True):
            square = image[:, top : top + size, left : left + size]
            torch.testing.assert_close(patch, square, rtol=0, atol=0.02)


def test_patches_of_a_crop_come_from_where_the_crop_says():
    """If red is the row and green the column, a pixel says where it is from.

    At the crop's border, too: there it may be from half a pixel beyond the crop, but
    not from beyond the image.
    """
    side = 96
    place = torch.arange(side).float()
    red = place[:, None].expand(side, side)
    green = place[None].expand(side, side)
    image = torch.stack([red, green, torch.zeros(side, side)])
    uniforms = without_colour(make_uniforms(40, seed=3))
    patches = to_pixels(Jigsaw()(image.repeat(40, 1, 1, 1), uniforms), 40)

    corner, size = crop_box(uniforms[:, CROP], side, (0.6, 1.0))
    pixels = place[:30] + 0.5
    for i, places in enumerate(places_of(uniforms, side)):
        top, left = corner[i]
        height, width = size[i]
        for p, (_, row, column) in enumerate(places):
            y = top + (row + pixels) * height / side - 0.5
            x = left + (column + pixels) * width / side - 0.5
            y = y.clamp(0, side - 1)[:, None].expand(30, 30)
            x = x.clamp(0, side - 1)[None].expand(30, 30)
            torch.testing.assert_close(patches[i, p, 0], y, rtol=0, atol=0.02)
            torch.testing.assert_close(patches[i, p, 1], x, rtol=0, atol=0.02)


def test_each_patch_has_its_own_colours():
    images = torch.full((4, 3, 96, 96), 120.0)
    images[:, 0] = 180.0
    images[:, 2] = 60.0
    patches = to_pixels(Jigsaw()(images, make_uniforms(4, seed=7)), 4)
    for colours in patches.mean((-1, -2)):  # [9, 3]
        different = {tuple(round(value, 1) for value in c.tolist()) for c in colours}
        assert len(different) >= 6


def test_the_picture_of_a_crop_has_two_white_lines_each_way():
    """Between the cells of 16 pixels; two pixels of 50 are behind the third."""
    picture = Jigsaw().crop_pictures(torch.zeros(1, 3, 50, 50), make_uniforms(1))[0]
    rows = picture[:, :, 0].amin(0).nonzero().flatten().tolist()
    columns = picture[:, 0].amin(0).nonzero().flatten().tolist()
    assert rows == columns == [15, 16, 31, 32]
