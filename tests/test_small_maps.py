"""Convolutions of maps of 1 × 1 and 2 × 2 pixels as matrix products: the function that torch computes."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import SmallMapConv2d, make_trunk


def both(convolution, x):
    """(output, gradients of input and weight) of the module's forward, and the same of F.conv2d."""
    results = []
    stride, padding = convolution.stride, convolution.padding
    for forward in (convolution, lambda x: F.conv2d(x, convolution.weight, None, stride, padding)):
        x = x.detach().clone().requires_grad_()
        y = forward(x)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        results.append([y, *torch.autograd.grad(y, (x, convolution.weight), direction)])
    return results


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_equals_conv2d_in_outputs_and_gradients(side, stride, kernel, layout):
    torch.manual_seed(0)
    plain = nn.Conv2d(5, 7, kernel, stride, kernel // 2, bias=False)
    convolution = SmallMapConv2d.adopt(plain).double().to(memory_format=layout)
    x = torch.randn(3, 5, side, side, dtype=torch.float64).contiguous(memory_format=layout)
    for mine, theirs in zip(*both(convolution, x), strict=True):
        assert mine.shape == theirs.shape
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_bf16_gradients_are_those_of_float32():
    """torch 2.11 on CPUs gives arbitrary ones for a convolution of stride 2 on a map of 1 × 1."""
    torch.manual_seed(0)
    convolution, x = SmallMapConv2d.adopt(nn.Conv2d(64, 64, 3, 2, 1, bias=False)), torch.randn(288, 64, 1, 1)
    (_, *expected), _ = both(convolution, x)
    with torch.autocast("cpu", torch.bfloat16):
        (_, *mine), _ = both(convolution, x)
    for a, b in zip(mine, expected, strict=True):
        assert torch.cosine_similarity(a.flatten().float(), b.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("model_type", ["res18", "res34", "res50"])
@pytest.mark.full_trunk
def test_a_trunk_is_torchvision_s_network(model_type):
    """The same names, shapes and outputs, at the sizes of images and of patches; float64."""
    trunk, _ = make_trunk(model_type, zero_init=False)
    reference = getattr(torchvision.models, f"resnet{model_type[3:]}")()
    reference.fc = nn.Identity()
    reference.load_state_dict(trunk.state_dict())
    trunk, reference = trunk.double().eval(), reference.double().eval()
    assert not isinstance(reference.layer1[0].conv2, SmallMapConv2d)
    assert isinstance(trunk.layer1[0].conv2, SmallMapConv2d)
    for side in (96, 48, 30, 15):
        images = torch.randn(2, 3, side, side, dtype=torch.float64)
        torch.testing.assert_close(trunk(images), reference(images), rtol=1e-9, atol=1e-9)
