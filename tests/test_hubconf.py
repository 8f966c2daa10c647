"""The trunk by torch.hub: the network and its preprocessing."""

import re
import sys
import textwrap
import types

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT
from PIL import Image, ImageOps
from test_dataset_helpers import write_image
from torchvision.models.feature_extraction import create_feature_extractor

import hubconf
import models
from augmentations import PIXEL_MEAN, PIXEL_STD
from runtime.files import atomic_save

# The hub imports modules of its own, beyond the reach of a test's patches.
pytestmark = pytest.mark.full_trunk


def write_weights(path, side=48, stem="imagenet"):
    """What pretraining exports, of an untrained trunk. Returns the trunk."""
    torch.manual_seed(0)
    trunk, _ = models.make_trunk("res18", stem, zero_init=False)
    content = {
        "kind": "PIRL weights",
        "trunk": trunk.state_dict(),
        "settings": {"model_type": "res18", "stem": stem, "image_size": side},
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
    }
    atomic_save(content, path)
    return trunk.eval()


def load(path, **options):
    """As the README says it."""
    return torch.hub.load(str(ROOT), "trunk", source="local", path=path, **options)


@torch.no_grad()
def features_of(trunk, prepare, path):
    return trunk(prepare(Image.open(path))[None])


# ---- The network ---------------------------------------------------------------------
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_the_trunk_is_the_file_s_and_plain_torchvision(tmp_path, stem):
    path = tmp_path / "exp.pt"
    expected = write_weights(path, stem=stem)
    trunk, _ = load(path)
    state_dict = trunk.state_dict()
    assert state_dict.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(state_dict[name], value), name

    # So whatever takes torchvision's ResNet takes it: torch.export, jit.script, fx.
    assert type(trunk) is torchvision.models.ResNet
    plain = {type(module) for module in torchvision.models.resnet18().modules()}
    for module in trunk.modules():
        assert type(module) in {*plain, torch.nn.Identity}
        assert not module.training

    extractor = create_feature_extractor(trunk, ["layer3"])
    assert extractor(torch.randn(2, 3, 36, 36))["layer3"].shape[:2] == (2, 256)


def test_another_project_s_trunk(tmp_path, capsys):
    """It has no settings: its own stem, STL-10's size, and torchvision's pixels."""
    torch.manual_seed(0)
    resnet = torchvision.models.resnet18()
    state_dict = torch.nn.ModuleDict({"encoder_q": resnet}).state_dict()
    torch.save({"state_dict": state_dict}, tmp_path / "moco.pth")

    trunk, prepare = load(tmp_path / "moco.pth")
    output = capsys.readouterr().out
    assert "encoder_q." in output
    assert "normalised as for ImageNet" in output
    assert torch.equal(trunk.conv1.weight, resnet.conv1.weight)
    assert prepare(Image.new("RGB", (120, 100))).shape == (3, 96, 96)

    write_image(tmp_path / "a.png", 0, (96, 96))
    with Image.open(tmp_path / "a.png") as picture:
        transforms = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms
        expected = transforms(crop_size=96, resize_size=96)(picture)
        torch.testing.assert_close(prepare(picture), expected)


# ---- The preprocessing ---------------------------------------------------------------
def write_every_kind(folder):
    """Pictures that the usual preprocessing gets wrong, and some that it does not."""
    folder.mkdir()
    wide = np.random.default_rng(0).integers(0, 256, (60, 90, 4), np.uint8)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x112] = orientation
        # Pillow maps a gray TIFF into memory: a way of its own.
        for ending, bands in (("jpg", 3), ("png", 3), ("webp", 4), ("tif", 1)):
            pixels = wide[..., 0] if bands == 1 else wide[..., :bands]
            file = folder / f"turned_{orientation}.{ending}"
            Image.fromarray(np.ascontiguousarray(pixels)).save(file, exif=exif)
    bits = np.linspace(0, 65535, 50 * 48).reshape(50, 48).astype(np.uint16)
    Image.fromarray(bits).save(folder / "16_bits.png")
    palette = Image.fromarray(wide[..., :3]).quantize(16)
    palette.save(folder / "palette.png", transparency=3)
    Image.fromarray(wide).convert("LA").save(folder / "la.png")
    Image.fromarray(wide[..., :3]).convert("CMYK").save(folder / "cmyk.jpg")
    write_image(folder / "small.png", 1, (9, 13))
    write_image(folder / "same.png", 2, (48, 48))
    write_image(folder / "strip.png", 3, (900, 40))
    write_image(folder / "strip_8.png", 4, (40, 320))


def test_features_are_those_of_extract_features(call, tmp_path):
    path = tmp_path / "exp.pt"
    write_weights(path, 40)
    write_every_kind(tmp_path / "pictures")
    out = tmp_path / "f.npz"
    flags = ("--model", path, "--images", tmp_path / "pictures", "--out", out)
    outcome = call("extract_features", *flags, "--device", "cpu")
    assert outcome.status == 0, outcome.err
    expected = np.load(out)
    assert len(expected["names"]) == 40

    trunk, prepare = load(path)
    for name, features in zip(expected["names"], expected["features"], strict=True):
        ours = features_of(trunk, prepare, tmp_path / "pictures" / name)[0].numpy()
        difference = abs(ours - features).max()
        assert difference < 1e-5 * abs(features).max(), name


# ---- Modules of the same names -------------------------------------------------------
TAKEN = ["models", "evaluation", "augmentations", "jigsaw", "losses", "report"]
TAKEN += ["dataset_helpers", "hubconf", "runtime", "runtime.weights", "runtime.own"]


@pytest.mark.parametrize("file", ["exp.pt", "nothing.pt"])
def test_modules_of_the_user_s_project_stay_its_own(tmp_path, monkeypatch, file):
    """Those imported before and those imported later, also where loading fails."""
    write_weights(tmp_path / "exp.pt")
    ours = {path.stem for path in ROOT.glob("*.py")} | {"runtime"}
    for name in list(sys.modules):
        if name.partition(".")[0] in ours:
            monkeypatch.delitem(sys.modules, name)
    theirs = {name: types.ModuleType(name) for name in TAKEN}
    for name, module in theirs.items():
        monkeypatch.setitem(sys.modules, name, module)
    path = [str(tmp_path), *(part for part in sys.path if part != str(ROOT))]
    monkeypatch.setattr(sys, "path", list(path))

    if file == "exp.pt":
        trunk, prepare = load(tmp_path / file)
        assert trunk(prepare(Image.new("RGB", (50, 50)))[None]).shape == (1, 512)
    else:
        with pytest.raises(Exception, match=r"there is no model .*nothing\.pt"):
            load(tmp_path / file)

    for name in list(sys.modules):
        if name.partition(".")[0] in ours:
            assert sys.modules[name] is theirs.get(name), name
    assert sys.path == path
    (tmp_path / "pictures.py").write_text("mine = 1\n")
    (tmp_path / "checkpoints.py").write_text("import models\n")
    try:
        import checkpoints

        import pictures

        assert pictures.mine == 1
        assert checkpoints.models is theirs["models"]
    finally:
        del sys.modules["pictures"]
        del sys.modules["checkpoints"]


def test_modules_of_other_names_are_left_alone():
    """Taken out and imported again, numpy would not work."""
    import runpy

    names = {"torch", "numpy", "PIL", "tqdm", "torchvision.models", "runpy"}
    before = {name: sys.modules[name] for name in names}
    with hubconf.own_modules():
        assert {name: sys.modules[name] for name in names} == before
        assert "models" not in sys.modules
    assert sys.modules["runpy"] is runpy
    assert sys.modules["models"] is models

    # As where a package is missing that this repository needs.
    path = list(sys.path)
    with pytest.raises(ImportError), hubconf.own_modules():
        raise ImportError
    assert sys.modules["models"] is models
    assert sys.path == path


# ---- What the documents say ----------------------------------------------------------
def docstring_code(beginning):
    """The indented block of hubconf.py's docstring that begins with this line."""
    text = hubconf.__doc__
    block = re.search(rf"^    {beginning}.*\n(    .*\n)+", text, re.M)
    return textwrap.dedent(block[0])


def readme_code():
    """The README's lines, which need nothing before them."""
    readme = (ROOT / "README.md").read_text()
    snippet = re.search(r"## Use the trunk\n\n((?:    .*\n|\n)+)", readme)[1]
    return textwrap.dedent(snippet).replace('"."', repr(str(ROOT)))


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_the_documents_lines_give_the_features_of_the_trunk(
    tmp_path, monkeypatch, stem
):
    """The README's, and the docstring's with and without this repository."""
    from torchvision.transforms import v2

    expected = write_weights(tmp_path / "weights/exp.pt", 36, stem)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(pixels).save(tmp_path / "cat.jpg", exif=exif)
    monkeypatch.chdir(tmp_path)
    _, prepare = load("exp")
    features = features_of(expected, prepare, "cat.jpg")
    assert features.shape == (1, 512)

    snippets = {
        "README": readme_code(),
        "short": docstring_code("trunk, prepare").replace('"."', repr(str(ROOT))),
        "long": docstring_code("saved = "),
    }
    for name, code in snippets.items():
        names = {}
        if name != "README":
            names = {"torch": torch, "torchvision": torchvision, "v2": v2}
            names.update(Image=Image, ImageOps=ImageOps)
        exec(code, names)
        torch.testing.assert_close(names["features"], features, msg=name)
