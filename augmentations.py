"""Crops, flips and colour: batched tensor operations with random numbers per image.

What is random about a view of an image is a row of numbers, uniform in [0, 1). So a
view is a function of (seed, epoch, image), whatever else is in the batch. torchvision's
transforms would draw one set of parameters for the whole batch.
"""

import math

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn

PIXEL_MEAN = (0.4467, 0.4398, 0.4066)  # of STL-10's unlabelled images, RGB in [0, 1]
PIXEL_STD = (0.2603, 0.2566, 0.2713)

# How many random numbers each part of a view takes.
CROP_UNIFORMS = 4
COLOUR_UNIFORMS = 6
IMAGE_VIEW_UNIFORMS = CROP_UNIFORMS + 1 + COLOUR_UNIFORMS
LABELLED_VIEW_UNIFORMS = CROP_UNIFORMS + 3

CROP_AREA = (0.2, 1.0)  # of the image's area
CROP_ASPECT = (3 / 4, 4 / 3)  # width to height
ROTATION = math.radians(15)  # of labelled images, at most, either way
LABELLED_BRIGHTNESS = (0.6, 1.4)

COLOUR_STRENGTH = 0.5  # the default: half of the ranges below
COLOUR_RANGE = 0.4  # brightness, contrast and saturation are in 1 ± this, at strength 1
HUE_RANGE = 0.1  # of a full turn, either way, at strength 1
JITTER_PROBABILITY = 0.8  # of brightness, contrast, saturation and hue together
GRAY_PROBABILITY = 0.2

# Luma, and the two axes of the colour plane in which the hue is an angle.
YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))


# ---- The views -----------------------------------------------------------------------
class ImageView(nn.Module):
    """The image view I: random resized crop, horizontal flip, colour jitter, grayscale.

    (Paper, appendix A.)
    """

    def __init__(self, min_area=CROP_AREA[0], colour_strength=COLOUR_STRENGTH):
        """min_area: of the crop, as a fraction of the image's."""
        super().__init__()
        self.area = (min_area, CROP_AREA[1])
        self.colour_jitter = ColourJitter(colour_strength)

    def forward(self, images, uniforms):
        """images [B, 3, S, S] float32 in 0 … 255, uniforms [B, 11] -> [B, 3, S, S].

        The result is float32, normalised, channels-last.
        """
        sizes = [CROP_UNIFORMS, 1, COLOUR_UNIFORMS]
        crop_uniforms, flip_uniforms, colour_uniforms = uniforms.split(sizes, dim=1)
        side = images.shape[-1]

        corner, size = crop_box(crop_uniforms, side, self.area)
        transforms = box_transforms(corner, size, side)
        transforms = flip_half(transforms, flip_uniforms)
        view = sample(images, transforms, side)
        return self.colour_jitter(view, colour_uniforms)


class LabelledView(nn.Module):
    """The view for fine-tuning: crop, rotation by up to 15°, flip, brightness."""

    def __init__(self, mean, std):
        """mean, std: of the pixels, as the trunk expects them; see normalize()."""
        super().__init__()
        self.normalize = Normalize(mean, std)

    def forward(self, images, uniforms):
        """images [B, 3, S, S] float32 in 0 … 255, uniforms [B, 7] -> [B, 3, S, S].

        The result is float32, normalised, channels-last.
        """
        sizes = [CROP_UNIFORMS, 1, 1, 1]
        split = uniforms.split(sizes, dim=1)
        crop_uniforms, flip_uniforms, angle_uniforms, brightness_uniforms = split
        side = images.shape[-1]

        # Each map takes a pixel of the view to a place in the image. The rightmost acts
        # first: flip within the box, box to image, rotation about the image's centre,
        # which is (0, 0).
        corner, size = crop_box(crop_uniforms, side, CROP_AREA)
        transforms = box_transforms(corner, size, side)
        transforms = flip_half(transforms, flip_uniforms)
        angle = between(angle_uniforms[:, 0], -ROTATION, ROTATION)
        transforms = rotations(angle) @ transforms
        view = sample(images, transforms, side)

        brightness = between(brightness_uniforms, *LABELLED_BRIGHTNESS)
        view = view / 255 * brightness[:, :, None, None]
        return self.normalize(view.clamp(max=1))


def between(uniforms, low, high):
    """Numbers in [0, 1) to numbers in [low, high)."""
    return low + (high - low) * uniforms


# ---- Crops, as affine maps for F.affine_grid -----------------------------------------
def crop_box(uniforms, side, area):
    """A random box inside an image of side × side pixels.

    Its area is uniform between `area`, two fractions of the image's; its aspect ratio
    is log-uniform. uniforms [B, 4] -> (corner, size), each [B, 2], vertical and
    horizontal, in pixels, real numbers.
    """
    pixels = between(uniforms[:, 0], area[0] * side**2, area[1] * side**2)
    low, high = CROP_ASPECT
    aspect = between(uniforms[:, 1], math.log(low), math.log(high)).exp()

    # A wide or a tall box may be larger than the image. It keeps its area, so the width
    # has two bounds: the side, and the width at which the height is the side.
    width = (pixels * aspect).sqrt()
    width = width.clamp(max=side)
    width = width.maximum(pixels / side)
    height = pixels / width

    size = torch.stack([height, width], dim=1)
    corner = uniforms[:, 2:] * (side - size)
    return corner, size


def box_transforms(corner, size, side):
    """The maps from the pixels of a box to those of the image, for F.affine_grid.

    corner and size [..., 2], vertical and horizontal, in pixels -> [..., 2, 3]: the
    matrices [[scale_x, 0, centre_x], [0, scale_y, centre_y]]. Coordinates are −1 at the
    left and upper edge, of the box as of the image, and 1 at the others.
    """
    scale = size / side
    centre = (2 * corner + size) / side - 1
    # Boxes are (vertical, horizontal), but affine_grid wants (x, y).
    scale = scale.flip(-1)
    centre = centre.flip(-1)
    return torch.cat([torch.diag_embed(scale), centre[..., None]], dim=-1)


def flip_half(transforms, uniforms):
    """Mirror each box with probability 1/2: transforms [B, 2, 3], uniforms [B, 1]."""
    sign = torch.where(uniforms < 0.5, 1.0, -1.0)
    ones = torch.ones_like(sign)
    # Only the first column, by which the box's x is multiplied, changes its sign.
    return transforms * torch.stack([sign, ones, ones], dim=2)


def rotations(angle):
    """Angles [B] in radians -> rotation matrices [B, 2, 2]."""
    cos = angle.cos()
    sin = angle.sin()
    rows = [torch.stack([cos, -sin], dim=1), torch.stack([sin, cos], dim=1)]
    return torch.stack(rows, dim=1)


def sample(images, transforms, side):
    """Bilinear samples of images [B, 3, S, S] by transforms [B, 2, 3], side × side."""
    grid = F.affine_grid(transforms, (len(images), 3, side, side), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


# ---- Colour --------------------------------------------------------------------------
class Normalize(nn.Module):
    """RGB in 0 … 1 to mean 0 and standard deviation 1, channels-last."""

    def __init__(self, mean=PIXEL_MEAN, std=PIXEL_STD):
        super().__init__()
        # As buffers they are on the training device: a step need not send them there.
        mean = torch.tensor(mean)[:, None, None]
        std = torch.tensor(std)[:, None, None]
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, images):  # [B, 3, H, W] -> [B, 3, H, W]
        images = (images - self.mean).div_(self.std)
        return images.contiguous(memory_format=torch.channels_last)


class ColourJitter(nn.Module):
    """Colour jitter, grayscale and normalisation, with parameters per image."""

    def __init__(self, strength):
        """strength: how far the colours may go, 1 for the ranges above.

        With strength 0 all images keep their colours; none becomes gray.
        """
        super().__init__()
        self.strength = strength
        yiq = torch.tensor(YIQ)
        self.register_buffer("yiq_from_rgb", yiq, persistent=False)
        self.register_buffer("rgb_from_yiq", torch.linalg.inv(yiq), persistent=False)
        self.normalize = Normalize()

    def forward(self, images, uniforms):
        """images [N, 3, H, W] float32 in 0 … 255, uniforms [N, 6] -> [N, 3, H, W].

        The result is float32, normalised, channels-last.
        """
        brightness, contrast, saturation, hue = self.parameters_of(uniforms)
        # The factor also rescales 0 … 255 to 0 … 1, which saves a pass over the images.
        return self.recolour(images, brightness / 255, contrast, saturation, hue)

    def parameters_of(self, uniforms):
        """uniforms [N, 6] -> brightness, contrast, saturation and hue, each [N].

        The first three are factors (saturation 0 is gray), the hue is in radians. Four
        uniforms say how much of each; the last two, whether the image gets jitter and
        whether it becomes gray.
        """
        jittered = uniforms[:, 4] < JITTER_PROBABILITY
        change = between(uniforms[:, :4], -1, 1) * jittered[:, None] * self.strength
        brightness = 1 + COLOUR_RANGE * change[:, 0]
        contrast = 1 + COLOUR_RANGE * change[:, 1]
        saturation = 1 + COLOUR_RANGE * change[:, 2]
        hue = HUE_RANGE * 2 * math.pi * change[:, 3]

        if self.strength > 0:
            gray = uniforms[:, 5] < GRAY_PROBABILITY
            saturation = saturation.masked_fill(gray, 0)
        return brightness, contrast, saturation, hue

    def recolour(self, images, brightness, contrast, saturation, hue):
        """The steps of torchvision's ColorJitter in a fixed order, clipped at the end.

        images [N, 3, H, W], parameters [N]; normalised [N, 3, H, W].
        """
        images = images * brightness[:, None, None, None]

        # The gray of the mean colour is the mean of the grays.
        mean_gray = TF.rgb_to_grayscale(images.mean((2, 3), keepdim=True))
        images = torch.lerp(mean_gray, images, contrast[:, None, None, None])

        gray = TF.rgb_to_grayscale(images)
        images = torch.lerp(gray, images, saturation[:, None, None, None])

        images = self.rotate_hue(images, hue)
        return self.normalize(images.clamp(0, 1))

    def rotate_hue(self, images, angle):
        """Turn the colours in the plane of I and Q; luma and saturation stay."""
        turns = torch.zeros(len(angle), 3, 3, device=angle.device)
        turns[:, 0, 0] = 1
        turns[:, 1:, 1:] = rotations(angle)
        matrices = self.rgb_from_yiq @ turns @ self.yiq_from_rgb  # [N, 3, 3]
        return (matrices @ images.flatten(2)).view_as(images)


def normalize(images, mean, std):
    """uint8 [B, 3, S, S] -> float32: images as evaluation feeds them to the trunk.

    mean and std of the pixels, R, G and B in 0 … 1: as the trunk had them in training.
    """
    images = TF.normalize(images / 255, mean, std)
    return images.contiguous(memory_format=torch.channels_last)


def unnormalize(views):
    """Normalised float [N, 3, H, W] -> RGB in 0 … 1, for pictures."""
    mean = views.new_tensor(PIXEL_MEAN)[:, None, None]
    std = views.new_tensor(PIXEL_STD)[:, None, None]
    return views * std + mean
