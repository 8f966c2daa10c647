"""Pictures of results: nearest neighbours and the confusion matrix. Both are small PNG files."""

import run_helpers as rh
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image

TILE, FRAME = 64, 4  # pixels of a small photograph and of the frame around it
RIGHT, WRONG = (44, 160, 44), (214, 39, 40)


def save_picture(image, path):
    """A Pillow image as a PNG of 256 colours: a small file."""
    with rh.whole_file(path) as file:
        image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)


def neighbour_picture(queries, query_labels, found, found_labels, names):
    """A row per query: the image, then its nearest images, green if of its class and red if not; the class on each.

    queries uint8 [Q, 3, S, S], query_labels [Q], found uint8 [Q, k, 3, S, S], found_labels [Q, k]. A Pillow image.
    """
    images = torch.cat([queries[:, None], found], 1).cpu()
    labels, cell = torch.cat([query_labels[:, None], found_labels], 1).tolist(), TILE + 3 * FRAME
    picture = Image.new("RGB", (images.shape[1] * cell, len(images) * cell), "white")
    draw, style = ImageDraw.Draw(picture), {"stroke_width": 1, "stroke_fill": "black", "font_size": 10, "anchor": "ls"}
    for row, of_row in enumerate(labels):
        for column, label in enumerate(of_row):
            x, y, colour = column * cell, row * cell, RIGHT if label == of_row[0] else WRONG
            draw.rectangle((x, y, x + TILE + 2 * FRAME - 1, y + TILE + 2 * FRAME - 1), colour if column else "white")
            picture.paste(to_pil_image(images[row, column]).resize((TILE, TILE)), (x + FRAME, y + FRAME))
            draw.text((x + FRAME + 3, y + TILE), names[label][:12], "white", **style)
    return picture


def confusion_picture(labels, predictions, names):
    """Per cent of each class (row) by predicted class (column), of labels and predictions int64 [N]. A Pillow image."""
    count, left, top = len(names), 130, 60
    few = count <= 20  # of many classes the shades alone are shown
    cell = 46 if few else max(4, 920 // count)
    matrix = torch.bincount((labels * count + predictions).cpu(), minlength=count**2).view(count, count)
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    image = Image.new("RGB", (left + max(count * cell, 300) + 12, top + count * cell + 12), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 8), "true class (rows), predicted class (columns), per cent of the row", "black", font_size=13)
    for i, name in enumerate(names):
        y = top + i * cell
        draw.text((left - 8, y + cell / 2), name[:20], "black", font_size=min(13, cell), anchor="rm")
        if few:
            draw.text((left + (i + 0.5) * cell, top - 6), name[:8], "black", font_size=10, anchor="ms")
        for j, share in enumerate(shares[i].tolist()):
            x, full = left + j * cell, (31, 119, 180) if i == j else WRONG
            shade = tuple(round(255 - share * (255 - c)) for c in full)
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), shade)
            if few:
                ink = "white" if share > 0.5 else "black"
                draw.text((x + cell / 2, y + cell / 2), f"{100 * share:.0f}", ink, font_size=13, anchor="mm")
    return image
