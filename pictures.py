"""Every picture that the project draws, and the confusion matrix as a table.

python pictures.py --data-dir stl10_data --pretext jigsaw --out jigsaw.png --images 4

draws what the network sees of some images in pretraining.
"""

import csv
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import interpolate, pad
from torchvision.transforms.functional import InterpolationMode, resize, to_pil_image
from torchvision.utils import make_grid

from augmentations import COLOUR_STRENGTH, unnormalize
from dataset_helpers import list_images, load_images, unlabelled_folder
from pretexts import PRETEXTS
from runtime.arguments import Parser, bounded, file_path, output_file
from runtime.files import atomic_write
from runtime.randomness import VIEWS, make_generator
from runtime.script import run_script

GREEN = (44, 160, 44)
RED = (214, 39, 40)
BLUE = (31, 119, 180)
GRAY = (160, 160, 160)

TILE = 64  # side of a small photograph, in pixels
FRAME = 4  # width of the frame around it, and of the gap to the next one

FEW_CLASSES = 20  # of more, the confusion picture shows the shades alone
LEFT = 130  # pixels for the names of its rows
TOP = 60  # and for its title and the names of its columns
MARGIN = 12


def parse_args(argv=None):
    parser = Parser(
        "Draw what the network sees of some images in pretraining.",
        example="python pictures.py --data-dir stl10_data --out jigsaw.png",
    )
    add = parser.add_argument
    # fmt: off
    add("--data-dir", type=file_path, default=Path("stl10_data"), metavar="PATH",
        help="folder with the images, in unlabelled/")
    add("--pretext", choices=[*PRETEXTS], default="jigsaw",
        help="pretext task")
    add("--image-size", type=bounded(int, 36, 224), default=96, metavar="N",
        help="side in pixels to which images are resized and cropped, 36 to 224")
    add("--colour-strength", type=bounded(float, 0, 2), default=COLOUR_STRENGTH,
        metavar="X", help="strength of the colour jitter, 0 (none) to 2")
    add("--out", type=output_file, metavar="PATH",
        help="PNG picture to write; by default <pretext>.png")
    add("--images", type=bounded(int, 1, 100), default=4, metavar="N",
        help="how many images to show, 1 to 100")
    add("--seed", type=bounded(int, 0, 2**32 - 1), default=0, metavar="N",
        help="seed of the crops, colours, turns and orders")
    # fmt: on
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    path = args.out or Path(f"{args.pretext}.png")
    cpu = torch.device("cpu")

    # The first images of the folder. The random numbers are not those of any run.
    files = list_images(unlabelled_folder(args.data_dir))[: args.images]
    images, _ = load_images(files, args.image_size, cpu, "images")

    pretext = PRETEXTS[args.pretext](args.colour_strength)
    generator = make_generator(cpu, args.seed, VIEWS, 1)
    uniforms = torch.rand(len(images), pretext.uniforms, generator=generator)
    picture = pretext_picture(images.float(), pretext, uniforms)

    save_picture(picture, path)
    print(f"wrote {path}: each image, and what the network sees of it")


def save_picture(image, path):
    """A Pillow image as a PNG of 256 colours: a small file."""
    # Dithering would make noise of plain areas, and a larger file.
    image = image.quantize(256, dither=Image.Dither.NONE)
    with atomic_write(path) as file:
        image.save(file, "PNG", optimize=True)


# ---- What the network sees in pretraining --------------------------------------------
def pretext_picture(images, pretext, uniforms):
    """Every image beside what the network sees of it, two images in a row.

    A task that has crop_pictures() gets a column between: the jigsaws show the crop
    with its grid there. An image's inputs, if they are several, are one picture.

    images: float32 [B, 3, S, S] in 0 … 255. pretext: a module that turns them and
    uniforms [B, pretext.uniforms] into inputs [B · pretext.inputs_per_image, 3, P, P].
    Returns a Pillow image.
    """
    side = images.shape[-1]
    columns = [images / 255]
    if hasattr(pretext, "crop_pictures"):
        columns.append(pretext.crop_pictures(images, uniforms))

    inputs = unnormalize(pretext(images, uniforms)).clamp(0, 1)
    if pretext.inputs_per_image > 1:
        # At 96 pixels, the gap is as wide as between the jigsaw's patches in the image.
        inputs = mosaics(inputs, pretext.inputs_per_image, gap=side // 32)
    columns.append(inputs)

    # All are shown at twice the size of the images, with pixels that can be seen.
    enlarged = [interpolate(c, 2 * side, mode="nearest-exact") for c in columns]
    cells = torch.stack(enlarged, 1)  # [B, columns, 3, 2·S, 2·S]
    images_per_row = min(2, len(images))
    cells_per_row = images_per_row * len(columns)
    sheet = make_grid(cells.flatten(0, 1), cells_per_row, padding=8, pad_value=1)
    return to_pil_image(sheet)


def mosaics(inputs, count, gap):
    """The `count` inputs of each image, row by row, as a square picture.

    inputs [B·count, 3, P, P] in 0 … 1 -> [B, 3, H, H].
    """
    columns = math.ceil(math.sqrt(count))
    inputs = inputs.unflatten(0, (-1, count))  # [B, count, 3, P, P]
    # Fill it up with white ones: a picture that is not square would be stretched later.
    missing = columns**2 - count
    inputs = pad(inputs, (0, 0, 0, 0, 0, 0, 0, missing), value=1)  # of dimension 1
    pictures = [
        make_grid(inputs_of_image, columns, padding=gap, pad_value=1)
        for inputs_of_image in inputs
    ]
    return torch.stack(pictures)


# ---- Nearest neighbours --------------------------------------------------------------
def neighbour_picture(queries, found, query_texts, found_texts, same_class=None):
    """A row per query: the image, then its nearest images, each with a text on it.

    queries uint8 [Q, 3, S, S], found uint8 [Q, k, 3, S, S]; query_texts: Q texts,
    found_texts: Q lists of k. same_class bool [Q, k]: a found image has a green frame
    if it is of the query's class, else a red one; None: gray ones. Returns a Pillow
    image.
    """
    images = torch.cat([queries[:, None], found], 1).cpu()  # [Q, 1 + k, 3, S, S]
    rows, columns = images.shape[:2]

    # A cell is the photograph, the frame around it, and a gap on the right and below.
    framed = TILE + 2 * FRAME
    side = framed + FRAME
    cells = torch.full((rows, columns, 3, side, side), 255, dtype=torch.uint8)
    colours = torch.tensor(GRAY, dtype=torch.uint8).expand(rows, columns - 1, 3)
    if same_class is not None:
        colours = torch.where(
            same_class.cpu()[..., None],
            torch.tensor(GREEN, dtype=torch.uint8),
            torch.tensor(RED, dtype=torch.uint8),
        )  # [Q, k, 3]
    cells[:, 1:, :, :framed, :framed] = colours[..., None, None]
    inside = slice(FRAME, FRAME + TILE)
    tiles = resize(images.flatten(0, 1), [TILE, TILE], InterpolationMode.BICUBIC)
    cells[..., inside, inside] = tiles.unflatten(0, (rows, columns))
    picture = to_pil_image(make_grid(cells.flatten(0, 1), columns, padding=0))

    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(10)
    for row in range(rows):
        for column, text in enumerate([query_texts[row], *found_texts[row]]):
            x = column * side + FRAME + 3
            y = row * side + TILE
            # White with a black outline can be read on any photograph.
            draw.text(
                (x, y),
                shorten(text, font, TILE - 6),
                "white",
                font=font,
                anchor="ls",
                stroke_width=1,
                stroke_fill="black",
            )
    return picture


# ---- The confusion matrix ------------------------------------------------------------
def confusion_matrix(labels, predictions, count):
    """How many images of each class (row) were predicted as each class (column).

    labels and predictions int64 [N] -> int64 [count, count], on the CPU.
    """
    pairs = labels * count + predictions
    return torch.bincount(pairs.cpu(), minlength=count**2).view(count, count)


def write_confusion_csv(path, labels, predictions, names):
    """The confusion matrix as a table of counts; the first column is the true class.

    `pandas.read_csv(path, index_col=0)` reads it.
    """
    matrix = confusion_matrix(labels, predictions, len(names))
    with atomic_write(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["true class", *names])
        for name, counts in zip(names, matrix.tolist(), strict=True):
            writer.writerow([name, *counts])


def confusion_picture(labels, predictions, names):
    """Per cent of each class (row) by predicted class (column), as a Pillow image.

    labels and predictions: int64 [N].
    """
    count = len(names)
    matrix = confusion_matrix(labels, predictions, count)
    # A class without images has an empty row; the clamp keeps it from being 0 / 0.
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)  # [C, C]
    few = count <= FEW_CLASSES
    cell = 46 if few else max(4, 920 // count)

    # Drawn with a pixel per cell, which is then enlarged: blue for what is right, red
    # for what is not, and the smaller the share, the more white.
    colours = torch.tensor(RED).repeat(count, count, 1)
    diagonal = torch.arange(count)
    colours[diagonal, diagonal] = torch.tensor(BLUE)
    shades = 255 - shares[..., None] * (255 - colours)  # [C, C, 3]
    small = Image.fromarray(shades.round().to(torch.uint8).numpy())
    enlarged = small.resize((count * cell, count * cell), Image.Resampling.NEAREST)

    width = LEFT + max(count * cell, 300) + MARGIN  # room for the title
    height = TOP + count * cell + MARGIN
    picture = Image.new("RGB", (width, height), "white")
    picture.paste(enlarged, (LEFT, TOP))

    draw = ImageDraw.Draw(picture)
    title = "true class (rows), predicted class (columns), per cent of the row"
    draw.text((8, 8), title, "black", font_size=13)
    shown_names = drawable_names(names)
    font = ImageFont.load_default(min(13, cell))
    for row, name in enumerate(shown_names):
        y = TOP + (row + 0.5) * cell
        text = shorten(name, font, LEFT - 16)
        draw.text((LEFT - 8, y), text, "black", font=font, anchor="rm")

    if few:
        label_columns_and_cells(draw, shares.tolist(), shown_names, cell)
    return picture


def label_columns_and_cells(draw, shares, names, cell):
    """The predicted classes above the columns, and the per cent in each cell."""
    name_font = ImageFont.load_default(10)
    number_font = ImageFont.load_default(13)
    for column, name in enumerate(names):
        x = LEFT + (column + 0.5) * cell
        text = shorten(name, name_font, cell - 2)
        draw.text((x, TOP - 6), text, "black", font=name_font, anchor="ms")

        for row, shares_of_row in enumerate(shares):
            y = TOP + (row + 0.5) * cell
            share = shares_of_row[column]
            ink = "white" if share > 0.5 else "black"
            number = f"{100 * share:.0f}"
            draw.text((x, y), number, ink, font=number_font, anchor="mm")


# ---- Names ---------------------------------------------------------------------------
def drawable_names(names):
    """The names, and in place of those that cannot be drawn the class's number, from 1.

    Pillow's own font has few letters beyond those of English; for all others it draws
    the same empty box.
    """
    font = ImageFont.load_default(13)
    box = bytes(font.getmask("\uffff"))  # which no font has a letter for

    def can_draw(name):
        return name != "" and all(bytes(font.getmask(c)) != box for c in name)

    return [
        name if can_draw(name) else f"#{number}"
        for number, name in enumerate(names, start=1)
    ]


def shorten(name, font, width):
    """The name, or as much of its beginning as fits into `width` pixels, and "…"."""
    if font.getlength(name) <= width:
        return name
    while name and font.getlength(name + "…") > width:
        name = name[:-1]
    return name + "…"


if __name__ == "__main__":
    run_script(main)
