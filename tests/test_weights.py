"""Weights to start from: our own files, and those of other projects.

Each layout of another project is as its own code writes it.
"""

import argparse
import copy
import json
import re
import shutil
import sys
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ThinResNet
from torch import nn

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


def with_head(resnet, *layers):
    resnet = copy.deepcopy(resnet)
    resnet.fc = nn.Sequential(*layers)
    return resnet


def two_layers():
    return nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)


def optimizer_state():
    """Tensors that are no weights: they must not be taken for any."""
    momentum = {"momentum_buffer": torch.zeros(64, 3, 7, 7)}
    return {"state": {0: momentum}, "param_groups": [{"lr": 0.03, "params": [0]}]}


def same_trunk(found, resnet):
    expected = trunk_of(resnet)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    return True


def names_prefix(text, prefix):
    """Whether the text has the prefix, and not a longer one that ends with it."""
    return re.search(rf"(?<![\w.]){re.escape(prefix)}", text) is not None


# ---- Layouts: (the network, another one) -> what the file holds ----------------------
def moco(resnet, other):
    """Of version 2, with --mlp: fc.0 and fc.2 instead of fc."""
    first = with_head(resnet, *two_layers())
    second = with_head(other, *two_layers())
    model = named(encoder_q=first, encoder_k=second)
    model.register_buffer("queue", torch.randn(16, 32))
    model.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
    return {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": named(module=model).state_dict(),
        "optimizer": optimizer_state(),
    }


def moco_v3(resnet, other):
    def head():
        return nn.Linear(64, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU()

    model = named(
        base_encoder=with_head(resnet, *head()),
        momentum_encoder=with_head(other, *head()),
        predictor=nn.Sequential(*head()),
    )
    return {
        "epoch": 100,
        "arch": "resnet18",
        "state_dict": named(module=model).state_dict(),
        "optimizer": optimizer_state(),
        "scaler": {"scale": 65536.0},
    }


def swav_network(resnet):
    """Its heads are attributes of the ResNet itself."""
    resnet = copy.deepcopy(resnet)
    del resnet.fc
    resnet.projection_head = nn.Sequential(*two_layers())
    resnet.prototypes = nn.Linear(16, 30, bias=False)
    return resnet


def swav(resnet, other):
    model = named(module=swav_network(resnet))
    return {
        "epoch": 400,
        "state_dict": model.state_dict(),
        "optimizer": optimizer_state(),
    }


def dino(resnet, other):
    """Both are wrapped by DistributedDataParallel where there is batch norm."""

    def network(trunk):
        trunk = copy.deepcopy(trunk)
        trunk.fc = nn.Identity()
        head = named(mlp=nn.Sequential(*two_layers()), last_layer=nn.Linear(16, 8))
        return named(module=named(backbone=trunk, head=head))

    return {
        "student": network(other).state_dict(),
        "teacher": network(resnet).state_dict(),
        "optimizer": optimizer_state(),
        "epoch": 100,
        "dino_loss": {"center": torch.zeros(1, 8)},
    }


def dino_published(resnet, other):
    """The pretrained backbone alone, without its last layer."""
    return OrderedDict(trunk_of(resnet))


def solo_learn(resnet, other):
    """A checkpoint of Lightning; here of a method with a momentum encoder."""
    backbone = with_head(resnet)
    momentum = with_head(other)
    model = named(
        backbone=backbone,
        classifier=nn.Linear(64, 10),
        momentum_backbone=momentum,
        momentum_classifier=nn.Linear(64, 10),
        projector=nn.Sequential(*two_layers()),
        momentum_projector=nn.Sequential(*two_layers()),
    )
    return {
        "epoch": 99,
        "global_step": 1000,
        "pytorch-lightning_version": "2.0.0",
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer_state()],
        "hyper_parameters": {"method": "byol"},
    }


def supcontrast(resnet, other):
    model = named(encoder=with_head(resnet), head=nn.Sequential(*two_layers()))
    state_dict = {
        name.replace("downsample", "shortcut"): value
        for name, value in model.state_dict().items()
    }
    return {"model": state_dict, "optimizer": optimizer_state(), "epoch": 1000}


def supcontrast_on_several_gpus(resnet, other):
    """DataParallel wraps the encoder inside the model."""
    content = supcontrast(named(module=with_head(resnet)), other)
    assert "encoder.module.layer2.0.shortcut.0.weight" in content["model"]
    return content


def lightly(resnet, other):
    """Its examples put the ResNet's children but for the last into a Sequential."""

    def backbone(resnet):
        return nn.Sequential(*list(resnet.children())[:-1])

    model = named(
        backbone=backbone(resnet),
        projection_head=named(layers=nn.Sequential(*two_layers())),
        backbone_momentum=backbone(other),
        projection_head_momentum=named(layers=nn.Sequential(*two_layers())),
    )
    assert "backbone.4.0.conv1.weight" in model.state_dict()
    return model.state_dict()


def lightly_teacher(resnet, other):
    """Its example of DINO."""
    teacher = nn.Sequential(*list(resnet.children())[:-1])
    student = nn.Sequential(*list(other.children())[:-1])
    return named(student_backbone=student, teacher_backbone=teacher).state_dict()


def lightly_with_names(resnet, other):
    resnet = with_head(resnet)
    return named(backbone=resnet, projection_head=nn.Linear(64, 8)).state_dict()


def timm(resnet, other):
    return resnet.state_dict()


def compiled_data_parallel(resnet, other):
    return {"model": named(_orig_mod=named(module=resnet)).state_dict()}


def byol(resnet, other):
    """Of lucidrains: BYOL(resnet).state_dict()."""
    model = named(
        net=resnet,
        target_encoder=named(net=other, projector=nn.Linear(64, 8)),
    )
    return model.state_dict()


def nested(resnet, other):
    """The state dict lies two dicts deep, beside tensors that are of no trunk."""
    shadow = {0: torch.zeros(64, 3, 7, 7)}
    model = named(trunk=resnet, bn1=nn.BatchNorm1d(64))
    inside = {"shadow": shadow, "weights": model.state_dict()}
    return {"config": {"lr": 1.0}, "model": inside, "optimizer": optimizer_state()}


def two_copies(resnet, other):
    """timm's trainer saves the average as state_dict_ema."""
    return {"state_dict": resnet.state_dict(), "state_dict_ema": other.state_dict()}


LAYOUTS = [  # and what the names of the weights begin with
    (moco, "module.encoder_q."),
    (moco_v3, "module.base_encoder."),
    (swav, "module."),
    (dino, "module.backbone."),
    (dino_published, ""),
    (solo_learn, "backbone."),
    (supcontrast, "encoder."),
    (supcontrast_on_several_gpus, "encoder.module."),
    (lightly, "backbone."),
    (lightly_teacher, "teacher_backbone."),
    (lightly_with_names, "backbone."),
    (timm, ""),
    (two_copies, ""),
    (nested, "trunk."),
    (compiled_data_parallel, "_orig_mod.module."),
    (byol, "net."),
]


@pytest.mark.parametrize(
    ("layout", "prefix"), LAYOUTS, ids=[layout.__name__ for layout, _ in LAYOUTS]
)
def test_every_tensor_of_the_trunk_arrives(tmp_path, capsys, layout, prefix):
    """And a note says where it was found."""
    resnet = make_resnet(1)
    content = layout(resnet, make_resnet(2))
    path = tmp_path / "other.pth"
    torch.save(content, path)

    found, weights = read_weights(str(path), tmp_path)
    assert found == path
    assert same_trunk(weights["trunk"], resnet)
    assert weights["settings"] == {}
    notes = capsys.readouterr().out
    assert names_prefix(notes, prefix)
    for key in ("teacher", "state_dict", "model"):
        if key in content:
            entry = "model.weights" if layout is nested else key
            assert f'using the entry "{entry}" of the file' in notes


def test_files_of_torch_before_1_6(tmp_path):
    """They are no zip archives."""
    resnet = make_resnet(1)
    path = tmp_path / "old.pth.tar"
    content = moco(resnet, make_resnet(2))
    torch.save(content, path, _use_new_zipfile_serialization=False)
    _, weights = read_weights(str(path), tmp_path)
    assert same_trunk(weights["trunk"], resnet)


# ---- .safetensors --------------------------------------------------------------------
def write_safetensors(path, tensors):
    """By hand: the header's length, the header in JSON, then the bytes."""
    header = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, value in tensors.items():
        content = value.contiguous().numpy().tobytes()
        kind = {torch.float32: "F32", torch.int64: "I64"}[value.dtype]
        places = [len(data), len(data) + len(content)]
        header[name] = {
            "dtype": kind,
            "shape": list(value.shape),
            "data_offsets": places,
        }
        data += content
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def read_by_hand(path):
    """In the place of safetensors.torch.load_file, which need not be installed."""
    content = Path(path).read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    header.pop("__metadata__")
    tensors = {}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        dtype = {"F32": torch.float32, "I64": torch.int64}[entry["dtype"]]
        buffer = bytearray(content[begin + first : begin + last])
        tensors[name] = torch.frombuffer(buffer, dtype=dtype).reshape(entry["shape"])
    return tensors


@pytest.fixture
def safetensors(monkeypatch):
    """The package, or, where it is missing, what our code needs of it."""
    try:
        import safetensors.torch  # noqa: F401
    except ImportError:
        stand_in = types.ModuleType("safetensors.torch")
        stand_in.load_file = read_by_hand
        package = types.ModuleType("safetensors")
        monkeypatch.setitem(sys.modules, "safetensors", package)
        monkeypatch.setitem(sys.modules, "safetensors.torch", stand_in)


def test_safetensors(tmp_path, safetensors):
    """As timm and the Hugging Face hub have them."""
    resnet = make_resnet(1)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, named(backbone=resnet).state_dict())
    _, weights = read_weights("model.safetensors", tmp_path)
    assert same_trunk(weights["trunk"], resnet)

    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"is damaged or no safetensors file .*: use"):
        read_weights(str(path), tmp_path)


def test_safetensors_without_its_package(call, tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, make_resnet(1).state_dict())
    outcome = call("train_stl_after_ssl", *tiny, "--pirl-model-name", path)
    assert outcome.is_one_line_error(path, "pip install safetensors")


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


def gray_resnet():
    resnet = ThinResNet()
    resnet.conv1 = nn.Conv2d(1, 64, 7)
    return resnet


def resnet_with_another_stem():
    resnet = torchvision.models.resnet18()
    resnet.conv1 = nn.Conv2d(3, 64, 5)
    return resnet


@pytest.mark.parametrize(
    ("make_network", "name"),
    [
        (torchvision.models.resnet101, "it is a ResNet-101"),
        (torchvision.models.resnet152, "it is a ResNet-152"),
        (torchvision.models.wide_resnet50_2, "it is a wide ResNet"),
        (torchvision.models.wide_resnet101_2, "it is a wide ResNet"),
        (torchvision.models.resnext50_32x4d, "it is a ResNeXt"),
        (torchvision.models.resnext101_64x4d, "it is a ResNeXt"),
        (gray_resnet, "its images have 1 channels"),
        (resnet_with_another_stem, "its first convolution is 5 × 5"),
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


@pytest.mark.parametrize(
    ("given", "chosen", "note"),
    [
        ({}, ("res34", "small", 64), ""),
        (
            {"model_type": "res34", "stem": "small", "image_size": 48},
            ("res34", "small", 48),
            "note: exp.pt was trained with --image-size 64, 48 is used\n",
        ),
        ({"image_size": 64}, ("res34", "small", 64), ""),
    ],
)
def test_the_network_of_our_file_is_taken(capsys, given, chosen, note):
    settings = {"model_type": "res34", "stem": "small", "image_size": 64}
    assert choice({"settings": settings}, **given) == chosen
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
        ({"stem": "imagenet"}, "exp.pt is of --stem small, not imagenet: leave"),
    ],
)
def test_a_flag_that_contradicts_the_file_is_refused(given, message):
    settings = {"model_type": "res34", "stem": "small", "image_size": 64}
    with pytest.raises(UserError, match=message):
        choice({"settings": settings}, **given)


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


def test_a_file_without_a_resnet_in_a_run(call, tiny, tmp_path):
    path = tmp_path / "vit.pth"
    torch.save({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, path)
    for script in ("train_stl_after_ssl", "pirl_stl_train_test"):
        outcome = call(script, *tiny, "--pirl-model-name", path)
        assert outcome.is_one_line_error(path, "holds no ResNet", "patch_embed")
        outcome = call(script, *tiny, "--pirl-model-name", "nowhere")
        assert outcome.is_one_line_error("there is no model nowhere", "nowhere.ckpt")


def test_a_resnet_of_other_widths_is_refused_by_its_tensors(call, tiny, tmp_path):
    content = trunk_of(make_resnet(1))
    content["layer4.0.bn2.weight"] = torch.ones(65)
    path = tmp_path / "odd.pth"
    torch.save(content, path)
    outcome = call("train_stl_after_ssl", *tiny, "--pirl-model-name", path)
    assert outcome.is_one_line_error(path, "layer4.0.bn2.weight", "--model-type")


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


def test_weights_of_another_architecture(call, tiny, finished):
    finished("exp")
    run = ("--model-type", "res34", "--pirl-model-name", "exp")
    outcome = call("train_stl_after_ssl", *tiny, *run)
    assert outcome.is_one_line_error("exp.pt", "--model-type")
    warm = ("--pirl-model-name", "exp", "--experiment-name", "new")
    outcome = call("pirl_stl_train_test", *tiny, *warm, "--non-linear-head")
    assert outcome.is_one_line_error("exp.pt", "--non-linear-head")


def test_where_weights_are_looked_for(tmp_path, monkeypatch):
    """A folder of the model's name is not in the way: so images are often called."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    folder = Path("weights")
    for path in ("weights/a.pt", "weights/a.ckpt", "weights/b.ckpt", "home/c.pt"):
        trunk = {"conv1.weight": torch.zeros(1)}
        atomic_save({"trunk": trunk, "settings": {"path": path}}, tmp_path / path)
    (tmp_path / "a").mkdir()
    shutil.copy("weights/b.ckpt", "here.ckpt")

    for name, path, content in (
        ("weights/a.pt", "weights/a.pt", "weights/a.pt"),
        ("a.pt", "weights/a.pt", "weights/a.pt"),
        ("a", "weights/a.pt", "weights/a.pt"),
        ("b", "weights/b.ckpt", "weights/b.ckpt"),
        ("here.ckpt", "here.ckpt", "weights/b.ckpt"),
        ("~/c.pt", tmp_path / "home/c.pt", "home/c.pt"),
    ):
        found, weights = read_weights(name, folder)
        assert found == Path(path)
        assert weights["settings"] == {"path": content}
    with pytest.raises(UserError, match=r"there is no model c .*c\.pt.*: check"):
        read_weights("c", folder)
