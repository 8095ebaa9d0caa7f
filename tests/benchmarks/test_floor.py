"""Operations and bytes on paper against figures that are not ours: torchvision's own, and sums done by hand."""

import sys
from pathlib import Path

import pytest
from torch import nn
from torchvision import models

from models.backbones import build_backbone

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from floor import activations, flop  # noqa: E402


@pytest.mark.parametrize(("arch", "weights"), [("resnet18", models.ResNet18_Weights),
                                               ("resnet50", models.ResNet50_Weights)])
def test_operations_are_twice_the_products_that_torchvision_states(arch, weights):
    network = build_backbone(arch, image_size=224).eval().to("meta")
    classifier = 1e-9 * 1000 * network.spec.feature_dim
    products = weights.IMAGENET1K_V1.meta["_ops"] - classifier
    assert flop(network, 224, trains=False) == pytest.approx(2e9 * products, rel=0.01)


def test_bytes_of_a_network_by_hand():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)).eval().to("meta")
    image, half, quarter = 3 * 16 * 16, 8 * 8 * 8, 8 * 4 * 4
    assert activations(network, 16, norms=False) == 2 * (image + half + half + quarter)
    assert activations(network, 16, norms=True) == 2 * (image + half + 2 * half + half + quarter)
    assert flop(network[0], 16, trains=False) == 2 * half * 27
