"""The start of a student's head around the teacher's outputs, compared with the moments written out in float64."""

import numpy as np
import pytest
import torch
from torch import nn

from models.head_init import last_linear, match_teacher
from models.heads import build_head


def moments(x):
    x = np.asarray(x, dtype=np.float64)
    mean = x.sum(0) / len(x)
    return mean, np.sqrt(sum(((row - mean) ** 2).sum() for row in x) / len(x))


def test_outputs_get_the_targets_mean_and_spread_and_keep_their_shape():
    torch.manual_seed(0)
    layer, inputs, targets = nn.Linear(5, 3), torch.randn(40, 5), 7 * torch.randn(40, 3) + 20
    with torch.no_grad():
        before = layer(inputs)
        match_teacher(layer, before, targets)
        after = layer(inputs)
    (mean, spread), (wanted, wide) = moments(after), moments(targets)
    assert mean == pytest.approx(wanted, rel=1e-5)
    assert spread == pytest.approx(wide, rel=1e-5)
    old, old_spread = moments(before)
    assert (after.numpy() - mean) / spread == pytest.approx((before.numpy() - old) / old_spread, abs=1e-5)


def test_without_a_bias_only_the_spread_is_set():
    torch.manual_seed(0)
    layer, inputs, targets = nn.Linear(5, 3, bias=False), torch.randn(40, 5), 7 * torch.randn(40, 3)
    with torch.no_grad():
        match_teacher(layer, layer(inputs), targets)
        assert moments(layer(inputs))[1] == pytest.approx(moments(targets)[1], rel=1e-5)


@pytest.mark.parametrize("equal", ["outputs", "targets"])
def test_what_is_equal_for_all_images_has_no_spread_to_set(equal):
    layer, inputs, targets = nn.Linear(5, 3), torch.randn(40, 5), torch.randn(40, 3)
    inputs, targets = (inputs[:1].expand(40, 5), targets) if equal == "outputs" else (inputs, targets[:1].expand(40, 3))
    weight = layer.weight.clone()
    with torch.no_grad():
        match_teacher(layer, layer(inputs), targets)
        assert moments(layer(inputs))[0] == pytest.approx(moments(targets)[0], rel=1e-4, abs=1e-5)
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize(("name", "out", "batch_norm", "linear"), [
    ("projection", 4, False, True), ("projection", 8, False, False), ("mlp", 4, False, True), ("mlp", 4, True, False),
    ("linear", 4, False, True), ("none", 8, False, False), ("wide", 4, False, True)])
def test_heads_that_end_in_a_linear_layer(name, out, batch_norm, linear):
    layer = last_linear(build_head(name, 8, out, batch_norm))
    assert (layer is not None) == linear
    assert layer is None or layer.out_features == out
