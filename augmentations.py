"""Crops, flips and colour: batched tensor operations with random numbers per image."""

import math

import torch
import torch.nn.functional as F
from torch import nn

PIXEL_MEAN = (0.4467, 0.4398, 0.4066)  # of STL-10's unlabelled images, RGB in [0, 1]
PIXEL_STD = (0.2603, 0.2566, 0.2713)
CROP_UNIFORMS, COLOUR_UNIFORMS = 4, 6
IMAGE_VIEW_UNIFORMS = CROP_UNIFORMS + 1 + COLOUR_UNIFORMS
LABELLED_VIEW_UNIFORMS = CROP_UNIFORMS + 3

CROP_AREA = (0.2, 1.0)  # of the image's area
CROP_ASPECT = (3 / 4, 4 / 3)  # width to height
COLOUR_RANGE = 0.4  # brightness, contrast and saturation are factors from 1 − x to 1 + x, at strength 1
COLOUR_STRENGTH = 0.5
HUE = 0.1  # of a full turn, either way, at strength 1
JITTER_SHARE = 0.8  # of the images; the others keep their colours
GRAY_SHARE = 0.2

YIQ = ((0.299, 0.587, 0.114), (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))  # luma and two axes of colour
CONSTANTS = {}  # of colour_constants(), by device


class ImageView(nn.Module):
    def __init__(self, min_area=CROP_AREA[0], colour_strength=COLOUR_STRENGTH):
        super().__init__()
        self.min_area = min_area
        self.colour_strength = colour_strength

    def forward(self, images, uniforms):
        crop, flip, colour = uniforms.split([CROP_UNIFORMS, 1, COLOUR_UNIFORMS], 1)
        y, x = whole_crop(crop, flip, images.shape[-1], (self.min_area, CROP_AREA[1]))
        return recolour(sample(images, y, x), *jitter(colour, self.colour_strength))


class LabelledView(nn.Module):
    def forward(self, images, uniforms):
        crop, flip, angle, light = uniforms.split([CROP_UNIFORMS, 1, 1, 1], 1)
        middle, angle = (images.shape[-1] - 1) / 2, ((2 * angle - 1) * math.radians(15))[..., None, None]
        y, x = (edge - middle for edge in whole_crop(crop, flip, images.shape[-1], CROP_AREA))
        y, x = y * angle.cos() + x * angle.sin(), x * angle.cos() - y * angle.sin()
        one = torch.ones_like(light[:, 0])
        return recolour(sample(images, y + middle, x + middle), 0.6 + 0.8 * light[:, 0], one, one, 0 * one)


def crop_box(uniforms, side, area):
    """A box of random area (a fraction of side²), aspect ratio (log-uniform) and place that fits inside the image.

    uniforms [B, 4] -> (corner, size), each [B, 2], vertical and horizontal, in pixels, real numbers.
    """
    pixels = uniforms[:, :1] * ((area[1] - area[0]) * side**2) + area[0] * side**2
    ratio = (uniforms[:, 1:2] * math.log(CROP_ASPECT[1] / CROP_ASPECT[0]) + math.log(CROP_ASPECT[0])).exp()
    width = (pixels * ratio).sqrt().clamp(max=side).maximum(pixels / side)  # else the height would not fit
    size = torch.cat([pixels / width, width], 1)
    return uniforms[:, 2:] * (side - size), size


def crop_coordinates(corner, size, pixels, side):
    """Where pixels of the crop, once resized to side × side, lie in the image it was cut from.

    corner and size [B, …, 2, 1]; pixels, whole numbers, broadcast against them, rows and columns in the dimension of 2;
    so does the result. What would lie outside the crop by up to half a pixel takes the crop's edge, as when the crop is
    cut out first.
    """
    inside = (pixels + 0.5) * (size / side) - 0.5
    return corner + inside.minimum(size - 1).clamp(min=0)


def whole_crop(uniforms, flip, side, area):
    """(y [B, 1, S, 1], x [B, 1, 1, S]): rows and columns of a random crop; for half of `flip` [B, 1] mirrored."""
    corner, size = (edge[..., None] for edge in crop_box(uniforms, side, area))
    y, x = crop_coordinates(corner, size, torch.arange(side, device=uniforms.device), side).unbind(1)
    return y[:, None, :, None], torch.where(flip < 0.5, x, x.flip(1))[:, None, None, :]


def sample(images, y, x):
    """Bilinear samples of images [B, 3, S, S] at (y, x), in pixels, broadcast to [B, R, H, W] -> [B·R, 3, H, W]."""
    side = images.shape[-1]
    grid = torch.stack(torch.broadcast_tensors(x, y), -1) * (2 / side) + (1 / side - 1)  # to grid_sample's −1 … 1
    sampled = F.grid_sample(images, grid.flatten(1, 2), padding_mode="border", align_corners=False)
    return sampled.unflatten(2, (grid.shape[1], -1)).transpose(1, 2).flatten(0, 1)


def jitter(uniforms, strength=COLOUR_STRENGTH):
    """uniforms [N, 6] -> brightness, contrast, saturation (0 is gray) and hue angle in radians, each [N].

    strength multiplies how far the first three may go from 1, and how far colours may turn. With strength 0 all images
    keep their colours, grayscale included.
    """
    kept, gray = uniforms[:, 4:5], uniforms[:, 5]
    change = (2 * uniforms[:, :4] - 1) * (kept < JITTER_SHARE)
    brightness, contrast, saturation = (change[:, :3] * (strength * COLOUR_RANGE) + 1).unbind(1)
    saturation = saturation * (gray >= (GRAY_SHARE if strength else 0))
    return brightness, contrast, saturation, change[:, 3] * (strength * HUE * 2 * math.pi)


def recolour(images, brightness, contrast, saturation, hue):
    """Colour jitter, grayscale and normalisation as one affine map of RGB per image.

    Scaling (brightness), blending with the mean gray (contrast) and each pixel's gray (saturation), as in torchvision,
    and turning the colour plane of YIQ (hue) are linear and commute: any order will do. Clipped once, at the end.

    images [N, 3, H, W] in 0 … 255, parameters [N] -> [N, 3, H, W] normalised, channels-last.
    """
    parts, luma, scale, low, high = colour_constants(images.device)
    scaled = brightness * contrast
    vivid = scaled * saturation
    matrix = torch.stack([scaled, vivid * hue.cos(), vivid * hue.sin()], 1) @ parts
    offset = torch.addcmul(low, ((brightness - scaled) * (images.mean((2, 3)) @ luma))[:, None, None], scale)
    coloured = torch.baddbmm(offset, matrix.view(-1, 3, 3), images.flatten(2)).clamp_(low, high)
    return coloured.view_as(images).contiguous(memory_format=torch.channels_last)


@torch.compiler.assume_constant_result  # which a functools.cache around it would hide from torch.compile
def colour_constants(device):
    """What recolour() multiplies by, to normalised from RGB in 0 … 255.

    parts [3, 9]: the matrices RGB → gray, → colour part, → that part turned by 90°; luma [3]: RGB → mean gray;
    scale, low, high [3, 1]: 1 / STD, and black and white once they are normalised.
    """
    if device in CONSTANTS:
        return CONSTANTS[device]
    yiq, mean, std = torch.tensor(YIQ), torch.tensor(PIXEL_MEAN)[:, None], torch.tensor(PIXEL_STD)[:, None]
    to_gray, turn = yiq[0].expand(3, 3), torch.tensor([[0.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    parts = torch.stack([to_gray, torch.eye(3) - to_gray, torch.linalg.inv(yiq) @ turn @ yiq]) / std / 255
    constants = (parts.flatten(1), yiq[0] / 255, 1 / std, -mean / std, (1 - mean) / std)
    return CONSTANTS.setdefault(device, [constant.to(device) for constant in constants])


def normalize(images):
    """uint8 [B, 3, S, S] -> float32, normalised, channels-last: an image as evaluation sees it."""
    *_, scale, low, _ = colour_constants(images.device)
    return (images / 255 * scale[..., None] + low[..., None]).contiguous(memory_format=torch.channels_last)


def unnormalize(views):
    """The inverse of normalised(): float [N, 3, H, W] -> RGB in 0 … 1."""
    *_, scale, low, _ = colour_constants(views.device)
    return (views - low[..., None]) / scale[..., None]
