"""The rotation pretext task, and rotation with jigsaw (paper, section 4.3)."""

import torch
from torch import nn

from augmentations import (
    COLOUR_STRENGTH,
    COLOUR_UNIFORMS,
    CROP_AREA,
    CROP_UNIFORMS,
    ColourJitter,
    box_transforms,
    crop_box,
    sample,
)
from jigsaw import Jigsaw
from models import linear_head


class Rotation(nn.Module):
    """The pretext view I_t: a random resized crop, own colours, a quarter turn.

    The turn is by 0°, 90°, 180° or 270°.
    """

    inputs_per_image = 1
    uniforms = CROP_UNIFORMS + COLOUR_UNIFORMS + 1

    def __init__(self, colour_strength=COLOUR_STRENGTH):
        super().__init__()
        self.colour_jitter = ColourJitter(colour_strength)

    def forward(self, images, uniforms):
        """images [B, 3, S, S] float32 in 0 … 255, uniforms [B, 11] -> [B, 3, S, S].

        The result is float32, normalised, channels-last.
        """
        sizes = [CROP_UNIFORMS, COLOUR_UNIFORMS, 1]
        crop_uniforms, colour_uniforms, turn_uniforms = uniforms.split(sizes, dim=1)
        side = images.shape[-1]

        corner, size = crop_box(crop_uniforms, side, CROP_AREA)
        view = sample(images, box_transforms(corner, size, side), side)
        view = self.colour_jitter(view, colour_uniforms)
        view = quarter_turns(view, turn_uniforms[:, 0])
        return view.contiguous(memory_format=torch.channels_last)

    def make_head(self, dimension, non_linear):
        """Head g, on the features [B, 1, d] of one input per image -> [B, 128]."""
        return nn.Sequential(nn.Flatten(), *linear_head(dimension, non_linear))


class JigsawRotation(Jigsaw):
    """Both: the image is turned by 0°, 90°, 180° or 270°, then cut into patches."""

    uniforms = 1 + Jigsaw.uniforms

    def forward(self, images, uniforms):
        """images [B, 3, S, S] float32 in 0 … 255, uniforms [B, 86]; as Jigsaw."""
        turned = quarter_turns(images, uniforms[:, 0])
        return super().forward(turned, uniforms[:, 1:])

    def crop_pictures(self, images, uniforms):
        turned = quarter_turns(images, uniforms[:, 0])
        return super().crop_pictures(turned, uniforms[:, 1:])


def quarter_turns(images, uniforms):
    """Turn each image by 0°, 90°, 180° or 270°: images [B, 3, S, S], uniforms [B]."""
    turns = (4 * uniforms).floor()[:, None, None, None]
    turned = images
    for quarter in (1, 2, 3):
        rotated = images.rot90(quarter, dims=(2, 3))
        turned = torch.where(turns == quarter, rotated, turned)
    return turned
