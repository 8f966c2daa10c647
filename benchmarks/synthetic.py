"""A small data set that needs no download: ten made-up classes of pattern, as raw files in STL-10's layout.

    python -m benchmarks.synthetic --raw-dir raw_synthetic        # then stl10_data_load.py with the same --raw-dir

Colour, place, size and angle say nothing of the class.
"""

import math
from pathlib import Path

import run_helpers as rh
import numpy as np

from stl10_data_load import SPLITS, STL10_SIDE

COUNTS = {"train": 1500, "test": 1000, "unlabelled": 2000}
PATTERNS = {  # name: intensity about 0 … 1 from coordinates x, y in −1 … 1, already turned, scaled and shifted
    "stripes": lambda x, y: wave(x),
    "checks": lambda x, y: sharp(np.sin(9 * x) * np.sin(9 * y)),
    "dots": lambda x, y: sharp(np.cos(9 * x) + np.cos(9 * y) - 0.8),
    "rings": lambda x, y: wave(np.hypot(x, y)),
    "rays": lambda x, y: sharp(np.sin(8 * np.arctan2(y, x))),
    "disc": lambda x, y: sharp(3 * (0.6 - np.hypot(x, y))),
    "square": lambda x, y: sharp(3 * (0.55 - np.maximum(abs(x), abs(y)))),
    "triangle": lambda x, y: sharp(3 * (0.35 - np.maximum(abs(x) * 0.866 + y * 0.5, -y))),
    "cross": lambda x, y: sharp(4 * (0.2 - np.minimum(np.maximum(abs(x), abs(y) / 4), np.maximum(abs(y), abs(x) / 4)))),
    "zigzag": lambda x, y: wave(x + 0.35 * abs((2 * y) % 2 - 1)),
}


def sharp(value):
    """A soft step from 0 to 1."""
    return 1 / (1 + np.exp(-np.clip(8 * value, -30, 30)))


def wave(value):
    return sharp(np.sin(9 * value))


def synthetic_image(label, rng):
    """uint8 [96, 96, 3]: a class's pattern in two random colours, at a random place, size and angle, unevenly lit."""
    y, x = np.mgrid[-1 : 1 : STL10_SIDE * 1j, -1 : 1 : STL10_SIDE * 1j]
    angle, size, (dy, dx) = rng.uniform(0, 2 * math.pi), rng.uniform(0.6, 1.4), rng.uniform(-0.35, 0.35, 2)
    u = ((x - dx) * math.cos(angle) + (y - dy) * math.sin(angle)) / size
    v = ((y - dy) * math.cos(angle) - (x - dx) * math.sin(angle)) / size
    intensity = list(PATTERNS.values())[label](u, v)[..., None]
    # Faint colours, or they would be the easiest way to tell one image from the others.
    first, second = rng.permutation([rng.uniform(0.1, 0.35), rng.uniform(0.65, 0.9)])
    first, second = (level + rng.uniform(-0.1, 0.1, 3) for level in (first, second))
    image = first * intensity + second * (1 - intensity)
    light = 1 + 0.4 * (x * math.cos(angle * 3) + y * math.sin(angle * 3))[..., None]
    return (255 * np.clip(image * light + rng.normal(0, 0.05, image.shape), 0, 1)).astype(np.uint8)


def write_synthetic(raw, counts, seed):
    """Raw files of `counts` images per split in the folder `raw`."""
    raw.mkdir(parents=True)
    for stream, (split, (images_name, labels_name)) in enumerate(SPLITS.items()):
        count, rng = counts[split], np.random.default_rng((seed, stream))
        labels = rng.permutation(np.arange(count) % 10)
        with rh.whole_file(raw / images_name) as file, rh.progress_bar(count, f"making {split}", " images") as bar:
            for label in labels:
                file.write(synthetic_image(label, rng).transpose(2, 1, 0).tobytes())
                bar.update()
        if labels_name:
            (labels + 1).astype(np.uint8).tofile(raw / labels_name)
    (raw / "class_names.txt").write_text("\n".join(PATTERNS) + "\n")


def main():
    parser = rh.Parser(__doc__.split("\n")[0])
    parser.add_argument("--raw-dir", type=Path, default=Path("raw_synthetic"), help="the folder to write, a new one")
    parser.add_argument("--seed", type=rh.between(int, 0, 2**32 - 1), default=0, help="the seed of the images")
    args = parser.parse_args()
    write_synthetic(args.raw_dir / "stl10_binary", COUNTS, args.seed)
    print(f"wrote {args.raw_dir}")


if __name__ == "__main__":
    rh.run_script(main)
