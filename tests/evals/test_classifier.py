import pytest
import torch
from torch import nn

from evals.classifier import IGNORED, classification_parts, fingerprint, labels_of, linear_head


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.register_buffer("shift", torch.zeros(3), persistent=False)

    def forward(self, x):
        return self.bn(self.conv(x - self.shift[:, None, None]))


def test_a_frozen_network_keeps_its_fingerprint_and_each_change_shows():
    net = Net().eval()
    before = fingerprint(net)
    net(torch.randn(2, 3, 8, 8))
    assert fingerprint(net) == before
    net.train()
    net(torch.randn(2, 3, 8, 8))  # moves the running statistics, no gradient needed
    after = fingerprint(net)
    assert after != before
    with torch.no_grad():
        net.conv.weight[0, 0, 0, 0] = torch.nextafter(net.conv.weight[0, 0, 0, 0], torch.tensor(9.0))
    assert fingerprint(net) != after
    after = fingerprint(net)
    net.shift += 1
    assert fingerprint(net) != after


def test_zero_and_minus_zero_are_different_bits():
    layer = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
        before = fingerprint(layer)
        layer.weight.neg_()
    assert fingerprint(layer) != before


def test_the_head_is_mocos():
    head = linear_head(2000, 50)
    assert head.weight.detach().std() == pytest.approx(0.01, rel=0.02)
    assert (head.bias == 0).all()


def test_images_that_could_not_be_opened_have_no_part():
    label_of = labels_of(torch.tensor([3, 1, 2]))
    labels = label_of(torch.tensor([2, 0, 2, 1]), [(2, "damaged")])
    assert labels.tolist() == [IGNORED, 3, IGNORED, 1]
    logits = torch.randn(4, 4, dtype=torch.float64)
    logits[1, 3] += 9
    logits[3] = torch.tensor([9.0, 0, 0, 0])
    parts = classification_parts(logits, labels)
    expected = -logits[[1, 3]].log_softmax(1)[[0, 1], [3, 1]].mean()
    assert parts["loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert parts["top1"] == 50
    assert label_of(torch.tensor([2]), []).tolist() == [2]  # the labels themselves were not touched
