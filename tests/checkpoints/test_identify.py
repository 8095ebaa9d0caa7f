"""Architectures are told from names and shapes alone, each from every other."""

import pytest
import torch
import torchvision
from torch import Size

from checkpoints.identify import Identity, identify, near_miss, trunk_shapes
from models.backbones import arch_names
from models.vit import VITS

FAMILIES = ["resnet18", "resnet34", "resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d", "vgg11", "vgg11_bn",
            "alexnet", "squeezenet1_0", "squeezenet1_1", "densenet121", "mobilenet_v2", "mobilenet_v3_small",
            "mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s", "shufflenet_v2_x1_0",
            "convnext_tiny", "swin_t", "mnasnet1_0", "googlenet", "inception_v3"]


def shapes_of(arch):
    """torchvision's own, without the memory, and without its classifier."""
    with torch.device("meta"):
        options = {"init_weights": False} if arch in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(arch, **options)
    last = [name for name, child in model.named_children() if list(child.parameters())][-1]
    tensors = model.state_dict()
    kept = {k for k in tensors if not k.startswith(f"{last}.") or tensors[k].ndim < 2 and "norm" in k}
    if arch == "convnext_tiny":  # a norm of the trunk lies in the classifier
        kept |= {"classifier.0.weight", "classifier.0.bias"}
    return {k: v.shape for k, v in tensors.items() if k in kept}


@pytest.mark.parametrize("arch", FAMILIES)
def test_torchvision(arch):
    assert [x.arch for x in identify(shapes_of(arch))] == [arch]


def test_batch_norm_counters_may_be_missing():
    shapes = {k: v for k, v in shapes_of("resnet18").items() if "num_batches" not in k}
    assert identify(shapes) == [Identity("resnet18", "imagenet", 224)]


def test_a_tensor_more_or_less_is_no_match():
    shapes = shapes_of("resnet18")
    assert not identify({**shapes, "layer5.weight": Size([1])})
    assert not identify({k: v for k, v in shapes.items() if k != "layer3.0.bn1.running_var"})
    assert not identify({**shapes, "layer3.0.conv1.weight": Size([256, 128, 3, 1])})
    assert "nearest is resnet18" in near_miss({**shapes, "layer5.weight": Size([1])})


@pytest.mark.parametrize("size", [32, 224])
@pytest.mark.parametrize("arch", [x for x in VITS if x != "vit_s_16_12h"])
def test_transformers_and_their_image_size(arch, size):
    shapes, _ = trunk_shapes(Identity(arch, "imagenet", size))
    assert identify(shapes)[0] == Identity(arch, "imagenet", size)


def test_twins_come_out_both_the_hinted_first():
    shapes, _ = trunk_shapes(Identity("vit_s_16", "imagenet", 32))
    assert [x.arch for x in identify(shapes)] == ["vit_s_16", "vit_s_16_12h"]
    assert [x.arch for x in identify(shapes, ["vit_s_16_12h"])] == ["vit_s_16_12h", "vit_s_16"]


def test_a_wrong_hint_does_no_harm():
    assert identify(shapes_of("resnet18"), ["resnet50", "no_such"])[0].arch == "resnet18"


def test_names_alone_are_all_buildable():
    assert set(FAMILIES) < set(arch_names())
