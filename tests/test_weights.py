"""Other projects' checkpoints as a start: each layout as its own code writes it."""

import argparse
import copy
import re
from collections import OrderedDict

import numpy as np
import pytest
import torch
from conftest import ThinResNet
from torch import nn

import hubconf
from models import make_trunk
from runtime.errors import UserError
from runtime.files import read_torch_file
from runtime.weights import find_trunk, model_type_of, read_weights, stem_of


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
def moco_v1(resnet, other):
    model = named(encoder_q=resnet, encoder_k=other)
    model.register_buffer("queue", torch.randn(16, 32))
    model.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
    return {
        "epoch": 200,
        "arch": "resnet18",
        "state_dict": named(module=model).state_dict(),
        "optimizer": optimizer_state(),
    }


def moco_v2(resnet, other):
    # --mlp: fc.0 and fc.2 instead of fc.
    return moco_v1(with_head(resnet, *two_layers()), with_head(other, *two_layers()))


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


def swav_published(resnet, other):
    return named(module=swav_network(resnet)).state_dict()


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


def dino_without_ddp(resnet, other):
    content = dino(resnet, other)
    teacher = content["teacher"]
    content["teacher"] = {
        name.removeprefix("module."): value for name, value in teacher.items()
    }
    return content


def dino_published(resnet, other):
    """The pretrained backbone alone, without its last layer."""
    return OrderedDict(trunk_of(resnet))


def simclr(resnet, other):
    """Of sthalles."""
    model = named(backbone=with_head(resnet, *two_layers()))
    return {
        "epoch": 100,
        "arch": "resnet18",
        "state_dict": model.state_dict(),
        "optimizer": optimizer_state(),
    }


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


def lightly_by_lightning(resnet, other):
    return {"state_dict": lightly(resnet, other), "hyper_parameters": {}}


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


def timm_checkpoint(resnet, other):
    return {"epoch": 3, "arch": "resnet18", "state_dict": resnet.state_dict()}


def compiled(resnet, other):
    return named(_orig_mod=resnet).state_dict()


def data_parallel(resnet, other):
    return named(module=resnet).state_dict()


def compiled_data_parallel(resnet, other):
    return {"model": named(_orig_mod=named(module=resnet)).state_dict()}


def barlow_twins(resnet, other):
    model = named(
        backbone=with_head(resnet),
        projector=nn.Sequential(*two_layers()),
        bn=nn.BatchNorm1d(16, affine=False),
    )
    state_dict = named(module=model).state_dict()
    return {"epoch": 10, "model": state_dict, "optimizer": optimizer_state()}


def vicreg(resnet, other):
    model = named(backbone=with_head(resnet), projector=nn.Sequential(*two_layers()))
    state_dict = named(module=model).state_dict()
    return {"epoch": 10, "model": state_dict, "optimizer": optimizer_state()}


def finished_backbone(resnet, other):
    """resnet50.pth, which Barlow Twins and VICReg write at the end of a training."""
    return with_head(resnet).state_dict()


def byol(resnet, other):
    """Of lucidrains: BYOL(resnet).state_dict()."""
    model = named(
        net=resnet,
        target_encoder=named(net=other, projector=nn.Linear(64, 8)),
    )
    return model.state_dict()


LAYOUTS = [  # and what the names of the weights begin with
    (moco_v1, "module.encoder_q."),
    (moco_v2, "module.encoder_q."),
    (moco_v3, "module.base_encoder."),
    (swav, "module."),
    (swav_published, "module."),
    (dino, "module.backbone."),
    (dino_without_ddp, "backbone."),
    (dino_published, ""),
    (simclr, "backbone."),
    (solo_learn, "backbone."),
    (supcontrast, "encoder."),
    (supcontrast_on_several_gpus, "encoder.module."),
    (lightly, "backbone."),
    (lightly_by_lightning, "backbone."),
    (lightly_teacher, "teacher_backbone."),
    (lightly_with_names, "backbone."),
    (timm, ""),
    (timm_checkpoint, ""),
    (compiled, "_orig_mod."),
    (data_parallel, "module."),
    (compiled_data_parallel, "_orig_mod.module."),
    (barlow_twins, "module.backbone."),
    (vicreg, "module.backbone."),
    (finished_backbone, ""),
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
            assert key in notes


@pytest.mark.parametrize("layout", [moco_v2, swav])
def test_files_of_torch_before_1_6(tmp_path, layout):
    """They are no zip archives."""
    resnet = make_resnet(1)
    path = tmp_path / "old.pth.tar"
    content = layout(resnet, make_resnet(2))
    torch.save(content, path, _use_new_zipfile_serialization=False)
    _, weights = read_weights(str(path), tmp_path)
    assert same_trunk(weights["trunk"], resnet)


@pytest.mark.full_trunk
@pytest.mark.parametrize("model_type", ["res18", "res34", "res50"])
@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_a_trunk_shows_what_it_is(model_type, stem):
    with torch.device("meta"):  # the shapes are enough
        trunk, _ = make_trunk(model_type, stem)
    state_dict = trunk.state_dict()
    assert model_type_of(state_dict) == model_type
    assert stem_of(state_dict) == stem


@pytest.mark.parametrize(("layout", "key"), [(dino, "args"), (supcontrast, "opt")])
def test_the_flags_that_projects_save_beside_the_weights(tmp_path, layout, key):
    """An argparse.Namespace, which is plain values; timm has one as well."""
    resnet = make_resnet(1)
    content = layout(resnet, make_resnet(2))
    content[key] = argparse.Namespace(arch="resnet18", lr=0.1, crops=[0.4, 1.0])
    path = tmp_path / "other.pth"
    torch.save(content, path)
    _, weights = read_weights(str(path), tmp_path)
    assert same_trunk(weights["trunk"], resnet)


def test_a_thick_and_a_deep_resnet(capsys):
    """What tells a stem from other layers is its three channels, in any ResNet."""
    content = {"encoder.conv1.weight": torch.zeros(64, 3, 7, 7)}
    content["encoder.layer1.0.conv1.weight"] = torch.zeros(64, 64, 1, 1)
    content["encoder.layer1.0.conv3.weight"] = torch.zeros(256, 64, 1, 1)
    trunk = find_trunk(content)
    assert list(trunk) == [name.removeprefix("encoder.") for name in content]
    assert names_prefix(capsys.readouterr().out, "encoder.")


# ---- Whole runs ----------------------------------------------------------------------
def test_fine_tuning_starts_from_moco(call, tiny, tmp_path):
    resnet = make_resnet(1)
    path = tmp_path / "moco_v2_200ep_pretrain.pth.tar"
    torch.save(moco_v2(resnet, make_resnet(2)), path)

    run = ("--pirl-model-name", path, "--experiment-name", "exp")
    outcome = call("train_stl_after_ssl", *tiny, *run)
    assert outcome.status == 0, outcome.err
    assert "module.encoder_q." in outcome.out
    assert f"trunk of another project ({path})" in outcome.out
    # In the softmax stage the trunk stays as it is.
    saved = torch.load(tmp_path / "weights/exp.pt", weights_only=True)
    assert same_trunk(saved["trunk"], resnet)


def test_fine_tuning_starts_from_supcontrast(call, tiny, tmp_path, data_dir):
    """Its stem is the small one, which need not be said."""
    resnet = make_resnet(1, stem="small")
    path = tmp_path / "supcon.pth"
    torch.save(supcontrast(resnet, None), path)

    run = ("--pirl-model-name", path, "--experiment-name", "exp")
    outcome = call("train_stl_after_ssl", *tiny, *run)
    assert outcome.status == 0, outcome.err
    saved = torch.load(tmp_path / "weights/exp.pt", weights_only=True)
    assert same_trunk(saved["trunk"], resnet)
    assert saved["settings"]["stem"] == "small"

    trunk, _ = hubconf.trunk(path)
    assert trunk.conv1.weight.equal(resnet.conv1.weight)
    out = ("--image-size", 36, "--out", tmp_path / "f.npz")
    outcome = call("extract_features", "--model", path, "--images", data_dir, *out)
    assert outcome.status == 0, outcome.err


def test_pretraining_and_features_by_lightly(call, tiny, tmp_path, data_dir):
    resnet = make_resnet(1)
    path = tmp_path / "lightly.pth"
    torch.save(lightly(resnet, make_resnet(2)), path)

    run = ("--warm-start", "--pirl-model-name", path, "--epochs", 1, "--lr", 0)
    outcome = call("pirl_stl_train_test", *tiny, *run, "--experiment-name", "exp")
    assert outcome.status == 0, outcome.err
    saved = torch.load(tmp_path / "weights/exp.pt", weights_only=True)
    weight = saved["trunk"]["layer4.0.conv2.weight"]
    assert torch.equal(weight, resnet.layer4[0].conv2.weight)

    out = tmp_path / "f.npz"
    files = ("--images", data_dir / "test", "--image-size", 36, "--out", out)
    outcome = call("extract_features", "--model", path, *files)
    assert outcome.status == 0, outcome.err
    assert np.load(out)["features"].shape == (40, 64)


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


def test_two_networks_without_a_preference_are_named(tmp_path):
    state_dict = named(left=make_resnet(1), right=make_resnet(2)).state_dict()
    line = refusal(tmp_path / "a.pth", state_dict)
    assert "left., right." in line
    line = refusal(tmp_path / "a.pth", {"state_dict": state_dict})
    for part in ("state_dict", "left.", "right."):
        assert part in line


def test_two_second_encoders_without_a_first_are_named(tmp_path):
    networks = named(momentum_a=make_resnet(1), momentum_b=make_resnet(2))
    line = refusal(tmp_path / "a.pth", networks.state_dict())
    assert "momentum_a., momentum_b." in line


def test_a_second_encoder_alone_is_used(tmp_path):
    """There is nothing to prefer to it."""
    resnet = make_resnet(1)
    path = tmp_path / "a.pth"
    torch.save(named(momentum_encoder=resnet).state_dict(), path)
    _, weights = read_weights(str(path), tmp_path)
    assert same_trunk(weights["trunk"], resnet)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"state_dict": {}},
        {"model": {"blocks.0.attn.qkv.weight": torch.zeros(9, 3)}},
        {"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)},
        {"features.0.weight": torch.zeros(8, 3, 3, 3)},
        # Of gray pictures.
        {"conv1.weight": torch.zeros(64, 1, 7, 7)},
        {"conv1.weight": "no tensor"},
        {0: torch.zeros(1)},
        [torch.zeros(1)],
        torch.zeros(1),
    ],
    ids=lambda content: str(type(content).__name__),
)
def test_a_file_without_a_resnet(tmp_path, content):
    line = refusal(tmp_path / "a.pth", content)
    assert "torchvision's names" in line
    if isinstance(content, dict) and 0 not in content:
        assert "ResNet" in line


def test_a_file_without_a_resnet_in_a_run(call, tiny, tmp_path):
    path = tmp_path / "vit.pth"
    torch.save({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, path)
    outcome = call("train_stl_after_ssl", *tiny, "--pirl-model-name", path)
    assert outcome.is_one_line_error(path, "ResNet")


def test_a_resnet_of_other_widths_is_refused_by_its_tensors(call, tiny, tmp_path):
    content = trunk_of(make_resnet(1))
    content["layer4.0.bn2.weight"] = torch.ones(65)
    path = tmp_path / "wide.pth"
    torch.save(content, path)
    outcome = call("train_stl_after_ssl", *tiny, "--pirl-model-name", path)
    assert outcome.is_one_line_error(path, "layer4.0.bn2.weight", "--model-type")


class Settings:
    """As a project may put into its checkpoint, beside the weights."""


@pytest.mark.parametrize(
    "kind", ["the whole network", "an object of its own", "a type"]
)
def test_pickled_objects_are_not_called_damage(tmp_path, kind):
    state_dict = make_resnet(1).state_dict()
    contents = {
        "the whole network": make_resnet(1),
        "an object of its own": {"state_dict": state_dict, "settings": Settings()},
        "a type": {"state_dict": state_dict, "parser": argparse.ArgumentParser},
    }
    line = refusal(tmp_path / "a.pth", contents[kind])
    advice = "holds more than tensors: load it yourself, and save its state_dict"
    assert advice in line
    assert "damaged" not in line


def test_the_advice_for_pickled_objects_helps(tmp_path):
    resnet = make_resnet(1)
    path = tmp_path / "whole.pth"
    assert "save its state_dict" in refusal(path, resnet)
    torch.save(torch.load(path, weights_only=False).state_dict(), path)
    _, weights = read_weights(str(path), tmp_path)
    assert same_trunk(weights["trunk"], resnet)


def test_damaged_files_are_called_so(tmp_path):
    path = tmp_path / "a.pth"
    torch.save(moco_v1(make_resnet(1), make_resnet(2)), path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[: len(whole) // 2], bytes(flipped), b"", b"<html></html>"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.pth is damaged or .*: use another"):
            read_torch_file(path)
