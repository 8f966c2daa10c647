"""Weights to start from: our own files, and those of other projects.

Each layout of another project is as its own code writes it.
"""

import argparse
import copy
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ThinResNet
from test_dataset_helpers import write_image
from torch import nn

import augmentations
import evaluation
from models import make_trunk
from runtime import weights as weights_module
from runtime.errors import UserError
from runtime.files import atomic_save
from runtime.weights import (
    Architecture,
    architecture_of,
    choose_architecture,
    load_weights,
    model_type_of,
    read_weights,
    stem_of,
)

THIN_SHAPE = ("basic", (1, 1, 1, 1))


@pytest.fixture(autouse=True)
def thin_is_res18(thin_trunk, monkeypatch):
    """As conftest.py's thin trunk is, so that runs can start from such a file."""
    monkeypatch.setitem(weights_module.OUR_MODEL_TYPES, THIN_SHAPE, "res18")


def make_resnet(seed, stem="imagenet"):
    """A thin ResNet of random numbers, its running statistics included."""
    generator = torch.Generator().manual_seed(seed)
    resnet = ThinResNet()
    if stem == "small":
        resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    for value in resnet.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
            if value.dim() > 1:
                # Weights about as large as those of a trained network.
                value.sub_(1).mul_(0.1)
    return resnet


def trunk_of(resnet):
    """What must arrive: all but the last layer."""
    state_dict = resnet.state_dict()
    return {name: v for name, v in state_dict.items() if not name.startswith("fc.")}


def named(**modules):
    """A module that has others under these names, as attributes of a class would."""
    return nn.ModuleDict(modules)


def with_head(resnet):
    """Two layers in place of the last one: fc.0 and fc.2."""
    resnet = copy.deepcopy(resnet)
    resnet.fc = two_layers()
    return resnet


def two_layers():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))


def training_file(**content):
    """Beside the weights are tensors that must not be taken for any."""
    momentum = {"momentum_buffer": torch.zeros(64, 3, 7, 7)}
    optimizer = {"state": {0: momentum}, "param_groups": [{"lr": 0.03, "params": [0]}]}
    return {"epoch": 200, "arch": "resnet18", "optimizer": optimizer, **content}


def same_trunk(found, resnet):
    expected = trunk_of(resnet)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    return True


# ---- Layouts: (the network, another one) -> what the file holds ----------------------
def moco(resnet, other):
    """Of version 2, with --mlp."""
    model = named(encoder_q=with_head(resnet), encoder_k=with_head(other))
    model.register_buffer("queue", torch.randn(16, 32))
    return training_file(state_dict=named(module=model).state_dict())


def moco_v3(resnet, other):
    model = named(
        base_encoder=with_head(resnet),
        momentum_encoder=with_head(other),
        predictor=two_layers(),
    )
    return training_file(state_dict=named(module=model).state_dict())


def swav(resnet, other):
    """Its heads are attributes of the ResNet itself."""
    resnet = copy.deepcopy(resnet)
    del resnet.fc
    resnet.projection_head = two_layers()
    resnet.prototypes = nn.Linear(16, 30, bias=False)
    return training_file(state_dict=named(module=resnet).state_dict())


def dino(resnet, other):
    """Both are wrapped by DistributedDataParallel where there is batch norm."""

    def network(trunk):
        trunk = copy.deepcopy(trunk)
        trunk.fc = nn.Identity()
        head = named(mlp=two_layers(), last_layer=nn.Linear(16, 8))
        return named(module=named(backbone=trunk, head=head)).state_dict()

    return training_file(student=network(other), teacher=network(resnet))


def solo_learn(resnet, other):
    """A checkpoint of Lightning; here of a method with a momentum encoder."""
    model = named(
        backbone=with_head(resnet),
        classifier=nn.Linear(64, 10),
        momentum_backbone=with_head(other),
        momentum_projector=two_layers(),
    )
    return training_file(state_dict=model.state_dict())


def supcontrast(resnet, other):
    """DataParallel wraps the encoder inside the model."""
    encoder = named(module=with_head(resnet))
    model = named(encoder=encoder, head=two_layers()).state_dict()
    renamed = {name.replace("downsample", "shortcut"): model[name] for name in model}
    assert "encoder.module.layer2.0.shortcut.0.weight" in renamed
    return training_file(model=renamed)


def lightly(resnet, other):
    """Its examples put the ResNet's children but for the last into a Sequential."""
    model = named(
        backbone=nn.Sequential(*list(resnet.children())[:-1]),
        projection_head=named(layers=two_layers()),
        backbone_momentum=nn.Sequential(*list(other.children())[:-1]),
    )
    assert "backbone.4.0.conv1.weight" in model.state_dict()
    return model.state_dict()


def lightly_teacher(resnet, other):
    """Its example of DINO."""
    teacher = nn.Sequential(*list(resnet.children())[:-1])
    student = nn.Sequential(*list(other.children())[:-1])
    return named(student_backbone=student, teacher_backbone=teacher).state_dict()


def byol(resnet, other):
    """Of lucidrains: BYOL(resnet).state_dict()."""
    return named(net=resnet, target_encoder=named(net=other)).state_dict()


def timm(resnet, other):
    return resnet.state_dict()


def timm_s_trainer(resnet, other):
    """It saves the average as state_dict_ema."""
    return {"state_dict": resnet.state_dict(), "state_dict_ema": other.state_dict()}


def query_and_key(resnet, other):
    return named(query=resnet, key=other).state_dict()


def nested(resnet, other):
    """The state dict lies two dicts deep, beside tensors that are of no trunk."""
    shadow = {0: torch.zeros(64, 3, 7, 7)}
    model = named(trunk=resnet, bn1=nn.BatchNorm1d(64))
    inside = {"shadow": shadow, "weights": model.state_dict()}
    return training_file(config={"lr": 1.0}, model=inside)


LAYOUTS = {  # the entry of the file, and what the names of the weights begin with
    moco: ("state_dict", "module.encoder_q."),
    moco_v3: ("state_dict", "module.base_encoder."),
    swav: ("state_dict", "module."),
    dino: ("teacher", "module.backbone."),
    solo_learn: ("state_dict", "backbone."),
    supcontrast: ("model", "encoder.module."),
    lightly: ("", "backbone."),
    lightly_teacher: ("", "teacher_backbone."),
    byol: ("", "net."),
    timm: ("", ""),
    timm_s_trainer: ("state_dict", ""),
    query_and_key: ("", "query."),
    nested: ("model.weights", "trunk."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_the_trunk_arrives(tmp_path, capsys, layout):
    """And notes say where it was found. SwAV's file is as torch before 1.6 wrote it."""
    resnet = make_resnet(1)
    path = tmp_path / "other.pth"
    content = layout(resnet, make_resnet(2))
    torch.save(content, path, _use_new_zipfile_serialization=layout is not swav)

    found, weights = read_weights(str(path), tmp_path)
    assert found == path
    assert same_trunk(weights["trunk"], resnet)
    assert weights["settings"] == {}
    entry, prefix = LAYOUTS[layout]
    notes = [f'using the entry "{entry}" of the file'] if entry else []
    if prefix:
        notes.append(f'using the weights whose names begin with "{prefix}"')
    assert capsys.readouterr().out.splitlines() == notes


def test_safetensors(tmp_path, monkeypatch):
    """As timm and the Hugging Face hub have them. The package need not be here."""
    resnet = make_resnet(1)
    path = tmp_path / "model.safetensors"
    torch.save(named(backbone=resnet).state_dict(), path)
    package = types.ModuleType("safetensors.torch")
    package.load_file = torch.load
    monkeypatch.setitem(sys.modules, "safetensors", types.ModuleType("safetensors"))
    monkeypatch.setitem(sys.modules, "safetensors.torch", package)
    _, weights = read_weights("model.safetensors", tmp_path)
    assert same_trunk(weights["trunk"], resnet)

    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(
        UserError, match=r"is damaged or not a safetensors file .*: use"
    ):
        read_weights(str(path), tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match=f"{path} .*: pip install safetensors"):
        read_weights(str(path), tmp_path)


# ---- Which network it is -------------------------------------------------------------
def tensors_of(network):
    """A state dict of the right shapes, which takes no memory."""
    state_dict = network.state_dict()
    return {name: torch.zeros(()).expand(v.shape) for name, v in state_dict.items()}


@pytest.mark.full_trunk
@pytest.mark.parametrize("model_type", ["res18", "res34", "res50"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_a_trunk_shows_what_it_is(model_type, stem):
    with torch.device("meta"):  # the shapes are enough
        trunk, _ = make_trunk(model_type, stem)
    state_dict = trunk.state_dict()
    assert model_type_of(state_dict) == model_type
    assert stem_of(state_dict) == stem


def with_first_convolution(*shape):
    def make_network():
        resnet = torchvision.models.resnet18()
        resnet.conv1 = nn.Conv2d(*shape)
        return resnet

    return make_network


@pytest.mark.parametrize(
    ("make_network", "name"),
    [
        (torchvision.models.resnet101, "it is a ResNet-101"),
        (torchvision.models.resnet152, "it is a ResNet-152"),
        (torchvision.models.wide_resnet101_2, "it is a wide ResNet"),
        (torchvision.models.resnext50_32x4d, "it is a ResNeXt"),
        (with_first_convolution(1, 64, 7), "its images have 1 channels"),
        (with_first_convolution(3, 64, 5), "its first convolution is 5 × 5"),
        (ThinResNet, "it is a ResNet of basic blocks, [1, 1, 1, 1]"),
    ],
)
def test_other_networks_are_named(tmp_path, monkeypatch, make_network, name):
    monkeypatch.delitem(weights_module.OUR_MODEL_TYPES, THIN_SHAPE)
    with torch.device("meta"):
        network = make_network()
    path = tmp_path / "other.pth"
    torch.save(tensors_of(network), path)
    path, weights = read_weights(str(path), tmp_path)
    args = argparse.Namespace(model_type=None, stem=None, image_size=None)
    with pytest.raises(UserError, match=re.escape(name)) as error:
        choose_architecture(args, path, weights)
    assert f"{path} does not fit" in str(error.value)
    assert str(error.value).endswith(": give a ResNet-18, -34 or -50 for RGB images")


def choice(weights, **given):
    flags = dict.fromkeys(("model_type", "stem", "image_size"))
    args = argparse.Namespace(**{**flags, **given})
    choose_architecture(args, "exp.pt", weights)
    return args.model_type, args.stem, args.image_size


OURS = {"settings": {"model_type": "res34", "stem": "small", "image_size": 64}}


@pytest.mark.parametrize(
    ("given", "size", "note"),
    [
        ({}, 64, ""),
        ({"model_type": "res34", "stem": "small", "image_size": 64}, 64, ""),
        (
            {"image_size": 48},
            48,
            "note: exp.pt was trained with --image-size 64, 48 is used\n",
        ),
    ],
)
def test_the_network_of_our_file_is_taken(capsys, given, size, note):
    assert choice(OURS, **given) == ("res34", "small", size)
    assert capsys.readouterr().out == note


def test_the_network_of_another_project_s_file_is_taken(capsys):
    with torch.device("meta"):
        trunk, _ = make_trunk("res50", "small")
    weights = {"settings": {}, "trunk": trunk.state_dict()}
    assert choice(weights) == ("res50", "small", 96)
    assert "exp.pt does not say for which size" in capsys.readouterr().out
    assert choice(weights, image_size=64) == ("res50", "small", 64)
    assert capsys.readouterr().out == ""
    assert architecture_of("exp.pt", weights) == Architecture("res50", "small", None)


def test_without_a_file_there_are_defaults():
    assert choice({}) == ("res18", "imagenet", 96)
    given = {"model_type": "res50", "stem": "small", "image_size": 36}
    assert choice({}, **given) == ("res50", "small", 36)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_type": "res18"}, "exp.pt is of --model-type res34, not res18: leave"),
        ({"model_type": "res50"}, "exp.pt is of --model-type res34, not res50: leave"),
        ({"stem": "imagenet"}, "exp.pt is of --stem small, not imagenet: leave"),
    ],
)
def test_a_flag_that_contradicts_the_file_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        choice(OURS, **given)


# ---- Whole runs ----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layout", "stem"), [(moco, "imagenet"), (supcontrast, "small")]
)
def test_fine_tuning_starts_from_another_project(call, tiny, tmp_path, layout, stem):
    """Its stem need not be said. In the softmax stage the trunk stays as it is."""
    resnet = make_resnet(1, stem)
    path = tmp_path / "other.pth.tar"
    torch.save(layout(resnet, make_resnet(2, stem)), path)
    run = ("--pirl-model-name", path, "--experiment-name", "exp")
    outcome = call("train_stl_after_ssl", *tiny, *run)
    assert outcome.status == 0, outcome.err
    assert f"trunk of another project ({path})" in outcome.out
    saved = torch.load(tmp_path / "weights/exp.pt", weights_only=True)
    assert same_trunk(saved["trunk"], resnet)
    assert saved["settings"]["stem"] == stem


def test_images_are_normalised_as_for_the_trunk(call, tiny, tmp_path, monkeypatch):
    """In both stages, when they are resumed, and by the models that come of them."""
    seen = []

    def noting(function):
        def note(*arguments):
            seen.append(arguments[-2:])
            return function(*arguments)

        return note

    monkeypatch.setattr(evaluation, "normalize", noting(evaluation.normalize))
    monkeypatch.setattr(
        augmentations, "LabelledView", noting(augmentations.LabelledView)
    )
    transforms = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    imagenet = (tuple(transforms.mean), tuple(transforms.std))
    own = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    torch.save(make_resnet(1).state_dict(), tmp_path / "torchvision.pth")
    state_dict = {"model": make_resnet(1).state_dict()}
    content = state_dict | {"pixel_mean": own[0], "pixel_std": own[1]}
    torch.save(content, tmp_path / "own.pth")
    write_image(tmp_path / "a.png", 0)

    def pixels_of(script, *flags):
        seen.clear()
        outcome = call(script, *flags)
        assert outcome.status == 0, outcome.err
        return set(seen)

    def tune(*flags):
        return pixels_of("train_stl_after_ssl", *tiny, "--epochs", 1, *flags)

    for file, pixels in (("torchvision.pth", imagenet), ("own.pth", own)):
        name = f"from_{file}"
        run = ("--experiment-name", name, "--pirl-model-name", tmp_path / file)
        assert tune(*run) == {pixels}
        assert tune(*run, "--resume", "--full-fine-tune") == {pixels}
        saved = torch.load(tmp_path / f"weights/{name}.pt", weights_only=True)
        assert (saved["pixel_mean"], saved["pixel_std"]) == pixels

        for kind in ("pt", "ckpt"):
            model = tmp_path / f"weights/{name}.{kind}"
            second = ("--experiment-name", f"{name}_{kind}")
            assert tune(*second, "--pirl-model-name", model) == {pixels}
            assert tune("--evaluate", "--pirl-model-name", model) == {pixels}
            extraction = ("--model", model, "--images", tmp_path / "a.png")
            out = ("--out", tmp_path / "f.npz", "--device", "cpu")
            assert pixels_of("extract_features", *extraction, *out) == {pixels}


def test_pretraining_starts_from_another_project(call, tiny, tmp_path):
    resnet = make_resnet(1)
    path = tmp_path / "lightly.pth"
    torch.save(lightly(resnet, make_resnet(2)), path)
    run = ("--pirl-model-name", path, "--epochs", 1, "--lr", 0)
    outcome = call("pirl_stl_train_test", *tiny, *run, "--experiment-name", "exp")
    assert outcome.status == 0, outcome.err
    saved = torch.load(tmp_path / "weights/exp.pt", weights_only=True)
    for name, _ in resnet.named_parameters():
        if not name.startswith("fc."):
            expected = resnet.state_dict()[name]
            assert torch.equal(saved["trunk"][name], expected), name


# ---- What cannot be used -------------------------------------------------------------
def refusal(path, content):
    """The line by which a file with this content is refused."""
    torch.save(content, path)
    with pytest.raises(UserError) as error:
        read_weights(str(path), path.parent)
    line = str(error.value)
    assert str(path) in line
    assert "\n" not in line
    return line


def test_several_networks_without_a_preference_are_named(tmp_path):
    path = tmp_path / "a.pth"
    state_dict = named(left=make_resnet(1), right=make_resnet(2)).state_dict()
    assert "2 ResNets (left., right.)" in refusal(path, state_dict)
    line = refusal(path, {"state_dict": state_dict})
    assert "2 ResNets (state_dict left., state_dict right.)" in line
    seconds = named(momentum_a=make_resnet(1), momentum_b=make_resnet(2))
    assert "momentum_a., momentum_b." in refusal(path, seconds.state_dict())


def test_a_second_encoder_alone_is_used(tmp_path):
    """There is nothing to prefer to it."""
    resnet = make_resnet(1)
    path = tmp_path / "a.pth"
    torch.save(named(momentum_encoder=resnet).state_dict(), path)
    _, weights = read_weights(str(path), tmp_path)
    assert same_trunk(weights["trunk"], resnet)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "it holds no ResNet; its keys are"),
        ({"state_dict": {}}, "its keys are state_dict"),
        ({"patch_embed.weight": torch.zeros(8)}, "its keys are patch_embed.weight"),
        (dict.fromkeys(range(99)), "its keys are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)"),
        ({"conv1.weight": "no tensor"}, "its keys are conv1.weight"),
        ([torch.zeros(1)], "'list'"),
        (torch.zeros(1), "does not fit"),
        ({"trunk": {}, "settings": None}, "does not fit"),
    ],
    ids=range(8),
)
def test_a_file_without_a_resnet_says_what_it_has(tmp_path, content, says):
    line = refusal(tmp_path / "a.pth", content)
    assert says in line
    assert "torchvision's names" in line


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["layer4.0.conv2.weight", "bn1.running_var"])
def test_a_number_that_is_not_finite_is_refused(tmp_path, number, name):
    """By file and tensor. In a network that is not used it does not matter."""
    content = moco(make_resnet(1), make_resnet(2))
    state_dict = content["state_dict"]
    state_dict[f"module.encoder_k.{name}"].view(-1)[-1] = number
    path = tmp_path / "a.pth"
    torch.save(content, path)
    read_weights(str(path), tmp_path)

    state_dict[f"module.encoder_q.{name}"].view(-1)[-1] = number
    line = refusal(path, content)
    assert line == (
        f"{path} has numbers that are not finite (trunk, {name}): use another file"
    )


@pytest.mark.parametrize("part", ["trunk", "head_f", "head_g", "softmax_layer"])
def test_a_number_that_is_not_finite_in_our_own_file(tmp_path, part):
    parts = ("trunk", "head_f", "head_g", "softmax_layer")
    content = {name: nn.Linear(2, 2).state_dict() for name in parts}
    content["settings"] = {}
    content[part]["bias"][1] = float("nan")
    assert f"not finite ({part}, bias)" in refusal(tmp_path / "a.pt", content)


# ---- Our own files -------------------------------------------------------------------
def test_what_is_used_of_a_file_and_what_is_not_is_said(capsys):
    names = ("trunk", "head_f", "head_g")
    weights = {name: nn.Linear(2, 2).state_dict() for name in names}
    modules = {name: nn.Linear(2, 2) for name in names}
    load_weights(modules, weights, "exp.pt")
    for name in names:
        assert torch.equal(modules[name].weight, weights[name]["weight"])
    assert capsys.readouterr().out == "using trunk, head_f, head_g of exp.pt\n"

    load_weights({"trunk": nn.Linear(2, 2)}, weights, "exp.pt")
    assert capsys.readouterr().out == "using trunk of exp.pt, not head_f, head_g\n"
    with pytest.raises(
        UserError, match=r"exp.pt does not fit .*: give the --model-typ"
    ):
        load_weights({"trunk": nn.Linear(3, 2)}, weights, "exp.pt")


def test_a_checkpoint_says_that_it_is_one(call, tiny, finished, tmp_path):
    """Its batch-norm statistics are of crops; and its history lies elsewhere."""
    finished("exp")
    folder = tmp_path / "weights"
    _, model = read_weights("exp", folder)
    _, checkpoint = read_weights("exp.ckpt", folder)
    assert not model["from_checkpoint"]
    assert checkpoint["from_checkpoint"]
    assert model["history"] == checkpoint["history"]
    assert [row["epoch"] for row in model["history"]] == [1, 2]
    assert model["kind"] == "PIRL weights"
    for content in (model, checkpoint):
        assert content["settings"]["image_size"] == 36
        assert {"trunk", "head_f", "head_g"} <= content.keys()


def test_weights_of_other_heads(pretrain, finished):
    finished("exp")
    outcome = pretrain("new", "--pirl-model-name", "exp", "--non-linear-head")
    assert outcome.is_one_line_error("exp.pt", "--non-linear-head")


def test_where_weights_are_looked_for(tmp_path, monkeypatch):
    """A folder of the model's name is not in the way: so images are often called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = Path("weights")
    paths = ["weights/a.pt", "weights/a.ckpt", "weights/b.ckpt", "home/c.pt"]
    for path in (*paths, "both.pt", "weights/both.pt"):
        trunk = {"conv1.weight": torch.zeros(1)}
        atomic_save({"trunk": trunk, "settings": {"path": path}}, tmp_path / path)
    (tmp_path / "a").mkdir()
    shutil.copy("weights/b.ckpt", "here.ckpt")

    for name, path, content in (
        ("weights/a.pt", "weights/a.pt", "weights/a.pt"),
        ("a.pt", "weights/a.pt", "weights/a.pt"),
        ("a", "weights/a.pt", "weights/a.pt"),
        ("both.pt", "both.pt", "both.pt"),
        ("b", "weights/b.ckpt", "weights/b.ckpt"),
        ("here.ckpt", "here.ckpt", "weights/b.ckpt"),
        ("~/c.pt", tmp_path / "home/c.pt", "home/c.pt"),
    ):
        found, weights = read_weights(name, folder)
        assert found == Path(path)
        assert weights["settings"] == {"path": content}
    with pytest.raises(UserError, match=r"there is no model c .*c\.pt.*: check"):
        read_weights("c", folder)
