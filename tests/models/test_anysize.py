"""Images of any size against the library's own forward pass with positions made for that size; maps of features."""

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import VisionTransformer, resnet18
from torchvision.models.feature_extraction import create_feature_extractor

from models.anysize import AnySize, FeatureMap
from models.backbones import build_backbone
from models.tokens import positions
from runtime.errors import UserError


def tiny_vit(size):
    """A ViT with patches of 8 and a trunk's spec."""
    torch.manual_seed(0)
    vit = VisionTransformer(size, 8, 2, 2, 12, 24, num_classes=3)
    vit.heads, vit.spec = torch.nn.Identity(), build_backbone("squeezenet1_1", image_size=64).spec
    torch.nn.init.normal_(vit.encoder.pos_embedding)
    return vit.eval()


def test_a_vit_at_its_own_size_and_at_another():
    vit, images = tiny_vit(32), torch.randn(2, 3, 48, 48)
    assert AnySize(vit)(images[:, :, :32, :32]).allclose(vit(images[:, :, :32, :32]), atol=1e-6)
    larger = tiny_vit(48)   # torchvision's own pass, with the smaller one's weights and positions for its size
    state = vit.state_dict()
    grid = state["encoder.pos_embedding"][:, 1:].reshape(1, 4, 4, 12).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=6, mode="bicubic").permute(0, 2, 3, 1).reshape(1, 36, 12)
    state["encoder.pos_embedding"] = torch.cat([state["encoder.pos_embedding"][:, :1], grid], dim=1)
    larger.load_state_dict(state)
    assert AnySize(vit)(images).allclose(larger(images), atol=1e-6)
    assert FeatureMap(vit)(images).flatten(2).transpose(1, 2).allclose(tokens(larger, images)[:, 1:], atol=1e-6)


def tokens(vit, images):
    """torchvision's forward pass up to the choice of the class token."""
    x = vit._process_input(images)
    return vit.encoder(torch.cat([vit.class_token.expand(len(x), -1, -1), x], dim=1))


def test_the_map_lies_as_the_patches_do():
    vit, images = tiny_vit(32), torch.randn(1, 3, 21, 47)   # what is beside whole patches is cut off
    found = FeatureMap(vit)(images)
    assert found.shape == (1, 12, 2, 5)
    assert found.equal(FeatureMap(vit)(images[:, :, :16, :40]))
    assert AnySize(vit)(images).shape == (1, 12)
    with pytest.raises(UserError, match="patches of 8 pixels"):
        AnySize(vit)(images[:, :, :7])
    table = torch.arange(5.0).view(1, 5, 1)                  # 1 2 / 3 4 behind the class token
    wide = positions(table, 2, 4)
    assert wide[0, 0] == 0
    assert (wide[0, 1:5].diff(dim=0) >= 0).all()             # the first row runs from 1 to 2
    assert (wide[0, 5:] - wide[0, 1:5]).mean() == pytest.approx(2)


def test_timms_vit_as_it_is_built_for_that_size():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 16, "num_classes": 0, "depth": 2}
    model = timm.create_model("vit_tiny_patch16_224", **options).eval()
    torch.nn.init.normal_(model.pos_embed)
    model.spec = build_backbone("squeezenet1_1", image_size=64).spec
    other = timm.create_model("vit_tiny_patch16_224", **{**options, "img_size": (32, 64)}).eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    state["pos_embed"] = positions(state["pos_embed"], 2, 4)
    other.load_state_dict(state)
    images = torch.randn(1, 3, 32, 64)
    assert AnySize(model)(images).allclose(other(images), atol=1e-5)
    assert model(images[..., :32]).shape == (1, 192)         # left as it was
    assert FeatureMap(model)(images).shape == (1, 192, 2, 4)


def test_a_resnets_map_is_layer3_at_stride_8():
    backbone, images = build_backbone("resnet18", image_size=64).eval(), torch.randn(1, 3, 64, 96)
    before = backbone(images)
    found = FeatureMap(backbone)
    assert (found.name, found.stride) == ("layer3", 8)
    reference = resnet18()
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(backbone.state_dict())
    for layer in (reference.layer3[0].conv1, reference.layer3[0].downsample[0]):
        layer.stride = (1, 1)
    expected = create_feature_extractor(reference.eval(), ["layer3"])(images)["layer3"]
    assert expected.shape == (1, 256, 8, 12)
    assert found(images).allclose(expected, atol=1e-5)
    assert FeatureMap(backbone, 16)(images).shape == (1, 256, 4, 6)
    assert backbone(images).equal(before)                    # its own strides are as they were
    assert AnySize(backbone)(images).equal(before)


@pytest.mark.parametrize(("arch", "stem", "stage", "stride"), [
    ("efficientnet_b0", "imagenet", "features.5", 8), ("squeezenet1_1", "imagenet", "features.12", 8),
    ("shufflenet_v2_x0_5", "imagenet", "stage3", 8), ("shufflenet_v2_x0_5", "cifar", "conv5", 8)])
def test_other_trunks(arch, stem, stage, stride):
    found = FeatureMap(build_backbone(arch, stem, 64).eval())
    assert (found.name, found.stride) == (stage, stride)
    assert 5 <= found(torch.randn(1, 3, 64, 64)).shape[2] <= 8  # SqueezeNet's poolings pad nothing


def test_trunks_without_a_map(monkeypatch):
    backbone = build_backbone("shufflenet_v2_x0_5", image_size=64).eval()
    monkeypatch.setattr("models.anysize._shapes", lambda _: {})
    with pytest.raises(UserError, match="no feature map"):
        FeatureMap(backbone)
