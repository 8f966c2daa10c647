"""The jigsaw pretext task: nine shuffled patches (paper, section 2.3, appendix A)."""

import torch
import torch.nn.functional as F
from torch import nn

from augmentations import (
    COLOUR_STRENGTH,
    COLOUR_UNIFORMS,
    CROP_UNIFORMS,
    ColourJitter,
    box_transforms,
    crop_box,
)
from models import VECTOR_SIZE, linear_head

GRID = 3
CELLS = GRID * GRID
PRETEXT_CROP_AREA = (0.6, 1.0)  # of the image's area


class Jigsaw(nn.Module):
    """The pretext view I_t: crop, 3 × 3 grid, a random patch of each cell, shuffled."""

    inputs_per_image = CELLS
    uniforms = CROP_UNIFORMS + CELLS * (2 + COLOUR_UNIFORMS + 1)

    def __init__(self, colour_strength=COLOUR_STRENGTH):
        super().__init__()
        self.colour_jitter = ColourJitter(colour_strength)

    def forward(self, images, uniforms):
        """images [B, 3, S, S] float32 in 0 … 255, uniforms [B, 85] -> [B·9, 3, P, P].

        The result is float32, normalised, channels-last: the nine patches of an image
        one after another, in the order of presentation, each with its own colours.
        """
        sizes = [CROP_UNIFORMS, CELLS * 2, CELLS * COLOUR_UNIFORMS, CELLS]
        split = uniforms.split(sizes, dim=1)
        crop_uniforms, offset_uniforms, colour_uniforms, order_uniforms = split
        side = images.shape[-1]
        _, patch = patch_sizes(side)

        # Where the patches lie in the crop, once that is resized to the image's size.
        offset_uniforms = offset_uniforms.unflatten(1, (CELLS, 2))
        _, places = patch_places(offset_uniforms, order_uniforms, side)  # [B, 9, 2]

        # Their boxes in the image itself: the crop is never made.
        crop_corner, crop_size = crop_box(crop_uniforms, side, PRETEXT_CROP_AREA)
        scale = crop_size[:, None] / side  # [B, 1, 2]
        corners = crop_corner[:, None] + places * scale  # [B, 9, 2]
        box_sizes = (patch * scale).expand_as(corners)
        transforms = box_transforms(corners, box_sizes, side)

        patches = sample_patches(images, transforms, patch)  # [B·9, 3, P, P]
        return self.colour_jitter(patches, colour_uniforms.reshape(-1, COLOUR_UNIFORMS))

    def make_head(self, dimension, non_linear):
        return JigsawHead(dimension, non_linear)


class JigsawHead(nn.Module):
    """Head g: each patch to 128 numbers, the nine in presentation order, to 128.

    (Paper, section 2.3.)
    """

    def __init__(self, dimension, non_linear):
        super().__init__()
        self.patch = nn.Linear(dimension, VECTOR_SIZE)
        self.together = linear_head(CELLS * VECTOR_SIZE, non_linear)

    def forward(self, features):  # [B, 9, d] -> [B, 128]
        vectors = self.patch(features)  # [B, 9, 128]
        return self.together(vectors.flatten(1))


def patch_sizes(side):
    """(side of a grid cell, side of a patch) in pixels: (32, 30) of 96 × 96.

    The paper's are (85, 64) of 255 × 255: scaled, a patch would have 24 pixels.
    """
    return side // GRID, 30 * side // 96


def patch_places(offset_uniforms, order_uniforms, side):
    """Where the nine patches lie in the resized crop, in the order of presentation.

    offset_uniforms [B, 9, 2], order_uniforms [B, 9]. Returns the permutation [B, 9]
    int64, which is the cell shown at each place, uniform over the 9! orders, and the
    patches' corners [B, 9, 2], vertical and horizontal, in whole pixels.
    """
    cell, patch = patch_sizes(side)
    permutation = order_uniforms.argsort(1)
    rows = permutation // GRID
    columns = permutation % GRID
    cell_corners = cell * torch.stack([rows, columns], dim=2)
    offsets = (offset_uniforms * (cell - patch + 1)).floor()
    return permutation, cell_corners + offsets


def sample_patches(images, transforms, patch):
    """images [B, 3, S, S], transforms [B, 9, 2, 3] -> [B·9, 3, P, P].

    The nine patches of an image are sampled as one tall picture of them, so that no
    image is copied nine times.
    """
    count = len(images) * CELLS
    size = (count, 3, patch, patch)
    grids = F.affine_grid(transforms.flatten(0, 1), size, align_corners=False)
    grids = grids.view(len(images), CELLS * patch, patch, 2)
    stacked = F.grid_sample(images, grids, padding_mode="border", align_corners=False)
    patches = stacked.unflatten(2, (CELLS, patch))  # [B, 3, 9, P, P]
    return patches.transpose(1, 2).flatten(0, 1)
