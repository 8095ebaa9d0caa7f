"""Batch norm folded into the convolution before it: the same features, the same names, and only where it may be."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.backbones import build_backbone
from models.fold import fold_batch_norm
from models.teachers import FrozenEncoder

# trunk -> (batch norms behind a convolution, batch norms in all)
TRUNKS = {"resnet18": (20, 20), "shufflenet_v2_x0_5": (56, 56), "mobilenet_v3_small": (34, 34), "mnasnet0_5": (52, 52),
          "regnet_y_400mf": (53, 53), "densenet121": (59, 121), "googlenet": (57, 57), "vit_ti_16": (0, 0),
          "squeezenet1_1": (0, 0)}


def with_statistics(network):
    """As after a training: no norm is an identity."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
    return network.eval().requires_grad_(False)


def norms(network):
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


@pytest.mark.parametrize("arch", TRUNKS)
def test_features_stay_within_a_hundred_thousandth(arch):
    network = with_statistics(build_backbone(arch, image_size=32))
    before, images = copy.deepcopy(network.state_dict()), torch.randn(2, 3, 32, 32)
    folded, count = fold_batch_norm(network)
    assert (count, norms(network)) == TRUNKS[arch]
    assert norms(folded) == norms(network) - count
    expected, found = network(images), folded(images)
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    assert folded.spec == network.spec
    assert not any(p.requires_grad for p in folded.parameters())
    for name, value in network.state_dict().items():  # the original is left alone
        assert torch.equal(value, before[name])


class Awkward(nn.Module):
    """Norms that may not be folded, and one that may."""

    def __init__(self):
        super().__init__()
        self.shared, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.seen, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.unkept = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
        self.first = nn.BatchNorm2d(3)
        self.good = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3, bias=True), nn.BatchNorm2d(6, affine=False))

    def forward(self, x):
        x = self.two(self.shared(self.one(self.shared(x))))       # one convolution, two norms
        y = self.seen(x)
        x = self.norm(y) + y                                      # something else sees the convolution's output
        return F.relu(self.good(self.first(F.relu(self.unkept(x)))))


def test_only_what_alone_follows_a_convolution_is_folded():
    network = with_awkward_statistics(Awkward())
    folded, count = fold_batch_norm(network)
    assert count == 1
    assert isinstance(folded.good[1], nn.Identity)
    images = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(folded(images), network(images), rtol=1e-5, atol=1e-6)


def with_awkward_statistics(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
    return network.eval()


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    def forward(self, x):
        return self.net(x) if x.sum() > 0 else x


def test_what_cannot_be_traced_stays_as_it_is():
    network = with_statistics(Untraceable())
    folded, count = fold_batch_norm(network)
    assert count == 0
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(folded(images), network(images))


def test_a_teacher_folds_its_trunk_and_its_answers_may_be_kept_by_a_graph():
    backbone = with_statistics(build_backbone("resnet18", image_size=32))
    head = nn.Linear(512, 7)
    teacher, plain = (FrozenEncoder(copy.deepcopy(backbone), head=copy.deepcopy(head)) for _ in range(2))
    assert teacher.fold() == 20
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    kinds = ("features", "head")
    for found, expected in zip(teacher.targets(images, kinds), plain.targets(images, kinds), strict=True):
        assert (found - expected).norm() <= 1e-5 * expected.norm()
        scale = torch.ones((), requires_grad=True)
        (found * scale).sum().backward()
        assert torch.isfinite(scale.grad)
    assert torch.equal(plain(images), plain.targets(images, ("features",))[0])


def test_a_teacher_that_goes_by_batch_statistics_is_not_folded():
    teacher = FrozenEncoder(build_backbone("resnet18", image_size=32))
    teacher.use_batch_statistics()
    assert teacher.fold() == 0
    assert norms(teacher) == 20
