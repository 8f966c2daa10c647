"""The trunk by torch.hub: the network and its preprocessing."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, ThinResNet
from PIL import Image

import hubconf
import models
from augmentations import PIXEL_MEAN, PIXEL_STD
from evaluation import trunk_features
from runtime.errors import UserError
from runtime.files import atomic_save


def write_image(path, seed, size=(70, 50)):
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)


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
    return trunk


def load(path, **options):
    """As the README says it."""
    return torch.hub.load(str(ROOT), "trunk", source="local", path=path, **options)


@torch.no_grad()
def features_of(trunk, prepare, path):
    return trunk(prepare(Image.open(path).convert("RGB"))[None])


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_the_trunk_is_the_file_s_and_ready_for_use(tmp_path, stem):
    path = tmp_path / "exp.pt"
    expected = write_weights(path, stem=stem)
    trunk, prepare = load(path)

    assert not trunk.training
    assert not any(module.training for module in trunk.modules())
    state_dict = trunk.state_dict()
    assert state_dict.keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(state_dict[name], value), name

    write_image(tmp_path / "cat.png", 1)
    prepared = prepare(Image.open(tmp_path / "cat.png").convert("RGB"))
    assert prepared.shape == (3, 48, 48)
    assert prepared.dtype == torch.float32
    assert features_of(trunk, prepare, tmp_path / "cat.png").shape == (1, 64)


def test_features_are_those_of_extract_features(call, tmp_path):
    path = tmp_path / "exp.pt"
    write_weights(path)
    sizes = [(70, 50), (48, 48), (30, 90)]
    for seed, size in enumerate(sizes):
        write_image(tmp_path / f"{seed}.png", seed, size)
    out = tmp_path / "f.npz"
    flags = ("--model", path, "--images", tmp_path, "--out", out, "--device", "cpu")
    outcome = call("extract_features", *flags)
    assert outcome.status == 0, outcome.err
    expected = np.load(out)

    trunk, prepare = load(path)
    for name, features in zip(expected["names"], expected["features"], strict=True):
        ours = features_of(trunk, prepare, tmp_path / name)
        np.testing.assert_allclose(ours[0], features, 1e-3, 1e-4)


def test_the_preprocessing_is_that_of_training(tmp_path):
    """Of an image that needs no resizing, to the last digits."""
    path = tmp_path / "exp.pt"
    expected = write_weights(path)
    write_image(tmp_path / "cat.png", 2, (48, 48))
    pixels = np.asarray(Image.open(tmp_path / "cat.png")).transpose(2, 0, 1)
    images = torch.from_numpy(pixels.copy())[None]

    trunk, prepare = load(path)
    ours = features_of(trunk, prepare, tmp_path / "cat.png")
    torch.testing.assert_close(ours, trunk_features(expected.eval(), images, 1))


def test_another_project_s_trunk(tmp_path, capsys):
    """It has no settings: the usual stem, and images of STL-10's size."""
    torch.manual_seed(0)
    resnet = ThinResNet()
    state_dict = torch.nn.ModuleDict({"encoder_q": resnet}).state_dict()
    torch.save({"state_dict": state_dict}, tmp_path / "moco.pth")

    trunk, prepare = load(tmp_path / "moco.pth")
    assert "encoder_q." in capsys.readouterr().out
    assert torch.equal(trunk.conv1.weight, resnet.conv1.weight)
    assert prepare(Image.new("RGB", (120, 100))).shape == (3, 96, 96)


def test_a_name_in_the_weights_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = write_weights(tmp_path / "weights/exp.pt")
    trunk, _ = load("exp")
    assert torch.equal(trunk.conv1.weight, expected.conv1.weight)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"there is no model .*exp\.pt"):
        load(tmp_path / "exp.pt")


def docstring_code(beginning):
    """The indented block of hubconf.py's docstring that begins with this line."""
    lines = hubconf.__doc__.splitlines()
    first = next(
        i for i, line in enumerate(lines) if line.strip().startswith(beginning)
    )
    block = []
    for line in lines[first:]:
        if line and not line.startswith("    "):
            break
        block.append(line.removeprefix("    "))
    return "\n".join(block)


@pytest.mark.full_trunk
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_the_docstring_s_long_form_is_the_same(tmp_path, monkeypatch, stem):
    """For those who have a file of weights, but not this repository."""
    import torchvision
    from torchvision.transforms import v2

    write_weights(tmp_path / "weights/exp.pt", stem=stem)
    write_image(tmp_path / "cat.jpg", 3)
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "torchvision": torchvision, "v2": v2}
    exec(docstring_code("saved = "), names)

    image = tmp_path / "cat.jpg"
    trunk, prepare = load("weights/exp.pt")
    long_form = features_of(names["resnet"], names["prepare"], image)
    torch.testing.assert_close(long_form, features_of(trunk, prepare, image))
    assert long_form.shape == (1, 512)


@pytest.mark.slow
@pytest.mark.full_trunk
def test_from_a_program_elsewhere(tmp_path):
    """Nothing of this repository is on its path, and its folder is another one.

    The README's own snippet is run by test_extract_features.py.
    """
    expected = write_weights(tmp_path / "weights/exp.pt")
    write_image(tmp_path / "cat.jpg", 3)
    short_form = docstring_code("trunk, prepare")
    short_form = short_form.replace('"."', repr(str(ROOT)))
    code = (
        "import torch\n"
        "from PIL import Image\n"
        f"{short_form}\n"
        "torch.save(features, 'features.pth')\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    _, prepare = load(tmp_path / "weights/exp.pt")
    ours = features_of(expected.eval(), prepare, tmp_path / "cat.jpg")
    found = torch.load(tmp_path / "features.pth")
    torch.testing.assert_close(found, ours)
