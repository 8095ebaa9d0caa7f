"""Convolutions as a CPU computes them: torch's own values and gradients in float64, under the same names."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.backbones import build_backbone
from models.place import CPUConv2d, place

CPU = torch.device("cpu")
# channels, kernel, stride, padding, side, bias: -> whether it becomes a product of matrices
CASES = {(5, 3, 1, 1, 2, False): True, (5, 3, 2, 1, 4, True): True, (4, 1, 1, 0, 4, True): True,
         (4, 1, 2, 0, 8, False): True, (3, 7, 2, 3, 4, True): True, (5, 3, 1, 0, 3, False): True,
         (5, 3, 1, 1, 3, False): False, (4, 1, 1, 0, 5, False): False, (5, (1, 3), (2, 1), (0, 1), 2, True): True}


def gradients(conv, x):
    y = conv(x)
    return y, torch.autograd.grad(y.pow(2).sum(), (x, *conv.parameters()))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_small_map_has_the_values_and_gradients_of_a_convolution(case, monkeypatch):
    channels, kernel, stride, padding, side, bias = case
    plain = nn.Conv2d(channels, 6, kernel, stride, padding, bias=bias).double()
    ours = place(copy.deepcopy(plain), CPU)
    x = torch.randn(3, channels, side, side, dtype=torch.float64, requires_grad=True)
    expected = gradients(plain, x)
    products = []
    monkeypatch.setattr(F, "linear", lambda *a, f=F.linear: products.append(a) or f(*a))
    found = gradients(ours, x)
    assert bool(products) == CASES[case]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_what_is_not_plain_stays():
    network = nn.Sequential(nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, padding_mode="reflect", padding=1),
                            nn.Conv2d(4, 4, 3, dilation=2, padding=2), nn.Conv2d(4, 4, 3, groups=2, padding=1))
    x, expected = torch.randn(2, 4, 2, 2), None
    expected = network(x)
    placed = place(copy.deepcopy(network), CPU)
    assert [type(m) for m in placed] == [nn.Conv2d, nn.Conv2d, CPUConv2d, CPUConv2d]
    torch.testing.assert_close(placed(x), expected)


@pytest.mark.parametrize(("groups", "kernel", "stride", "dtype"), [
    (8, 3, 2, torch.float32), (8, 5, 1, torch.float32), (8, 3, 1, torch.bfloat16), (2, 3, 2, torch.bfloat16),
    (1, 3, 2, torch.bfloat16), (1, 3, 8, torch.bfloat16)])
def test_depthwise_convolutions_whose_gradient_is_slow_are_float32_under_autocast(groups, kernel, stride, dtype):
    conv = place(nn.Conv2d(8, 8, kernel, stride, kernel // 2, groups=groups), CPU)
    x = torch.randn(2, 8, 16, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x.bfloat16())
    assert y.dtype == dtype
    expected = F.conv2d(x, conv.weight, conv.bias, stride, kernel // 2, 1, groups)
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("arch", ["resnet18", "shufflenet_v2_x0_5"])
def test_a_network_keeps_its_names_and_answers(arch):
    network = build_backbone(arch, image_size=32).eval()
    images = torch.randn(2, 3, 32, 32)
    expected, before = network(images), copy.deepcopy(network.state_dict())
    placed = place(network, CPU)
    assert any(type(m) is CPUConv2d for m in placed.modules())
    assert placed.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in placed.state_dict().items())
    found = placed(images)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
