"""The pictures show what they say."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import pictures
from augmentations import PIXEL_MEAN, PIXEL_STD, crop_box, normalize
from jigsaw import CELLS, PRETEXT_CROP_AREA, Jigsaw, patch_sizes
from rotation import JigsawRotation
from runtime.randomness import make_generator


def record_texts(monkeypatch, places=None):
    """A list that gets every text that is drawn; `places` gets where that is."""
    texts = []
    draw_text = ImageDraw.ImageDraw.text

    def recorded(draw, place, text, *rest, **options):
        texts.append(text)
        if places is not None:
            places.append(place)
        draw_text(draw, place, text, *rest, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", recorded)
    return texts


# ---- Nearest neighbours --------------------------------------------------------------
def cells_of_neighbours(picture):
    """The cells of a picture of neighbours, row by row."""
    side = pictures.TILE + 3 * pictures.FRAME
    assert picture.width % side == 0
    assert picture.height % side == 0
    for top in range(0, picture.height, side):
        for left in range(0, picture.width, side):
            yield picture.crop((left, top, left + side, top + side))


@pytest.mark.parametrize("judged", [True, False])
def test_neighbours_have_their_frames_and_texts(monkeypatch, judged):
    """Two rows of three found images: a green frame is for the same class."""
    texts = record_texts(monkeypatch)
    values = torch.tensor([[10, 60, 110, 160], [200, 40, 90, 140]])  # query, found
    images = values[..., None, None, None].expand(2, 4, 3, 36, 36).to(torch.uint8)
    same_class = torch.tensor([[True, False, False], [True, True, False]])
    picture = pictures.neighbour_picture(
        images[:, 0],
        images[:, 1:],
        ["ant", "bee"],
        [["a1", "a2", "a3"], ["b1", "b2", "b3"]],
        same_class if judged else None,
    )

    assert texts == ["ant", "a1", "a2", "a3", "bee", "b1", "b2", "b3"]
    white = (255, 255, 255)
    green = (44, 160, 44)
    red = (214, 39, 40)
    frames = [white, green, red, red, white, green, green, red]
    if not judged:
        frames = [white, *[pictures.GRAY] * 3] * 2
    framed = pictures.TILE + 2 * pictures.FRAME
    cells = list(cells_of_neighbours(picture))
    for cell, value, frame in zip(
        cells, values.flatten().tolist(), frames, strict=True
    ):
        assert max(abs(shade - value) for shade in cell.getpixel((30, 30))) <= 1
        assert cell.getpixel((0, 0)) == frame
        assert cell.getpixel((framed - 1, framed - 1)) == frame
        assert cell.getpixel((framed, framed)) == white, "a gap"
        text = np.asarray(cell)[50:68, 6:20]
        assert text.min(-1).max() > min(value + 40, 240), "a text"


# ---- The confusion matrix ------------------------------------------------------------
def test_every_cell_of_the_confusion_has_its_shade_and_its_per_cent(monkeypatch):
    """True classes in rows; a class without images is an empty row."""
    places = []
    texts = record_texts(monkeypatch, places)
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 3])
    predictions = torch.tensor([0, 0, 0, 1, 3, 3, 1, 3])
    names = ["a", "b", "c", "d"]
    picture = pictures.confusion_picture(labels, predictions, names)
    shares = np.array(
        [[3 / 4, 1 / 4, 0, 0], [0, 1 / 3, 0, 2 / 3], [0, 0, 0, 0], [0, 0, 0, 1]]
    )

    expected = set()
    for row in range(4):
        y = pictures.TOP + 46 * row
        expected.add((names[row], (pictures.LEFT - 8, y + 23)))
        for column in range(4):
            x = pictures.LEFT + 46 * column
            ink = np.array((31, 119, 180) if row == column else (214, 39, 40))
            share = shares[row, column]
            shade = 255 * (1 - share) + ink * share
            corner = picture.getpixel((x + 2, y + 2))  # where no number stands
            assert np.abs(corner - shade).max() <= 1, (row, column)
            expected.add((f"{100 * share:.0f}", (x + 23, y + 23)))
            cell = picture.crop((x, y, x + 46, y + 46)).convert("L").getextrema()
            assert cell[1] > 250 if share > 0.5 else cell[0] < 50, "the number's ink"
    for column in range(4):
        x = pictures.LEFT + 46 * column
        expected.add((names[column], (x + 23, pictures.TOP - 6)))
    after_the_title = zip(texts[1:], places[1:], strict=True)
    assert set(after_the_title) == expected


@pytest.mark.parametrize("count", [2, 20, 21, 300])
def test_few_and_many_classes(count, monkeypatch):
    texts = record_texts(monkeypatch)
    names = [f"kind {i}" for i in range(count)]
    labels = torch.arange(count)
    picture = pictures.confusion_picture(labels, labels, names)
    width, height = picture.size
    assert max(width, height) < 1500
    few = count <= 20
    assert texts.count("100") == (count if few else 0), "numbers"
    assert sum("kind" in text for text in texts) >= (count if few else 0), "names"

    # The diagonal ends in the lower right corner of the matrix, which is a square.
    side = height - pictures.TOP - pictures.MARGIN
    corner = (pictures.LEFT + side - 1, pictures.TOP + side - 1)
    assert picture.getpixel(corner) == pictures.BLUE


def test_names_that_cannot_be_drawn_become_numbers(monkeypatch):
    texts = record_texts(monkeypatch)
    names = ["cat", "Löwe", "中国", "dog 2", "a\nb", "", "\udce9"]
    labels = torch.arange(len(names))
    pictures.confusion_picture(labels, labels, names)
    shown = {text for text in texts if text not in ("0", "100")}
    assert shown - {texts[0]} == {"cat", "#2", "#3", "dog 2", "#5", "#6", "#7"}


def test_long_names_are_not_cut_off_at_the_edge(monkeypatch):
    texts = record_texts(monkeypatch)
    labels = torch.tensor([0, 1])
    names = ["West Highland white terrier, and more", "i" * 30]
    picture = pictures.confusion_picture(labels, labels, names)
    assert len([text for text in texts if text.endswith("…")]) == 3
    left_of_the_names = picture.crop((0, pictures.TOP, 7, picture.height))
    assert left_of_the_names.getextrema() == ((255, 255),) * 3


def test_shortened_names_fit():
    font = ImageFont.load_default(13)
    for name in ("cat", "W" * 40, "i" * 40, "a name"):
        for width in (0, 10, 50, font.getlength(name), 900):
            text = pictures.shorten(name, font, width)
            assert (text == name) == (font.getlength(name) <= width)
            if text not in (name, "…"):
                assert name.startswith(text.removesuffix("…"))
                longer = name[: len(text)] + "…"
                assert font.getlength(text) <= width < font.getlength(longer)


def test_confusion_table(tmp_path):
    names = ["cat", "Löwe, weiß", "中国"]
    labels = torch.tensor([0, 0, 0, 1, 2, 2])
    predictions = torch.tensor([0, 0, 1, 1, 0, 2])
    path = tmp_path / "confusion.csv"
    pictures.write_confusion_csv(path, labels, predictions, names)
    with open(path, encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["true class", *names]
    assert rows == [
        ["cat", "2", "1", "0"],
        ["Löwe, weiß", "0", "1", "0"],
        ["中国", "1", "0", "1"],
    ]


# ---- What the network sees in pretraining --------------------------------------------
class Mirror(nn.Module):
    """A pretext task with one input per image."""

    inputs_per_image = 1
    uniforms = 5

    def forward(self, images, uniforms):
        assert uniforms.shape == (len(images), 5)
        return normalize(images.flip(3), PIXEL_MEAN, PIXEL_STD)


def cell_of(picture, row, column, side=96):
    """A cell of the picture, at the size of the images: uint8 [3, side, side]."""
    top = 8 + row * (2 * side + 8)
    left = 8 + column * (2 * side + 8)
    cell = np.array(picture)[top : top + 2 * side : 2, left : left + 2 * side : 2]
    return torch.from_numpy(cell).permute(2, 0, 1)


def noise(count, side=96):
    generator = make_generator("cpu", 1)
    small = torch.rand(count, 3, 12, 12, generator=generator) * 255
    return nn.functional.interpolate(small, side)


@pytest.mark.parametrize("side", [96, 64])
def test_jigsaw_picture(side):
    images = noise(3, side)
    pretext = Jigsaw(colour_strength=0.0)
    generator = make_generator("cpu", 2)
    uniforms = torch.rand(3, pretext.uniforms, generator=generator)
    picture = pictures.pretext_picture(images, pretext, uniforms)

    step = 2 * side + 8
    assert picture.size == (6 * step + 8, 2 * step + 8), "two images in a row"
    for i in range(3):
        row, column = divmod(3 * i, 6)
        shown = cell_of(picture, row, column, side)
        assert (shown - images[i]).abs().max() <= 1, "the image"

        crop = cell_of(picture, row, column + 1, side)
        cell, _ = patch_sizes(side)
        for line in (cell, 2 * cell):
            assert (crop[:, line - 1 : line + 1] == 255).all(), "the grid"
            assert (crop[:, :, line - 1 : line + 1] == 255).all(), "the grid"

        white = (cell_of(picture, row, column + 2, side) == 255).all(0)
        border = side // 32
        assert white[:, :border].all(), "around the patches"
        assert not white[:, border].all()


def test_a_pretext_task_with_one_input_per_image():
    images = noise(3)
    picture = pictures.pretext_picture(images, Mirror(), torch.rand(3, 5))
    assert picture.size == (4 * 200 + 8, 2 * 200 + 8)
    for i in range(3):
        row, column = divmod(2 * i, 4)
        assert (cell_of(picture, row, column) - images[i]).abs().max() <= 1
        mirrored = cell_of(picture, row, column + 1)
        assert (mirrored - images[i].flip(2)).abs().max() <= 1


def test_saved_pictures_are_small_and_whole(tmp_path):
    picture = Image.linear_gradient("L").convert("RGB")
    picture.paste(pictures.BLUE, (10, 0, 50, 50))
    path = tmp_path / "folder/picture.png"
    pictures.save_picture(picture, path)
    assert path.stat().st_size < 2000
    assert [file.name for file in path.parent.iterdir()] == ["picture.png"]
    with Image.open(path) as saved:
        difference = np.asarray(saved.convert("RGB")) - np.asarray(picture, int)
        assert abs(difference).max() <= 4


def test_the_crop_with_the_grid_is_the_one_that_is_cut():
    """If red is the row and green the column, a pixel says where it is from."""
    side = 96
    place = torch.arange(side).float()
    red = place[:, None].expand(side, side)
    images = torch.stack([red, red.T, red]).expand(5, 3, side, side)
    uniforms = torch.rand(5, Jigsaw.uniforms, generator=make_generator("cpu", 4))
    crops = Jigsaw().crop_pictures(images, uniforms) * 255

    corner, size = crop_box(uniforms[:, :4], side, PRETEXT_CROP_AREA)
    between_lines = slice(2, 30)
    for crop, (top, left), (height, width) in zip(crops, corner, size, strict=True):
        rows = top + (place + 0.5) * height / side - 0.5
        columns = left + (place + 0.5) * width / side - 0.5
        shown_rows = crop[0, between_lines, 5]
        shown_columns = crop[1, 5, between_lines]
        torch.testing.assert_close(shown_rows, rows[between_lines], rtol=0, atol=0.02)
        torch.testing.assert_close(
            shown_columns, columns[between_lines], rtol=0, atol=0.02
        )


@pytest.mark.parametrize("turns", [None, 0, 1, 2, 3])
def test_the_jigsaw_s_patches_are_shown_in_their_order(turns):
    """The image, the crop (turned, if it is) with its grid, the patches.

    The crop is the whole image, of nine plain cells.
    """
    values = torch.arange(9).view(3, 3) * 25 + 20
    image = values.repeat_interleave(32, 0).repeat_interleave(32, 1)
    images = image.expand(1, 3, 96, 96).float()
    pretext = Jigsaw(0.0) if turns is None else JigsawRotation(0.0)
    uniforms = torch.rand(1, pretext.uniforms, generator=make_generator("cpu", 3))
    crop_uniforms = uniforms[:, :4]
    if turns is not None:
        uniforms[:, 0] = (turns + 0.5) / 4
        crop_uniforms = uniforms[:, 1:5]
    crop_uniforms[:, 0] = 1 - 2**-24
    crop_uniforms[:, 1] = 0.5
    picture = pictures.pretext_picture(images, pretext, uniforms)

    assert picture.size == (3 * 200 + 8, 200 + 8)
    assert (cell_of(picture, 0, 0) - images[0]).abs().max() <= 1

    expected = images[0].rot90(turns or 0, (1, 2)).clone()
    for line in (32, 64):
        expected[:, line - 1 : line + 1] = 255
        expected[:, :, line - 1 : line + 1] = 255
    assert (cell_of(picture, 0, 1) - expected).abs().max() <= 1

    turned = values.rot90(turns or 0).flatten().tolist()
    presented = uniforms[0, -CELLS:].argsort().tolist()
    mosaic = cell_of(picture, 0, 2)
    for place in range(CELLS):
        y = place // 3 * 32 + 16
        x = place % 3 * 32 + 16
        assert abs(int(mosaic[0, y, x]) - turned[presented[place]]) <= 1


@pytest.mark.parametrize("count", [2, 4, 5, 9])
def test_several_inputs_are_a_square_row_by_row(count):
    values = torch.arange(2 * count) / 20
    inputs = values[:, None, None, None].expand(2 * count, 3, 10, 10)
    squares = pictures.mosaics(inputs, count, gap=2)

    columns = {2: 2, 4: 2, 5: 3, 9: 3}[count]
    side = columns * 12 + 2
    assert squares.shape == (2, 3, side, side)
    for image in range(2):
        for place in range(columns**2):
            top = 2 + place // columns * 12
            left = 2 + place % columns * 12
            shown = squares[image, :, top : top + 10, left : left + 10]
            value = values[image * count + place] if place < count else 1
            assert (shown == value).all()
            assert (squares[image, :, top - 2 : top] == 1).all(), "a gap"


def test_the_script_draws_the_first_images(tmp_path, monkeypatch, capsys):
    """1 to 4 of 12; without --out, in a file of the task's name."""
    folder = tmp_path / "stl10_data/unlabelled"
    folder.mkdir(parents=True)
    for i in range(1, 13):
        ending = "png" if i % 2 else "bmp"
        Image.new("RGB", (50, 40 + i), (20 * i, 0, 250 - 20 * i)).save(
            folder / f"{i}.{ending}"
        )
    monkeypatch.chdir(tmp_path)

    def draw(name, *flags):
        pictures.main(list(flags))
        assert capsys.readouterr().out.startswith(f"wrote {name}: ")
        with Image.open(name) as picture:
            assert picture.format == "PNG"
            return np.asarray(picture.convert("RGB"))

    jigsaw = draw("jigsaw.png")
    both = draw("jigsaw-rotation.png", "--pretext", "jigsaw-rotation")
    rotation = draw("rotation.png", "--pretext", "rotation")
    assert jigsaw.shape == both.shape == (2 * 200 + 8, 6 * 200 + 8, 3)
    assert rotation.shape == (2 * 200 + 8, 4 * 200 + 8, 3)
    assert (jigsaw != both).any()
    for picture, columns in ((jigsaw, 3), (rotation, 2)):
        changes = []
        for i in range(4):
            row, column = divmod(columns * i, 2 * columns)
            cell = cell_of(picture, row, column)
            colour = torch.tensor([20 * (i + 1), 0, 250 - 20 * (i + 1)])
            assert (cell - colour[:, None, None]).abs().max() <= 3
            seen = cell_of(picture, row, column + columns - 1)[:, 40, 40]
            changes.append((seen - colour).abs().max())
        assert max(changes) > 20, "their colours are jittered"

    assert (draw("a.png", "--seed", "0", "--out", "a.png") == jigsaw).all()
    assert (draw("b.png", "--seed", "1", "--out", "b.png") != jigsaw).any()
    single = draw("c.png", "--images", "1", "--out", "c.png")
    assert single.shape == (208, 3 * 200 + 8, 3)
    small = draw("rotation.png", "--pretext", "rotation", "--image-size", "48")
    assert small.shape == (2 * 104 + 8, 4 * 104 + 8, 3)
    plain = draw("rotation.png", "--pretext", "rotation", "--colour-strength", "0")
    seen = cell_of(plain, 0, 1)[:, 40, 40]
    assert (seen - torch.tensor([20, 0, 230])).abs().max() <= 3, "no other colours"
