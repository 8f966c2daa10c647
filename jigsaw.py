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
    sample,
)
from models import PatchHead

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

        # Where the patches lie in a crop that is resized to the image's size.
        offset_uniforms = offset_uniforms.unflatten(1, (CELLS, 2))
        _, places = patch_places(offset_uniforms, order_uniforms, side)  # [B, 9, 2]

        # A patch of the resized crop is a box of the crop, and so a box of the image.
        # The patches are sampled from there directly: one interpolation instead of two,
        # and no crop in memory.
        crop_corner, crop_size = crop_box(crop_uniforms, side, PRETEXT_CROP_AREA)
        scale = crop_size[:, None] / side  # pixels of the image per pixel of the crop
        corners = crop_corner[:, None] + places * scale  # [B, 9, 2]
        box_sizes = (patch * scale).expand_as(corners)
        transforms = box_transforms(corners, box_sizes, side)

        patches = sample_patches(images, transforms, patch)  # [B·9, 3, P, P]
        return self.colour_jitter(patches, colour_uniforms.reshape(-1, COLOUR_UNIFORMS))

    def crop_pictures(self, images, uniforms):
        """For pictures.py: the crops, with white lines between their cells.

        Arguments as of forward() -> [B, 3, S, S] in 0 … 1.
        """
        side = images.shape[-1]
        corner, size = crop_box(uniforms[:, :CROP_UNIFORMS], side, PRETEXT_CROP_AREA)
        crops = sample(images, box_transforms(corner, size, side), side) / 255

        cell, _ = patch_sizes(side)
        for line in range(cell, GRID * cell, cell):
            crops[:, :, line - 1 : line + 1, :] = 1
            crops[:, :, :, line - 1 : line + 1] = 1
        return crops

    def make_head(self, dimension, non_linear):
        """Head g: features [B, 9, d] -> [B, 128]."""
        return PatchHead(dimension, CELLS, non_linear)


def patch_sizes(side):
    """(side of a grid cell, side of a patch) in pixels: (32, 30) of 96 × 96.

    The paper's are (85, 64) of 255 × 255. In proportion, a patch would have 24 pixels,
    which is little to see; a gap of two pixels still hides how the edges continue.
    """
    return side // GRID, 30 * side // 96


def patch_places(offset_uniforms, order_uniforms, side):
    """Where the nine patches lie in the resized crop, in the order of presentation.

    offset_uniforms [B, 9, 2], order_uniforms [B, 9]. Returns the permutation [B, 9]
    int64, the cell that is shown at each place, uniform over the 9! orders (only tests
    need it), and the patches' corners [B, 9, 2], vertical and horizontal, in pixels.
    """
    cell, patch = patch_sizes(side)
    permutation = order_uniforms.argsort(1)
    rows = permutation // GRID
    columns = permutation % GRID
    cell_corners = cell * torch.stack([rows, columns], dim=2)
    offsets = (offset_uniforms * (cell - patch + 1)).floor()
    return permutation, cell_corners + offsets


def sample_patches(images, transforms, patch):
    """images [B, 3, S, S], transforms [B, 9, 2, 3] -> [B·9, 3, P, P]."""
    count = len(images) * CELLS
    size = (count, 3, patch, patch)
    grids = F.affine_grid(transforms.flatten(0, 1), size, align_corners=False)

    # grid_sample takes one grid per image. So the nine grids of an image are put on top
    # of one another as one tall grid of 9·P rows: no image is copied nine times.
    tall_grids = grids.view(len(images), CELLS * patch, patch, 2)
    tall = F.grid_sample(images, tall_grids, padding_mode="border", align_corners=False)

    # And the tall pictures are cut into patches again.
    patches = tall.unflatten(2, (CELLS, patch))  # [B, 3, 9, P, P]
    return patches.transpose(1, 2).flatten(0, 1)
