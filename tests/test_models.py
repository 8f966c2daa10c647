"""The networks: trunk, heads, running statistics, and convolutions of small maps."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch._subclasses import FakeTensorMode

import models
from jigsaw import Jigsaw
from models import PIRL, SmallMapConv2d, make_trunk, speed_up_small_maps

TORCHVISION = {
    "res18": torchvision.models.resnet18,
    "res34": torchvision.models.resnet34,
    "res50": torchvision.models.resnet50,
}


def make_pirl(model_type="res18", non_linear=False):
    """A network as pretraining builds it."""
    trunk, dimension = make_trunk(model_type)
    speed_up_small_maps(trunk)
    head_f = models.linear_head(dimension, non_linear)
    head_g = Jigsaw().make_head(dimension, non_linear)
    return PIRL(trunk, head_f, head_g)


# ---- Trunk and heads -----------------------------------------------------------------
@pytest.mark.parametrize(
    ("model_type", "dimension", "non_linear"),
    [("res18", 512, True), ("res34", 512, False), ("res50", 2048, True)],
)
@pytest.mark.full_trunk
def test_networks(model_type, dimension, non_linear):
    network = make_pirl(model_type, non_linear).eval()
    assert network.trunk(torch.randn(2, 3, 40, 40)).shape == (2, dimension)

    f, g = network(torch.randn(2, 3, 40, 40), torch.randn(18, 3, 15, 15))
    for output in (f, g):
        assert output.shape == (2, 128)
        weight = network.trunk.conv1.weight
        [gradient] = torch.autograd.grad(output.sum(), weight, retain_graph=True)
        assert gradient.abs().max() > 0

    layers = [nn.Linear, nn.ReLU, nn.Linear] if non_linear else [nn.Linear]
    assert [type(layer) for layer in network.head_f] == layers
    assert [type(layer) for layer in network.head_g.together] == layers


def test_patches_are_concatenated_in_presentation_order():
    network = make_pirl().eval()
    patches = torch.randn(18, 3, 15, 15)
    with torch.no_grad():
        _, g = network(torch.randn(2, 3, 48, 48), patches)

        # Patches are normalised by the statistics of their batch, in eval mode too.
        trunk, _ = make_trunk("res18")
        trunk.load_state_dict(network.trunk.state_dict())
        features = trunk.train()(patches)

        for image in range(2):
            vectors = []
            for place in range(9):
                vectors.append(network.head_g.patch(features[image * 9 + place]))
            expected = network.head_g.together(torch.cat(vectors))
            torch.testing.assert_close(g[image], expected, rtol=1e-4, atol=1e-5)


def test_the_small_stem_is_a_convolution_of_stride_1():
    """It is initialised as torchvision does it: normal, with variance 2 / fan-out."""
    torch.manual_seed(0)
    convolution = make_trunk("res18", "small")[0].conv1
    assert convolution.weight.shape == (64, 3, 3, 3)
    assert convolution.stride == (1, 1)
    assert convolution.padding == (1, 1)
    assert convolution.bias is None
    expected = (2 / (64 * 9)) ** 0.5
    assert convolution.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert convolution.weight.abs().max() > 3 * expected, "normal, not uniform"


@pytest.mark.full_trunk
@pytest.mark.parametrize("model_type", ["res18", "res50"])
def test_all_convolutions_but_the_first_know_small_maps(model_type):
    """Where it is asked for: the hub's and the exported network is torchvision's."""
    trunk, _ = make_trunk(model_type)
    assert not any(isinstance(m, SmallMapConv2d) for m in trunk.modules())
    before = {name: value.clone() for name, value in trunk.state_dict().items()}

    assert speed_up_small_maps(trunk) is trunk
    after = trunk.state_dict()
    assert after.keys() == before.keys(), "the same names in files"
    assert all(value.equal(before[name]) for name, value in after.items())
    for name, module in trunk.named_modules():
        if isinstance(module, nn.Conv2d):
            assert isinstance(module, SmallMapConv2d) == (name != "conv1"), name


@pytest.mark.parametrize(("kernel", "padding"), [(3, 1), (1, 0)])
def test_a_small_map_takes_no_convolution(monkeypatch, kernel, padding):
    """torch's own is left to larger maps, to those that are not square, and to GPUs."""
    sizes = []

    def note_size(convolution, x, *rest):
        sizes.append(tuple(x.shape[2:]))

    convolution = nn.Conv2d(8, 8, kernel, padding=padding, bias=False)
    SmallMapConv2d.adopt(convolution)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", note_size)
    for size in ((1, 1), (2, 2), (3, 3), (2, 1), (1, 2)):
        convolution(torch.randn(2, 8, *size))
    assert sizes == [(3, 3), (2, 1), (1, 2)]

    # Fake tensors need no GPU.
    sizes.clear()
    with FakeTensorMode():
        for size in ((1, 1), (2, 2), (3, 3)):
            convolution(torch.empty(2, 8, *size, device="cuda"))
    assert sizes == [(1, 1), (2, 2), (3, 3)]


def test_by_default_the_stem_is_torchvision_s_and_blocks_start_as_the_identity():
    trunk, _ = make_trunk("res18")
    assert trunk.conv1.kernel_size == (7, 7)
    assert (trunk.layer1[0].bn2.weight == 0).all()
    with_weights, _ = make_trunk("res18", zero_init=False)
    assert (with_weights.layer1[0].bn2.weight == 1).all()


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_are_those_of_whole_images(training):
    """A pass over images and patches leaves those that a pass over images leaves."""
    both = make_pirl().train(training)
    alone = make_pirl()
    alone.load_state_dict(both.state_dict())
    alone.train(training)
    images = torch.randn(4, 3, 48, 48)
    patches = 3 + 2 * torch.randn(36, 3, 15, 15)

    with torch.no_grad():
        both(images, patches)
        alone.trunk(images)

    expected = alone.trunk.state_dict()
    found = both.trunk.state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name
    assert both.trunk.training == training
    assert both.trunk.bn1.training == training
    assert both.trunk.bn1.track_running_stats


# ---- Convolutions of maps of 1 × 1 and 2 × 2 pixels ----------------------------------
def output_and_gradients(forward, x, weight):
    """[output, gradient of the input, gradient of the weight], in a fixed direction."""
    x = x.detach().clone().requires_grad_()
    y = forward(x)
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(y.shape, generator=generator).to(y.dtype)
    return [y, *torch.autograd.grad(y, (x, weight), direction)]


def by_module_and_by_torch(convolution, x):
    """The results of the module's own forward, and those of F.conv2d."""

    def conv2d(x):
        stride = convolution.stride
        return F.conv2d(x, convolution.weight, None, stride, convolution.padding)

    by_module = output_and_gradients(convolution, x, convolution.weight)
    by_torch = output_and_gradients(conv2d, x, convolution.weight)
    return by_module, by_torch


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 2, 3])
def test_equals_conv2d_in_outputs_and_gradients(side, stride, kernel, layout):
    torch.manual_seed(0)
    convolution = nn.Conv2d(5, 7, kernel, stride, kernel // 2, bias=False)
    SmallMapConv2d.adopt(convolution)
    convolution.double().to(memory_format=layout)
    x = torch.randn(3, 5, side, side, dtype=torch.float64)
    x = x.contiguous(memory_format=layout)

    by_module, by_torch = by_module_and_by_torch(convolution, x)

    for value, expected in zip(by_module, by_torch, strict=True):
        assert value.shape == expected.shape
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_bf16_gradients_are_those_of_float32():
    """torch 2.11 on CPUs gives arbitrary ones for a stride of 2 on a map of 1 × 1."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(64, 64, 3, 2, 1, bias=False)
    SmallMapConv2d.adopt(convolution)
    x = torch.randn(288, 64, 1, 1)

    (_, *expected), _ = by_module_and_by_torch(convolution, x)
    with torch.autocast("cpu", torch.bfloat16):
        (_, *gradients), _ = by_module_and_by_torch(convolution, x)

    for gradient, of_float32 in zip(gradients, expected, strict=True):
        cosine = torch.cosine_similarity(
            gradient.flatten().float(), of_float32.flatten(), dim=0
        )
        assert cosine > 0.99


@pytest.mark.parametrize("model_type", ["res18", "res50"])
@pytest.mark.full_trunk
def test_a_trunk_is_torchvision_s_network(model_type):
    """The same names, shapes and outputs, at the sizes of images and of patches."""
    trunk, _ = make_trunk(model_type, zero_init=False)
    speed_up_small_maps(trunk)
    reference = TORCHVISION[model_type]()
    reference.fc = nn.Identity()
    reference.load_state_dict(trunk.state_dict())
    trunk = trunk.double().eval()
    reference = reference.double().eval()

    for side in (40, 30, 15):
        images = torch.randn(2, 3, side, side, dtype=torch.float64)
        torch.testing.assert_close(
            trunk(images), reference(images), rtol=1e-9, atol=1e-9
        )


# ---- Networks from files -------------------------------------------------------------
def file_content(trunk, **more):
    """What read_weights() gives for a file of ours."""
    settings = {"model_type": "res18", "stem": "small", "image_size": 64}
    content = {"trunk": trunk.state_dict(), "settings": settings, **more}
    return {"from_checkpoint": False, **content}


def test_a_classifier_from_a_file(capsys):
    """Of other numbers of classes than ten, in the file's own architecture."""
    trunk, dimension = make_trunk("res18", "small", zero_init=False)
    layer = nn.Linear(dimension, 13)
    classes = [str(number) for number in range(13)]
    content = file_content(trunk, softmax_layer=layer.state_dict(), classes=classes)
    found_trunk, found_layer = models.load_network("exp.pt", content)

    classifier = models.as_classifier(found_trunk, found_layer).eval()
    images = torch.randn(3, 3, 40, 40)
    with torch.no_grad():
        expected = layer(trunk.eval()(images))
        assert classifier(images).equal(expected)
    assert list(dict(classifier.named_children())) == ["trunk", "softmax_layer"]
    assert not any(isinstance(m, SmallMapConv2d) for m in found_trunk.modules())
    assert "checkpoint" not in capsys.readouterr().out


def test_a_trunk_from_a_checkpoint_has_no_layer_and_a_note(capsys):
    trunk, _ = make_trunk("res18", "small")
    content = {**file_content(trunk), "from_checkpoint": True}
    found_trunk, layer = models.load_network("exp.ckpt", content)
    assert layer is None
    for name, value in found_trunk.state_dict().items():
        assert value.equal(trunk.state_dict()[name]), name
    assert "note: exp.ckpt is a checkpoint" in capsys.readouterr().out
