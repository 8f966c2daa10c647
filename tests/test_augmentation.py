import math

import run_helpers as rh
import pytest
import torch
import torchvision.transforms.functional as TF

import dataset_helpers as dh


def draws(count, columns, seed=0):
    return torch.rand(count, columns, generator=rh.generator("cpu", seed))


def to_unit(view):
    return view * torch.tensor(dh.STD)[:, None, None] + torch.tensor(dh.MEAN)[:, None, None]


VIEWS = [(dh.image_view, dh.IMAGE_VIEW_DRAWS), (dh.labelled_view, dh.LABELLED_VIEW_DRAWS)]


@pytest.mark.parametrize(("view", "columns"), VIEWS)
def test_views_differ_within_a_batch_and_do_not_depend_on_it(view, columns):
    image = torch.rand(3, 96, 96, generator=rh.generator("cpu", 1)) * 255
    images, rows = image.repeat(8, 1, 1, 1), draws(8, columns)
    together = view(images, rows)
    for i in range(8):
        for j in range(i):
            assert (together[i] - together[j]).abs().mean() > 0.01
    order = torch.tensor([5, 2, 7])
    torch.testing.assert_close(view(images[order], rows[order]), together[order], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("view", "columns"), VIEWS)
def test_views_are_normalised_channels_last_and_in_range(view, columns):
    out = view(torch.randint(0, 256, (4, 3, 96, 96)).float(), draws(4, columns))
    assert out.shape == (4, 3, 96, 96)
    assert out.is_contiguous(memory_format=torch.channels_last)
    unit = to_unit(out)
    assert unit.min() >= -1e-5
    assert unit.max() <= 1 + 1e-5


@pytest.mark.parametrize("box", [(0, 0, 96, 96), (10, 20, 50, 70), (46, 0, 50, 96), (3, 5, 31, 29)])
def test_crop_and_resize_equal_torchvision(box):
    images = torch.randint(0, 256, (2, 3, 96, 96)).float()
    expected = TF.resized_crop(images, *box, size=[96, 96], antialias=False)
    corner, size = torch.tensor(box).float().expand(2, 4)[..., None].split(2, 1)
    y, x = dh.crop_coordinates(corner, size, torch.arange(96), 96).unbind(1)
    mine = dh.sample(images, y[:, None, :, None], x[:, None, None, :])
    torch.testing.assert_close(mine, expected, rtol=0, atol=0.02)


def test_flip_mirrors_half_of_the_images():
    rows = draws(1000, dh.IMAGE_VIEW_DRAWS, seed=2)
    rows[:, 0], rows[:, 1], rows[:, 9], rows[:, 10] = 1 - 2**-24, 0.5, 0.99, 0.99  # whole image, own colours
    ramp = torch.arange(48.0).expand(1000, 3, 48, 48) * 5
    rising = to_unit(dh.image_view(ramp, rows)).diff(dim=-1).mean((1, 2, 3)) > 0
    assert (rising == (rows[:, 4] < 0.5)).all()
    assert 430 < rising.sum() < 570


def test_crop_area_and_aspect_span_their_ranges():
    (top, left), (height, width) = (pair.T for pair in dh.crop_box(draws(20000, 4), 96, (0.2, 1.0)))
    area, aspect = height * width / 96**2, width / height
    assert area.min() == pytest.approx(0.2, abs=0.01)
    assert area.max() == pytest.approx(1.0, abs=0.01)
    assert abs(area.mean() - 0.6) < 0.01
    assert 0.74 < aspect.min() < 0.77
    assert 1.3 < aspect.max() < 1.34
    assert (top >= 0).all()
    assert (left + width <= 96 + 1e-3).all()
    assert (height <= 96 + 1e-3).all()


def colours(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.0):
    return [torch.full((2,), value) for value in (brightness, contrast, saturation, hue)]


def gentle():
    """Colours in the middle of the range, where nothing is clipped."""
    return 80 + 90 * torch.rand(2, 3, 16, 16, generator=rh.generator("cpu", 3))


@pytest.mark.parametrize(
    ("name", "change"),
    [("brightness", TF.adjust_brightness), ("contrast", TF.adjust_contrast), ("saturation", TF.adjust_saturation)],
)
@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_jitter_equals_torchvision(name, change, factor):
    images = gentle()
    mine = to_unit(dh.recolour(images, *colours(**{name: factor})))
    torch.testing.assert_close(mine, change(images / 255, factor), rtol=0, atol=2e-3)


def test_jitter_of_several_kinds_equals_torchvision_in_any_order():
    images = gentle()
    mine = to_unit(dh.recolour(images, *colours(1.2, 0.8, 1.3)))
    one = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(images / 255, 1.2), 0.8), 1.3)
    other = TF.adjust_brightness(TF.adjust_contrast(TF.adjust_saturation(images / 255, 1.3), 0.8), 1.2)
    torch.testing.assert_close(mine, one, rtol=0, atol=3e-3)
    torch.testing.assert_close(mine, other, rtol=0, atol=3e-3)


def test_gray_equals_torchvision():
    images = gentle()
    mine = to_unit(dh.recolour(images, *colours(saturation=0.0)))
    torch.testing.assert_close(mine, TF.rgb_to_grayscale(images / 255, 3), rtol=0, atol=2e-3)


def test_hue_turns_colours_and_keeps_luma_and_saturation():
    images, angle = gentle(), 0.5
    yiq = torch.tensor(dh.YIQ)
    before = torch.einsum("ij,bjhw->bihw", yiq, images / 255)
    after = torch.einsum("ij,bjhw->bihw", yiq, to_unit(dh.recolour(images, *colours(hue=angle))))
    torch.testing.assert_close(after[:, 0], before[:, 0], rtol=0, atol=1e-4)
    i, q = before[:, 1], before[:, 2]
    expected = torch.stack([i * math.cos(angle) - q * math.sin(angle), i * math.sin(angle) + q * math.cos(angle)], 1)
    torch.testing.assert_close(after[:, 1:], expected, rtol=0, atol=1e-4)


def test_hue_is_near_torchvision_s_in_the_colour_plane():
    """torchvision turns the hue of HSV, which moves the luma too; the colour planes turn alike, the other way round."""
    image = torch.tensor([160.0, 90.0, 90.0]).view(1, 3, 1, 1).repeat(2, 1, 2, 2)
    axes = torch.tensor(dh.YIQ)[1:]
    mine = axes @ (to_unit(dh.recolour(image, *colours(hue=-0.05 * 2 * math.pi))) - image / 255)[0, :, 0, 0]
    theirs = axes @ (TF.adjust_hue(image / 255, 0.05) - image / 255)[0, :, 0, 0]
    assert torch.cosine_similarity(mine, theirs, dim=0) > 0.7


@pytest.mark.parametrize(("strength", "turn", "factors"), [((), 0.05, (0.8, 1.2)), ((1,), 0.1, (0.6, 1.4))])
def test_jitter_parameters_are_those_that_are_documented(strength, turn, factors):
    brightness, contrast, saturation, hue = dh.jitter(draws(20000, 6, seed=4), *strength)
    kept = (brightness == 1) & (contrast == 1) & (hue == 0)
    assert kept.float().mean() == pytest.approx(0.2, abs=0.015)
    assert (saturation == 0).float().mean() == pytest.approx(0.2, abs=0.015)
    for factor in (brightness, contrast, saturation[saturation > 0]):
        assert factor.min() == pytest.approx(factors[0], abs=0.01)
        assert factor.max() == pytest.approx(factors[1], abs=0.01)
    assert hue.abs().max() == pytest.approx(turn * 2 * math.pi, abs=0.01)


def test_with_strength_0_all_images_keep_their_colours():
    brightness, contrast, saturation, hue = dh.jitter(draws(1000, 6, seed=4), 0)
    assert (torch.stack([brightness, contrast, saturation]) == 1).all()
    assert (hue == 0).all()


def test_labelled_view_turns_about_the_middle():
    rows = draws(200, dh.LABELLED_VIEW_DRAWS, seed=5)
    rows[:, 0], rows[:, 1], rows[:, 4], rows[:, 6] = 1 - 2**-24, 0.5, 0.0, 0.5  # whole image, no flip, light 1
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(48.0), indexing="ij")
    images = torch.stack([y, x, 0 * x]).repeat(200, 1, 1, 1) * 4
    out = to_unit(dh.labelled_view(images, rows))[:, :, 12:36, 12:36] * 255 / 4
    angle = (2 * rows[:, 5] - 1) * math.radians(15)
    y, x = y[12:36, 12:36] - 23.5, x[12:36, 12:36] - 23.5
    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
    torch.testing.assert_close(out[:, 0], y * cos + x * sin + 23.5, rtol=0, atol=0.01)
    torch.testing.assert_close(out[:, 1], x * cos - y * sin + 23.5, rtol=0, atol=0.01)


def test_splits_are_disjoint_stratified_and_from_the_seed():
    labels = torch.arange(5000) % 10
    train, validation = dh.stratified_split(labels, 3, "train")
    assert (len(train), len(validation)) == (4200, 800)
    assert torch.cat([train, validation]).sort().values.equal(torch.arange(5000))
    assert torch.bincount(labels[validation]).tolist() == [80] * 10
    assert dh.stratified_split(labels, 3, "train")[1].equal(validation)
    assert not dh.stratified_split(labels, 4, "train")[1].equal(validation)
