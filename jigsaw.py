"""The pretext transform: a batch of images → nine shuffled patches of each (paper, section 3.2 and appendix A)."""

import torch

from dataset_helpers import COLOUR_DRAWS, CROP_DRAWS, crop_box, crop_coordinates, jitter, recolour, sample

GRID = 3
CELLS = GRID * GRID
CROP_AREA = (0.6, 1.0)  # of the image's area
CROP_ASPECT = (3 / 4, 4 / 3)
JIGSAW_DRAWS = CROP_DRAWS + CELLS * (2 + COLOUR_DRAWS + 1)


def patch_sizes(side):
    """(side of a grid cell, side of a patch) in pixels: (32, 30) for images of 96 × 96."""
    cell = side // GRID
    return cell, min(cell, 30 * side // 96)


def patch_places(offset_draws, order_draws, side):
    """Where the nine patches lie in the resized crop, in the order in which they are presented.

    offset_draws [B, 9, 2], order_draws [B, 9] -> permutation [B, 9] int64 (the cell shown at each place, row by row,
    uniform over the 9! orders), rows and columns [B, 9, P] int64: whole pixels within their cell.
    """
    cell, patch = patch_sizes(side)
    permutation = order_draws.argsort(1)
    offset = (offset_draws * (cell - patch + 1)).long()
    pixels = torch.arange(patch, device=offset_draws.device)
    rows = (permutation // GRID * cell + offset[..., 0])[..., None] + pixels
    columns = (permutation % GRID * cell + offset[..., 1])[..., None] + pixels
    return permutation, rows, columns


def jigsaw_view(images, draws):
    """The pretext view I_t: crop of at least 60 %, 3 × 3 grid, a random patch of each cell, own colours each, shuffled.

    images [B, 3, S, S] float32 in 0 … 255, draws [B, 85] -> [B·9, 3, P, P] float32, normalised, channels-last, the
    nine patches of an image in a row. The crop is never made: patches are sampled straight from the image.
    """
    side = images.shape[-1]
    crop, offsets, colours, order = draws.split([CROP_DRAWS, CELLS * 2, CELLS * COLOUR_DRAWS, CELLS], 1)
    _, rows, columns = patch_places(offsets.unflatten(1, (CELLS, 2)), order, side)
    box = [edge[..., None] for edge in crop_box(crop, side, CROP_AREA, CROP_ASPECT)]
    y, x = crop_coordinates(box, rows, columns, side)
    patches = sample(images, y[..., :, None], x[..., None, :])
    return recolour(patches, *jitter(colours.reshape(-1, COLOUR_DRAWS)))
