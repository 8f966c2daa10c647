import math

import run_helpers as rh
import pytest
import torch

import jigsaw
from dataset_helpers import MEAN, STD, crop_box
from jigsaw import JIGSAW_DRAWS, jigsaw_view, patch_places, patch_sizes


def draws(count, seed=0):
    return torch.rand(count, JIGSAW_DRAWS, generator=rh.generator("cpu", seed))


def without_colour(rows, whole_image=False):
    """The same draws with no jitter and no gray, and with the crop being the whole image if asked."""
    rows = rows.clone()
    colours = rows[:, 4 + 18 : 4 + 18 + 54].view(-1, 9, 6)
    colours[..., 4], colours[..., 5] = 0.99, 0.99
    if whole_image:
        rows[:, 0], rows[:, 1] = 1 - 2**-24, 0.5
    return rows


def to_pixels(patches, count):
    """Back to 0 … 255: [B, 9, 3, P, P]."""
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return ((patches * std + mean) * 255).unflatten(0, (count, 9))


def places_of(rows, side):
    """Where the paper would cut, in plain Python: [(cell, top, left)] of each presented patch."""
    cell, patch = side // 3, min(side // 3, 30 * side // 96)
    result = []
    for row in rows:
        offsets, order = row[4:22].view(9, 2).tolist(), row[76:85].tolist()
        presented = sorted(range(9), key=lambda c: order[c])
        result.append(
            [
                (c, c // 3 * cell + int(y * (cell - patch + 1)), c % 3 * cell + int(x * (cell - patch + 1)))
                for c, (y, x) in zip(presented, offsets, strict=True)
            ]
        )
    return result


@pytest.mark.parametrize("side", [96, 48, 64])
def test_every_patch_is_the_pixels_it_claims_to_be(side):
    """Crop of the whole image, no colours: each patch is a copy of a square of the image."""
    images = torch.randint(0, 256, (6, 3, side, side)).float()
    rows = without_colour(draws(6), whole_image=True)
    patches = to_pixels(jigsaw_view(images, rows), 6)
    size = patch_sizes(side)[1]
    for image, shown, places in zip(images, patches, places_of(rows, side), strict=True):
        assert sorted(c for c, _, _ in places) == list(range(9)), "all nine cells, each once"
        for patch, (_, top, left) in zip(shown, places, strict=True):
            torch.testing.assert_close(patch, image[:, top : top + size, left : left + size], rtol=0, atol=0.02)


def test_patches_of_a_crop_come_from_where_the_crop_says():
    """On images whose red is the row and green the column, a pixel says where it came from."""
    side = 96
    place = torch.arange(side).float()
    image = torch.stack([place[:, None].expand(side, side), place[None].expand(side, side), torch.zeros(side, side)])
    rows = without_colour(draws(40, seed=3))
    patches = to_pixels(jigsaw_view(image.repeat(40, 1, 1, 1), rows), 40)
    (top, left), (height, width) = (pair.T for pair in crop_box(rows[:, :4], side, jigsaw.PRETEXT_CROP_AREA))
    for i, places in enumerate(places_of(rows, side)):
        for p, (_, row, column) in enumerate(places):
            y = top[i] + (row + place[:30] + 0.5) * height[i] / side - 0.5
            x = left[i] + (column + place[:30] + 0.5) * width[i] / side - 0.5
            y, x = y.clamp(top[i], top[i] + height[i] - 1), x.clamp(left[i], left[i] + width[i] - 1)
            torch.testing.assert_close(patches[i, p, 0], y[:, None].expand(30, 30), rtol=0, atol=0.02)
            torch.testing.assert_close(patches[i, p, 1], x[None].expand(30, 30), rtol=0, atol=0.02)


def test_crop_keeps_at_least_60_percent_and_stays_inside():
    (top, left), (height, width) = (pair.T for pair in crop_box(draws(20000)[:, :4], 96, jigsaw.PRETEXT_CROP_AREA))
    area = height * width / 96**2
    assert area.min() >= 0.6 - 1e-5
    assert area.max() <= 1 + 1e-5
    for start, extent in ((top, height), (left, width)):
        assert start.min() >= -1e-4
        assert (start + extent).max() <= 96 + 1e-3


def test_permutation_is_uniform_and_independent_of_the_cell():
    count = 60000
    rows = draws(count, seed=5)
    permutation, _ = patch_places(rows[:, 4:22].view(-1, 9, 2), rows[:, 76:85], 96)
    assert (permutation.sort(1).values == torch.arange(9)).all()
    expected = count / 9
    for place in range(9):
        seen = torch.bincount(permutation[:, place], minlength=9)
        assert ((seen - expected) ** 2 / expected).sum() < 30  # 8 degrees of freedom: 1 in 5,000
    pairs = torch.bincount(permutation[:, 0] * 9 + permutation[:, 8], minlength=81).view(9, 9)
    expected = count / 72
    assert pairs.diagonal().sum() == 0
    assert ((pairs[~torch.eye(9, dtype=bool)] - expected) ** 2 / expected).sum() < 120  # 71 degrees: 1 in 5,000
    # whole permutations: with 60,000 of 362,880 equally likely ones, so many differ
    code = (permutation * 9 ** torch.arange(9)).sum(1).unique().numel()
    assert abs(code - 362880 * (1 - math.exp(-count / 362880))) < 500


def test_offsets_reach_every_place_in_the_cell_equally_often():
    rows = draws(20000, seed=6)
    permutation, pixels = patch_places(rows[:, 4:22].view(-1, 9, 2), rows[:, 76:85], 96)
    y, x = pixels[..., 0].long().unbind(2)
    for offset in (y - permutation // 3 * 32, x - permutation % 3 * 32):
        assert offset.min() == 0
        assert offset.max() == 2
        seen = torch.bincount(offset.flatten(), minlength=3) / offset.numel()
        assert (seen - 1 / 3).abs().max() < 0.01


def test_each_patch_has_its_own_colours():
    images = torch.full((4, 3, 96, 96), 120.0)
    images[:, 0], images[:, 2] = 180.0, 60.0
    patches = to_pixels(jigsaw_view(images, draws(4, seed=7)), 4).mean((-1, -2))
    for image in patches:
        different = {tuple(round(v, 1) for v in patch.tolist()) for patch in image}
        assert len(different) >= 6


def test_shape_type_and_memory_format():
    view = jigsaw_view(torch.rand(5, 3, 96, 96) * 255, draws(5))
    assert view.shape == (45, 3, 30, 30)
    assert view.dtype == torch.float32
    assert view.is_contiguous(memory_format=torch.channels_last)
