"""A small data set that needs no download: ten synthetic classes, each a pattern.

    python -m benchmarks.synthetic --raw-dir raw_synthetic
    python stl10_data_load.py --raw-dir raw_synthetic --data-dir synthetic_data

Raw files in STL-10's layout. Colour, place, size and angle say nothing of the class.
"""

import math
from pathlib import Path

import numpy as np

from dataset_helpers import STL10_SIDE
from runtime.arguments import Parser, bounded, file_path
from runtime.bars import progress_bar
from runtime.files import atomic_write
from runtime.script import run_script
from stl10_data_load import SPLITS

COUNTS = {"train": 1500, "test": 1000, "unlabelled": 800}


# ---- The patterns: coordinates x, y [96, 96] to intensities from 0 to 1 --------------
# Most of the pattern is within −1 … 1; x and y are already rotated, scaled and shifted.
def soft_step(values):
    """0 where values are well below 0, 1 where they are well above, smooth between."""
    exponents = np.clip(8 * values, -30, 30)
    return 1 / (1 + np.exp(-exponents))


def wave(values):
    return soft_step(np.sin(9 * values))


def stripes(x, y):
    return wave(x)


def checks(x, y):
    return soft_step(np.sin(9 * x) * np.sin(9 * y))


def dots(x, y):
    return soft_step(np.cos(9 * x) + np.cos(9 * y) - 0.8)


def rings(x, y):
    return wave(np.hypot(x, y))


def rays(x, y):
    return soft_step(np.sin(8 * np.arctan2(y, x)))


def disc(x, y):
    return soft_step(3 * (0.6 - np.hypot(x, y)))


def square(x, y):
    return soft_step(3 * (0.55 - np.maximum(abs(x), abs(y))))


def triangle(x, y):
    slanted_edges = abs(x) * 0.866 + y * 0.5
    return soft_step(3 * (0.35 - np.maximum(slanted_edges, -y)))


def cross(x, y):
    upright_bar = np.maximum(abs(x), abs(y) / 4)
    level_bar = np.maximum(abs(y), abs(x) / 4)
    return soft_step(4 * (0.2 - np.minimum(upright_bar, level_bar)))


def zigzag(x, y):
    return wave(x + 0.35 * abs((2 * y) % 2 - 1))


PATTERNS = [stripes, checks, dots, rings, rays, disc, square, triangle, cross, zigzag]


# ---- Images and files ----------------------------------------------------------------
def synthetic_image(label, rng):
    """uint8 [96, 96, 3]: a class's pattern in two random colours, unevenly lit.

    Its place, size and angle are random. label: 0 to 9.
    """
    # The order of the draws is part of the data set: a seed stands for certain bytes.
    angle = rng.uniform(0, 2 * math.pi)
    size = rng.uniform(0.6, 1.4)
    shift_y, shift_x = rng.uniform(-0.35, 0.35, 2)

    y, x = np.mgrid[-1 : 1 : STL10_SIDE * 1j, -1 : 1 : STL10_SIDE * 1j]  # [96, 96] each
    cos = math.cos(angle)
    sin = math.sin(angle)
    pattern_x = ((x - shift_x) * cos + (y - shift_y) * sin) / size
    pattern_y = ((y - shift_y) * cos - (x - shift_x) * sin) / size
    intensity = PATTERNS[label](pattern_x, pattern_y)[..., None]  # [96, 96, 1]

    # Faint colours, or they would be the easiest way to tell one image from the others.
    dark = rng.uniform(0.1, 0.35)
    bright = rng.uniform(0.65, 0.9)
    first_level, second_level = rng.permutation([dark, bright])
    first_colour = first_level + rng.uniform(-0.1, 0.1, 3)
    second_colour = second_level + rng.uniform(-0.1, 0.1, 3)
    image = first_colour * intensity + second_colour * (1 - intensity)  # [96, 96, 3]

    light = 1 + 0.4 * (x * math.cos(angle * 3) + y * math.sin(angle * 3))[..., None]
    noise = rng.normal(0, 0.05, image.shape)
    return (255 * np.clip(image * light + noise, 0, 1)).astype(np.uint8)


def write_synthetic(raw, counts, seed):
    """Write raw files of counts[split] images per split into the new folder `raw`."""
    raw.mkdir(parents=True)
    for stream, (split, (images_name, labels_name)) in enumerate(SPLITS.items()):
        count = counts[split]
        rng = np.random.default_rng((seed, stream))
        labels = rng.permutation(np.arange(count) % 10)

        bar = progress_bar(count, f"making {split}", " images")
        with bar, atomic_write(raw / images_name) as file:
            for label in labels:
                image = synthetic_image(label, rng)
                # STL-10 stores an image channel by channel, and each column by column.
                file.write(image.transpose(2, 1, 0).tobytes())
                bar.update()

        if labels_name:
            (labels + 1).astype(np.uint8).tofile(raw / labels_name)

    names = [pattern.__name__ for pattern in PATTERNS]
    (raw / "class_names.txt").write_text("\n".join(names) + "\n")


def parse_args(argv=None):
    parser = Parser("A small data set that needs no download, as raw files.")
    parser.add_argument(
        "--raw-dir",
        type=file_path,
        default=Path("raw_synthetic"),
        help="the folder to write, a new one",
    )
    parser.add_argument(
        "--seed",
        type=bounded(int, 0, 2**32 - 1),
        default=0,
        help="the seed of the images",
    )
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    write_synthetic(args.raw_dir / "stl10_binary", COUNTS, args.seed)
    print(f"wrote {args.raw_dir}")


if __name__ == "__main__":
    run_script(main)
