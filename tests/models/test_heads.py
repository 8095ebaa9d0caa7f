"""Each method's own head comes out equal to the module that was saved, or is refused in one sentence."""

import copy

import pytest
import torch
from helpers.sources import randomise, state, training, under
from torch import nn

from checkpoints.frozen import load_frozen
from checkpoints.reader import read_checkpoint
from models.heads import describe
from runtime.errors import UserError

D = 512  # of a ResNet-18


def linear(inside, outside, **options):
    return nn.Linear(inside, outside, **options)


def bn(width, **options):
    return nn.BatchNorm1d(width, **options)


def mlp(*widths, last_norm=None, bias=True):
    """Linear, BN, ReLU ... Linear, and the batch norm that some put behind it."""
    layers = []
    for inside, outside in zip(widths, widths[1:], strict=False):
        layers += [linear(inside, outside, bias=bias), bn(outside), nn.ReLU()]
    return nn.Sequential(*layers[:-2], *([last_norm] if last_norm else []))


HEADS = {  # the module, and the file's tensors beside the trunk's {prefix: trunk's}
    "MoCo v1": (linear(D, 8), "module.encoder_q.", "module.encoder_q.fc.", "Linear(512, 8)"),
    "MoCo v2": (nn.Sequential(linear(D, D), nn.ReLU(), linear(D, 8)), "module.encoder_q.", "module.encoder_q.fc.",
                "Linear(512, 512), ReLU, Linear(512, 8)"),
    "MoCo v3": (mlp(D, 32, 8, last_norm=bn(8, affine=False), bias=False), "module.base_encoder.",
                "module.base_encoder.fc.", None),
    "SimSiam": (mlp(D, D, D, 8, last_norm=bn(8, affine=False)), "module.encoder.", "module.encoder.fc.", None),
    "SwAV": (mlp(D, 32, 8), "module.", "module.projection_head.", None),
    "Barlow Twins": (mlp(D, 32, 32, 8, bias=False), "module.backbone.", "module.projector.", None),
    "SEED's SimCLR teacher": (nn.Sequential(linear(D, D, bias=False), bn(D), nn.ReLU(), linear(D, 8)),
                              "module.module.module.", "module.module.module.fc.", None),
    "sthalles": (nn.Sequential(linear(D, D), nn.ReLU(), linear(D, 8)), "backbone.", "backbone.fc.", None),
    "CoSS": (nn.Sequential(linear(D, 32), nn.ReLU(), linear(32, 8)), "module.backbone.", "module.proj_head.", None),
    "SMD": (linear(D, 8), "module.encoder.", "module.encoder.fc.", None),
    "lightly": (mlp(D, 32, 8), "backbone.", "projection_head.layers.", None),
    "DisCo, MobileNet-like": (linear(D, 8), "module.encoder_q.", "module.encoder_q.classifier.", None),
}
BESIDE = {"SimSiam": {"module.predictor.0.weight": torch.zeros(2, 2)}, "SwAV": {"module.prototypes.weight": torch.ones(
    3, 8)}, "MoCo v2": under("module.encoder_k.", {**state(seed=2), "fc.0.weight": torch.zeros(3, 3)})}


@pytest.mark.parametrize("name", HEADS)
def test_head_equals_the_source(tmp_path, name):
    module, trunk, prefix, words = HEADS[name]
    module = randomise(copy.deepcopy(module))
    torch.save(training({**under(trunk, state()), **under(prefix, module.state_dict()), **BESIDE.get(name, {})}),
               tmp_path / "file.pth")
    head = read_checkpoint(tmp_path / "file.pth").head().eval()
    rows = torch.randn(5, D)
    with torch.no_grad():
        assert torch.equal(head(rows), module(rows))
    assert words is None or describe(head) == words
    assert len(head.state_dict()) == len(module.state_dict())


def test_a_branch_has_its_own_head(tmp_path):
    tensors = {**under("encoder_q.", state()), **under("encoder_k.", state(seed=2)),
               "encoder_q.fc.weight": torch.ones(3, D), "encoder_k.fc.weight": torch.full((3, D), 2.0)}
    torch.save(training(tensors), tmp_path / "file.pth")
    for branch, value in (("encoder_q", 1), ("encoder_k", 2)):
        weight = read_checkpoint(tmp_path / "file.pth", branch=branch).head()[0].weight
        assert torch.equal(weight, torch.full((3, D), float(value)))


def test_load_frozen_gives_the_head_frozen(tmp_path):
    module = randomise(mlp(D, 32, 8))
    torch.save({**state(), **under("projection_head.", module.state_dict()), "prototypes.weight": torch.zeros(3, 8)},
               tmp_path / "file.pth")
    encoder, report = load_frozen(tmp_path / "file.pth", with_head=True)
    assert report.head == "Linear(512, 32), BatchNorm1d, ReLU, Linear(32, 8)"
    encoder.train()
    assert not encoder.head.training
    assert not any(p.requires_grad for p in encoder.parameters())
    with torch.no_grad():
        assert torch.equal(encoder.head(torch.ones(2, D)), module(torch.ones(2, D)))


DINO_HEAD = {"mlp.0.weight": torch.zeros(4, D), "mlp.0.bias": torch.zeros(4), "mlp.2.weight": torch.zeros(4, 4),
             "last_layer.weight_g": torch.zeros(9, 1), "last_layer.weight_v": torch.zeros(9, 4)}


@pytest.mark.parametrize(("content", "says"), [
    ({"teacher": {**under("backbone.", state()), **under("head.", DINO_HEAD)}}, "the head teacher.head.* holds"),
    (training(under("module.encoder_q.", state())), "has no head; give"),
    (training({**under("encoder_q.", state()), "encoder_q.fc.0.weight": torch.zeros(3, D, 1, 1)}), "shape [3, 512, 1"),
    (state(), "has no head; give"),
], ids=["DINO", "none", "convolution", "bare"])
def test_refused(tmp_path, content, says):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(UserError) as caught:
        read_checkpoint(tmp_path / "file.pth", flag="--distill").head()
    text = str(caught.value)
    assert says in text
    assert text.startswith(f"--distill {tmp_path / 'file.pth'}")
    assert "\n" not in text
    assert "choose a loss, or an export, that needs no head" in text
