"""The jigsaw pretext task: nine shuffled patches (paper, section 3.2 and appendix A)."""

import torch
from torch import nn

import augmentations as dh
import models

GRID = 3
CELLS = GRID * GRID
PRETEXT_CROP_AREA = (0.6, 1.0)  # of the image's area
JIGSAW_UNIFORMS = dh.CROP_UNIFORMS + CELLS * (2 + dh.COLOUR_UNIFORMS + 1)


def patch_sizes(side):
    """(side of a grid cell, side of a patch) in pixels: (32, 30) for images of 96 × 96."""
    cell = side // GRID
    return cell, min(cell, 30 * side // 96)


def patch_places(offset_uniforms, order_uniforms, side):
    """Where the nine patches lie in the resized crop, in the order in which they are presented.

    offset_uniforms [B, 9, 2], order_uniforms [B, 9] -> permutation [B, 9] int64 (the cell shown at each place, row by row,
    uniform over the 9! orders), pixels [B, 9, 2, P]: the whole rows and columns of each patch, within its cell.
    """
    cell, patch = patch_sizes(side)
    permutation = order_uniforms.argsort(1)
    cells = torch.stack([permutation // GRID, permutation % GRID], 2)
    corners = cells * cell + (offset_uniforms * (cell - patch + 1)).floor()
    return permutation, corners[..., None] + torch.arange(patch, device=offset_uniforms.device)


def jigsaw_view(images, uniforms, strength=dh.COLOUR_STRENGTH):
    """The pretext view I_t: crop of at least 60 %, 3 × 3 grid, a random patch of each cell, own colours each, shuffled.

    images [B, 3, S, S] float32 in 0 … 255, uniforms [B, 85] -> [B·9, 3, P, P] float32, normalised, channels-last, the
    nine patches of an image in a row. The crop is never made: patches are sampled straight from the image. strength:
    see dh.jitter().
    """
    side = images.shape[-1]
    crop, offsets, colours, order = uniforms.split([dh.CROP_UNIFORMS, CELLS * 2, CELLS * dh.COLOUR_UNIFORMS, CELLS], 1)
    _, pixels = patch_places(offsets.unflatten(1, (CELLS, 2)), order, side)
    corner, size = (edge[:, None, :, None] for edge in dh.crop_box(crop, side, PRETEXT_CROP_AREA))
    y, x = dh.crop_coordinates(corner, size, pixels, side).unbind(2)
    patches = dh.sample(images, y[..., :, None], x[..., None, :])
    return dh.recolour(patches, *dh.jitter(colours.reshape(-1, dh.COLOUR_UNIFORMS), strength))



class Jigsaw(nn.Module):
    inputs_per_image = CELLS
    uniforms = JIGSAW_UNIFORMS

    def __init__(self, colour_strength=dh.COLOUR_STRENGTH):
        super().__init__()
        self.colour_strength = colour_strength

    def forward(self, images, uniforms):
        return jigsaw_view(images, uniforms, self.colour_strength)

    def make_head(self, dimension, non_linear):
        return JigsawHead(dimension, non_linear)


class JigsawHead(nn.Module):
    """Head g: each patch to 128 numbers, the nine side by side, to 128."""

    def __init__(self, dimension, non_linear):
        super().__init__()
        self.patch = nn.Linear(dimension, models.VECTOR_SIZE)
        self.together = models.linear_head(CELLS * models.VECTOR_SIZE, non_linear)

    def forward(self, features):  # [B, 9, d] -> [B, 128]
        return self.together(self.patch(features).flatten(1))
