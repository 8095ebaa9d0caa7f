"""Numbers that no trained network has are refused by the name of their tensor, in trunks and in heads that are used."""

import math

import numpy as np
import pytest
import torch
from helpers.sources import state, training, under
from torch import nn

from checkpoints.frozen import load_frozen
from checkpoints.reader import read_checkpoint
from checkpoints.values import Unsound, other_rotation, trouble
from models.backbones import Spec
from runtime.errors import UserError

NAME = "layer2.0.bn1.running_var"
HARM = {  # tensor, what becomes of it, what is said
    "NaN": ("conv1.weight", lambda x: x.index_fill(0, torch.tensor([3]), math.nan), "holds 147 NaN or infinite"),
    "infinite": ("bn1.bias", lambda x: x.index_fill(0, torch.tensor([3]), -math.inf), "holds 1 NaN or infinite"),
    "beyond float32": ("bn1.bias", lambda x: x.double().fill_(1e300), "holds 64 numbers beyond float32 among its 64"),
    "negative variance": (NAME, lambda x: x.index_fill(0, torch.tensor([1, 5]), -0.1), "holds 2 negative numbers"),
    "zero": ("layer1.0.conv1.weight", torch.zeros_like, "is all zero ([64, 64, 3, 3])"),
    "integers": ("bn1.weight", lambda x: (100 * x).long(), "is int64, expected floating-point"),
    "bytes": ("bn1.weight", lambda x: (100 * x).to(torch.uint8), "is uint8, expected floating-point"),
    "booleans": ("bn1.weight", lambda x: x > 1, "is bool, expected floating-point"),
    "complex": ("bn1.weight", lambda x: x.to(torch.complex64), "is complex64, expected floating-point"),
    "quantized": ("bn1.weight", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "is qint8, expected"),
    "a complex counter": ("bn1.num_batches_tracked", lambda x: x.to(torch.complex64), "is complex64, expected whole"),
}


def moco(harmed=None):
    trunk = dict(state())
    if harmed:
        name, change, _ = HARM[harmed]
        trunk[name] = change(trunk[name])
    return training(under("module.encoder_q.", {**trunk, "fc.weight": torch.ones(6, 512), "fc.bias": torch.ones(6)}))


def cosines(base):
    """EVA-02's own of 2 x 2 patches for heads of 16, each number twice."""
    angles = torch.arange(2) / 2 * 16 / base ** (torch.arange(4)[:, None] / 4)  # [4, 2]
    rows, columns = (angles.repeat_interleave(2, 0).T[x.flatten()] for x in torch.meshgrid(
        torch.arange(2), torch.arange(2), indexing="ij"))
    return torch.cat([rows, columns], 1).cos()


@pytest.mark.parametrize(("arch", "name", "right", "wrong"), [
    ("vit_small_patch16_dinov3", "rope_embed.periods", lambda: 100 ** (torch.arange(4).bfloat16() / 4),
     lambda: 120 ** (torch.arange(4) / 4)),
    ("eva02_tiny_patch14_224", "blocks.0.attn.rope.freqs_cos", lambda: cosines(10000), lambda: cosines(100))])
def test_rotary_positions_that_the_network_would_compute_otherwise(arch, name, right, wrong):
    timm = pytest.importorskip("timm", reason="these networks are timm's; pip install timm")
    network = timm.create_model(arch, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    network.spec = Spec(arch, "imagenet", 224, 32, "head")
    assert other_rotation(name, right(), network) is None
    assert "holds other rotary positions than" in other_rotation(name, wrong(), network)
    assert other_rotation("head.weight", wrong(), network) is None


@pytest.mark.filterwarnings("ignore:.*[qQ]uant")
@pytest.mark.parametrize("name", HARM)
def test_a_tensor_that_cannot_be_trained_weights(tmp_path, name):
    torch.save(moco(name), tmp_path / "file.pth")
    with pytest.raises(UserError) as caught:
        load_frozen(tmp_path / "file.pth")
    assert f"{tmp_path / 'file.pth'}: encoder_q.{HARM[name][0]} {HARM[name][2]}" in str(caught.value)


def test_other_precisions_and_zeros_that_networks_have_are_read(tmp_path):
    content, dtypes = moco(), [torch.float16, torch.bfloat16, torch.float64]
    for i, (name, value) in enumerate(content["state_dict"].items()):
        if value.is_floating_point():
            content["state_dict"][name] = value.to(dtypes[i % 3])
    content["state_dict"]["module.encoder_q.layer1.0.bn2.weight"].zero_()  # a residual branch that begins as nothing
    content["state_dict"]["module.encoder_q.bn1.num_batches_tracked"] = torch.tensor(3.0)
    content["state_dict"]["module.encoder_k.conv1.weight"] = torch.full((64, 3, 7, 7), math.nan)  # is not used
    torch.save(content, tmp_path / "file.pth")
    encoder, _ = load_frozen(tmp_path / "file.pth")
    assert torch.equal(encoder.backbone.conv1.weight, state()["conv1.weight"].to(
        content["state_dict"]["module.encoder_q.conv1.weight"].dtype).float())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_head_is_looked_at_where_it_is_used(tmp_path, value):
    content = moco()
    content["state_dict"]["module.encoder_q.fc.bias"][2] = value
    torch.save(content, tmp_path / "file.pth")
    load_frozen(tmp_path / "file.pth")
    with pytest.raises(Unsound, match=r"the head encoder_q.fc.\*: bias holds 1 NaN"):
        load_frozen(tmp_path / "file.pth", with_head=True)
    with pytest.raises(Unsound, match="a head: bias holds 1 NaN"):
        read_checkpoint(tmp_path / "file.pth").heads()


@pytest.mark.parametrize("network", [nn.Conv2d(1, 2, 3), nn.BatchNorm2d(3), nn.LayerNorm(4),
                                     nn.MultiheadAttention(4, 2), nn.BatchNorm1d(2, affine=False)])
def test_fresh_layers_are_sound(network):
    assert not [x for name, value in network.state_dict().items() if (x := trouble(name, value, value.dtype))]


def test_float8_is_looked_at():
    assert trouble("a.weight", torch.ones(2, 2).to(torch.float8_e4m3fn), torch.float32) is None
    assert "1 NaN" in trouble("a.weight", torch.tensor([[1, np.nan]]).to(torch.float8_e4m3fn), torch.float32)
