"""EfficientNets under efficientnet_pytorch's names, Lite too, beside the paper's blocks written out on their tensors.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers.sources import images, under
from torch import nn

from checkpoints.frozen import load_frozen
from checkpoints.reader import read_checkpoint
from runtime.errors import UserError

pytest.importorskip("timm", reason="these networks are timm's; pip install timm")
STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112), (4, 5, 2, 6, 192),
          (1, 3, 1, 6, 320))  # of B0 and Lite0: blocks, kernel, stride of the first, expansion, channels
BLOCKS = [(kernel, 1 if number else stride, expand, out) for repeats, kernel, stride, expand, out in STAGES
          for number in range(repeats)]


def tensors_of(lite):
    """B0's or Lite0's, random, in the package's order."""
    generator, tensors = torch.Generator().manual_seed(3), {}

    def conv(name, out, into, kernel=1, bias=False):
        weight = torch.randn(out, into, kernel, kernel, generator=generator)
        tensors[f"{name}.weight"] = weight * (2 / (into * kernel ** 2)) ** 0.5
        if bias:
            tensors[f"{name}.bias"] = torch.randn(out, generator=generator)

    def norm(name, width):
        for part, value in nn.BatchNorm2d(width).state_dict().items():
            tensors[f"{name}.{part}"] = value + 0.2 * torch.rand(value.shape, generator=generator)

    conv("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    width = 32
    for number, (kernel, _, expand, out) in enumerate(BLOCKS):
        place, inside = f"_blocks.{number}.", width * expand
        if expand > 1:
            conv(place + "_expand_conv", inside, width)
            norm(place + "_bn0", inside)
        conv(place + "_depthwise_conv", inside, 1, kernel)
        norm(place + "_bn1", inside)
        if not lite:
            conv(place + "_se_reduce", width // 4, inside, bias=True)
            conv(place + "_se_expand", inside, width // 4, bias=True)
        conv(place + "_project_conv", out, inside)
        norm(place + "_bn2", out)
        width = out
    conv("_conv_head", 1280, width)
    norm("_bn1", 1280)
    return tensors | {"_fc.weight": torch.ones(5, 1280), "_fc.bias": torch.ones(5)}


def features_of(tensors, x, lite):
    """Pooled features, block by block from the package's names."""
    act = F.relu6 if lite else F.silu

    def conv(name, x, stride=1, groups=1):
        weight = tensors[f"{name}.weight"]
        total = [max(0, (math.ceil(side / stride) - 1) * stride + weight.shape[-1] - side) for side in x.shape[-2:]]
        x = F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))
        return F.conv2d(x, weight, tensors.get(f"{name}.bias"), stride, groups=groups)

    def norm(name, x):
        parts = [tensors[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, *parts, eps=1e-3)

    x = act(norm("_bn0", conv("_conv_stem", x, 2)))
    for number, (_, stride, expand, _) in enumerate(BLOCKS):
        place, before = f"_blocks.{number}.", x
        if expand > 1:
            x = act(norm(place + "_bn0", conv(place + "_expand_conv", x)))
        x = act(norm(place + "_bn1", conv(place + "_depthwise_conv", x, stride, groups=x.shape[1])))
        if not lite:
            squeezed = F.silu(conv(place + "_se_reduce", x.mean((2, 3), keepdim=True)))
            x = x * conv(place + "_se_expand", squeezed).sigmoid()
        x = norm(place + "_bn2", conv(place + "_project_conv", x))
        x = x + before if x.shape == before.shape else x
    return act(norm("_bn1", conv("_conv_head", x))).mean((2, 3))


@pytest.mark.parametrize(("lite", "arch", "asked", "mean"), [
    (True, "timm:tf_efficientnet_lite0", None, [0.5] * 3),
    (False, "timm:tf_efficientnet_b0", "timm:tf_efficientnet_b0", [0.485, 0.456, 0.406])])
def test_features_are_the_papers(tmp_path, lite, arch, asked, mean):
    tensors = tensors_of(lite)
    torch.save(dict(reversed(tensors.items())), tmp_path / "file.pth")  # names count, their order does not
    encoder, report = load_frozen(tmp_path / "file.pth", asked)
    assert (report.arch, report.mean, report.dropped) == (arch, mean, {"_fc.": 2})
    assert report.matched == len(tensors) - 2
    for size in (64, 45):
        with torch.no_grad():
            expected = features_of(tensors, images(size), lite)
            assert (encoder.backbone(images(size)) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_another_stage_or_a_block_less_is_no_lite(tmp_path):
    tensors = tensors_of(lite=True)
    for content in ({k: v for k, v in tensors.items() if not k.startswith("_blocks.15.")},
                    {**tensors, "_conv_stem.weight": torch.ones(32, 3, 5, 5)}):
        torch.save(content, tmp_path / "file.pth")
        with pytest.raises(UserError, match="fits no architecture known here"):
            load_frozen(tmp_path / "file.pth")


def test_in_a_students_file_and_without_timm(tmp_path, monkeypatch):
    torch.save({"state_dict": under("module.encoder_q.", tensors_of(lite=True))}, tmp_path / "file.pth")
    assert read_checkpoint(tmp_path / "file.pth").identify().arch == "timm:tf_efficientnet_lite0"
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UserError, match="^the network in .* needs the package timm, which is not installed; run `pip"):
        load_frozen(tmp_path / "file.pth")
