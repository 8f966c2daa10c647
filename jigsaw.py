"""The pretext transform: a batch of images → nine shuffled patches of each (paper, section 3.2 and appendix A).

python jigsaw.py --data-dir stl10_data --out jigsaw.png    # a picture of what the network sees
"""

from pathlib import Path

import run_helpers as rh
import torch
from torch.nn.functional import interpolate
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

import dataset_helpers as dh
from pictures import save_picture

GRID = 3
CELLS = GRID * GRID
PRETEXT_CROP_AREA = (0.6, 1.0)  # of the image's area
JIGSAW_DRAWS = dh.CROP_DRAWS + CELLS * (2 + dh.COLOUR_DRAWS + 1)


def patch_sizes(side):
    """(side of a grid cell, side of a patch) in pixels: (32, 30) for images of 96 × 96."""
    cell = side // GRID
    return cell, min(cell, 30 * side // 96)


def patch_places(offset_draws, order_draws, side):
    """Where the nine patches lie in the resized crop, in the order in which they are presented.

    offset_draws [B, 9, 2], order_draws [B, 9] -> permutation [B, 9] int64 (the cell shown at each place, row by row,
    uniform over the 9! orders), pixels [B, 9, 2, P]: the whole rows and columns of each patch, within its cell.
    """
    cell, patch = patch_sizes(side)
    permutation = order_draws.argsort(1)
    cells = torch.stack([permutation // GRID, permutation % GRID], 2)
    corners = cells * cell + (offset_draws * (cell - patch + 1)).floor()
    return permutation, corners[..., None] + torch.arange(patch, device=offset_draws.device)


def jigsaw_view(images, draws, strength=dh.COLOUR_STRENGTH):
    """The pretext view I_t: crop of at least 60 %, 3 × 3 grid, a random patch of each cell, own colours each, shuffled.

    images [B, 3, S, S] float32 in 0 … 255, draws [B, 85] -> [B·9, 3, P, P] float32, normalised, channels-last, the
    nine patches of an image in a row. The crop is never made: patches are sampled straight from the image. strength:
    see dh.jitter().
    """
    side = images.shape[-1]
    crop, offsets, colours, order = draws.split([dh.CROP_DRAWS, CELLS * 2, CELLS * dh.COLOUR_DRAWS, CELLS], 1)
    _, pixels = patch_places(offsets.unflatten(1, (CELLS, 2)), order, side)
    corner, size = (edge[:, None, :, None] for edge in dh.crop_box(crop, side, PRETEXT_CROP_AREA))
    y, x = dh.crop_coordinates(corner, size, pixels, side).unbind(2)
    patches = dh.sample(images, y[..., :, None], x[..., None, :])
    return dh.recolour(patches, *dh.jitter(colours.reshape(-1, dh.COLOUR_DRAWS), strength))


# ---- The picture -----------------------------------------------------------------------------------------------------
def picture(images, draws):
    """A row per image: the image, its crop with the grid, the nine patches as presented. RGB in 0 … 1, [3, H, W]."""
    side = images.shape[-1]
    y, x = dh.whole_crop(draws[:, : dh.CROP_DRAWS], torch.zeros(len(draws), 1), side, PRETEXT_CROP_AREA)
    crops = dh.sample(images, y, x) / 255
    cell, patch = patch_sizes(side)
    for line in (cell, 2 * cell):
        crops[:, :, line - 1 : line + 1] = crops[:, :, :, line - 1 : line + 1] = 1
    patches = dh.pixels_of(jigsaw_view(images, draws)).view(-1, CELLS, 3, patch, patch)
    mosaics = torch.stack([make_grid(nine, GRID, padding=cell - patch + 1, pad_value=1) for nine in patches])
    cells = torch.stack([images / 255, crops, interpolate(mosaics, side, mode="nearest-exact")], 1).flatten(0, 1)
    return make_grid(interpolate(cells, scale_factor=2), 6 if len(images) > 1 else 3, padding=8, pad_value=1)


def main():
    parser = rh.Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data-dir", type=Path, default=Path("stl10_data"), help="the folder with the folder unlabelled")
    add("--out", type=Path, default=Path("jigsaw.png"), help="the picture to write")
    add("--images", type=rh.between(int, 1, 100), default=4, help="how many images to show")
    add("--seed", type=rh.between(int, 0, 2**32 - 1), default=0, help="the seed of the crops, colours and orders")
    args = parser.parse_args()
    files = dh.image_files(dh.unlabelled_folder(args.data_dir))[: args.images]
    images, _ = dh.load_images(files, dh.STL10_SIDE, torch.device("cpu"), "images")
    draws = dh.uniform_draws(len(images), JIGSAW_DRAWS, args.seed, rh.VIEWS, 1, device="cpu")
    save_picture(to_pil_image(picture(images.float(), draws).clamp(0, 1)), args.out)
    print(f"wrote {args.out}: each image, its crop with the grid, and the nine shuffled patches")


if __name__ == "__main__":
    rh.run_script(main)
