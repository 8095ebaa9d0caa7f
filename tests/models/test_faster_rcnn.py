"""A detector around our trunks: its weights, its pyramid, its normalisation, what trains."""

import pytest
import torch
from helpers.sources import randomise
from torch import nn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from models.backbones import build_backbone
from models.faster_rcnn import faster_rcnn, freeze_norm, parameter_groups
from runtime.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture(scope="module")
def trunk():
    trunk = build_backbone("resnet18", image_size=64)
    randomise(trunk)
    return trunk


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def test_a_fixed_scale_is_batch_norm_in_evaluation(trunk, images):
    fixed = build_backbone("resnet18", image_size=64)
    fixed.load_state_dict(trunk.state_dict())
    freeze_norm(fixed)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fixed.modules())
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in fixed.modules()) == 20
    with torch.no_grad():
        torch.testing.assert_close(fixed.train()(images), trunk.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_the_pyramid_stands_on_the_trunk(trunk, images, norm):
    """Against torchvision's own builder with the same weights."""
    ours = build_backbone("resnet18", image_size=64)
    ours.load_state_dict(trunk.state_dict())
    detector = faster_rcnn(ours, MEAN, STD, classes=3, norm=norm).eval()
    theirs = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d).eval()
    theirs.body.load_state_dict(trunk.state_dict())
    with torch.no_grad():
        stages = [detector.backbone.body(images), theirs.body(images)]
        assert list(stages[0]) == ["0", "1", "2", "3"]
        for name in stages[0]:
            torch.testing.assert_close(stages[0][name], stages[1][name], rtol=1e-4, atol=1e-5)
        maps = detector.backbone(images)
    assert {name: tuple(value.shape[1:]) for name, value in maps.items()} == {
        "0": (256, 16, 24), "1": (256, 8, 12), "2": (256, 4, 6), "3": (256, 2, 3), "pool": (256, 1, 2)}
    assert any("running_mean" in name for name in detector.backbone.fpn.state_dict()) is (norm == "batch")
    frozen = {name.partition(".")[0] for name, p in detector.backbone.body.named_parameters() if not p.requires_grad}
    assert frozen == ({"conv1", "layer1"} if norm == "frozen" else set())
    assert detector.roi_heads.box_predictor.cls_score.out_features == 4  # and the background


def test_images_are_normalised_as_the_student_saw_them(trunk):
    detector = faster_rcnn(trunk, MEAN, STD, classes=2, sizes=(32, 48), longest=60).eval()
    image = torch.full((3, 96, 192), 0.6)
    seen, _ = detector.transform([image])
    assert seen.image_sizes == [(30, 60)]  # the last size, 48, would make the longer side 96
    inside = seen.tensors[0, :, :30, :60]
    expected = (0.6 - torch.tensor(MEAN)) / torch.tensor(STD)
    torch.testing.assert_close(inside, expected[:, None, None].expand_as(inside), rtol=1e-4, atol=1e-4)


def test_norms_have_no_weight_decay(trunk):
    detector = faster_rcnn(trunk, MEAN, STD, classes=2)
    with_decay, without = parameter_groups(detector)
    assert without["weight_decay"] == 0
    assert {p.ndim for p in without["params"]} == {1}
    assert len(without["params"]) == 2 * sum(isinstance(m, nn.BatchNorm2d) for m in detector.modules())
    assert len(with_decay["params"]) + len(without["params"]) == len(list(detector.parameters()))


def test_bottlenecks_have_wider_maps():
    detector = faster_rcnn(build_backbone("resnet50", image_size=64), MEAN, STD, classes=2)
    assert [block[0].in_channels for block in detector.backbone.fpn.inner_blocks] == [256, 512, 1024, 2048]


def test_networks_that_it_cannot_stand_on():
    with pytest.raises(UserError, match="--weights is a squeezenet1_1, expected a ResNet"):
        faster_rcnn(build_backbone("squeezenet1_1", image_size=64), MEAN, STD, classes=2)
    with pytest.raises(UserError, match="has the stem cifar"):
        faster_rcnn(build_backbone("resnet18", "cifar", 32), MEAN, STD, classes=2)
