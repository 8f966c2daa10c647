"""Pictures of results: nearest neighbours, confusion matrix, learning curves. All are small PNG files."""

import run_helpers as rh
import torch
from PIL import Image, ImageDraw
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

TILE = 64  # pixels of a small photograph
RIGHT, WRONG = (44, 160, 44), (214, 39, 40)
LINES = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e"]


def save_picture(image, path):
    """A Pillow image, or RGB float [3, H, W] in 0 … 1, as a PNG of 256 colours: small files."""
    if isinstance(image, torch.Tensor):
        image = to_pil_image(image.clamp(0, 1).cpu())
    with rh.whole_file(path) as file:
        image.quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)


def neighbour_picture(queries, query_labels, found, found_labels, names):
    """A row per query: the image, then its nearest images, green if of its class and red if not; the class on each.

    queries uint8 [Q, 3, S, S], query_labels [Q], found uint8 [Q, k, 3, S, S], found_labels [Q, k]. A Pillow image.
    """
    tiles = torch.cat([queries[:, None], found], 1).flatten(0, 1).float() / 255
    tiles = torch.nn.functional.interpolate(tiles, (TILE, TILE), mode="bilinear", antialias=True)
    same = (found_labels == query_labels[:, None]).cpu()
    frames = torch.where(same[..., None], torch.tensor(RIGHT) / 255, torch.tensor(WRONG) / 255)
    frames = torch.cat([torch.ones(len(queries), 1, 3), frames], 1).flatten(0, 1)
    framed = frames[:, :, None, None].repeat(1, 1, TILE + 8, TILE + 8)
    framed[:, :, 4:-4, 4:-4] = tiles.cpu()
    image = to_pil_image(make_grid(framed, found.shape[1] + 1, padding=4, pad_value=1))
    draw, style = ImageDraw.Draw(image), {"stroke_width": 1, "stroke_fill": "black", "font_size": 10, "anchor": "ls"}
    for row, labels in enumerate(torch.cat([query_labels[:, None], found_labels], 1).tolist()):
        for column, label in enumerate(labels):
            place = (column * (TILE + 12) + 10, row * (TILE + 12) + TILE + 6)
            draw.text(place, names[label][:12], fill="white", **style)
    return image


def confusion_picture(labels, predictions, names):
    """Per cent of each class (row) by predicted class (column), of labels and predictions int64 [N]. A Pillow image."""
    count, left, top = len(names), 130, 110
    cell = 46 if count <= 20 else max(4, 920 // count)  # of many classes the shades alone are shown
    matrix = torch.bincount((labels * count + predictions).cpu(), minlength=count**2).view(count, count)
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    image = Image.new("RGB", (left + count * cell + 12, top + count * cell + 12), "white")
    draw, font_size = ImageDraw.Draw(image), min(13, cell)
    draw.text((8, 8), "true class (rows), predicted class (columns), per cent of the row", fill="black", font_size=13)
    for i, name in enumerate(names):
        draw.text((left - 8, top + (i + 0.5) * cell), name[:20], fill="black", font_size=font_size, anchor="rm")
        label = Image.new("L", (top - 20, font_size + 5), 0)
        ImageDraw.Draw(label).text((0, label.height // 2), name[:16], fill=255, font_size=font_size, anchor="lm")
        turned = label.rotate(60, expand=True)
        image.paste("black", (int(left + (i + 0.2) * cell), top - turned.height - 2), turned)
        for j in range(count):
            share, x, y = shares[i, j].item(), left + j * cell, top + i * cell
            shade = tuple(round(255 - share * (255 - c)) for c in ((31, 119, 180) if i == j else WRONG))
            draw.rectangle((x, y, x + cell - 2, y + cell - 2), fill=shade)
            if cell == 46:
                place, ink = (x + cell / 2, y + cell / 2), "white" if share > 0.5 else "black"
                draw.text(place, f"{100 * share:.0f}", fill=ink, font_size=13, anchor="mm")
    return image


def curve_picture(panels):
    """Panels side by side, each (title, curves): a curve is a list of (epoch, value), one per seed. A Pillow image."""
    width, height, margin = 520, 340, 56
    image = Image.new("RGB", (width * len(panels), height), "white")
    draw = ImageDraw.Draw(image)
    for place, (title, curves) in enumerate(panels):
        edge, values = place * width, [value for curve in curves for _, value in curve]
        draw.text((edge + margin, 16), title, fill="black", font_size=15)
        if not values:
            draw.text((edge + margin, height // 2), "not measured", fill="black", font_size=15)
            continue
        low, high, last = min(values), max(values), max(epoch for curve in curves for epoch, _ in curve)
        scale = (height - 2 * margin) / (high - low or 1)
        step = (width - margin - 24) / max(1, last - 1)
        for value in (low, (low + high) / 2, high):
            y = height - margin - (value - low) * scale
            draw.line((edge + margin, y, edge + width - 24, y), fill="#dddddd")
            draw.text((edge + margin - 8, y), f"{value:.3f}", fill="black", font_size=13, anchor="rm")
        for epoch in sorted({1, (last + 1) // 2, last}):
            x = edge + margin + (epoch - 1) * step
            draw.text((x, height - margin + 8), str(epoch), fill="black", font_size=13, anchor="mt")
        draw.text((edge + width // 2, height - 14), "epoch", fill="black", font_size=13, anchor="ms")
        for seed, curve in enumerate(curves):
            points = [(edge + margin + (e - 1) * step, height - margin - (v - low) * scale) for e, v in curve]
            fill = LINES[seed % len(LINES)]
            draw.line(points, fill, width=2)
            for x, y in points if len(points) < 30 else []:
                draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill)
            draw.text((edge + width - 24, 40 + 18 * seed), f"seed {seed}", fill, font_size=13, anchor="rm")
    return image
