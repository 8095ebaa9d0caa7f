"""DIST against loops written from the formula in Python's own floats, and its correlation against NumPy's."""

import math

import numpy as np
import pytest
import torch

from losses.dist import DIST
from losses.dist import pearson as by_column
from runtime.collectives import BatchStatistics

SHAPES = [(2, 2), (3, 5), (5, 3), (16, 33), (33, 16)]
OPTIONS = [(1.0, 1.0, 0.1, 0.07), (1.0, 0.5, 1.0, 1.0), (0.3, 2.5, 0.5, 0.04)]


def softmax(values, temperature):
    top = max(values)
    powers = [math.exp((v - top) / temperature) for v in values]
    return [p / math.fsum(powers) for p in powers]


def correlation(x, y):
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    covariance = math.fsum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(math.fsum((a - mean_x) ** 2 for a in x) * math.fsum((b - mean_y) ** 2 for b in y))


def naive(teacher, student, s_temp, t_temp):
    """Mean over rows of 1 - correlation of the softmaxes."""
    rows = [1 - correlation(softmax(s, s_temp), softmax(t, t_temp)) for t, s in zip(teacher, student, strict=True)]
    return math.fsum(rows) / len(rows)


def pearson(x, y):
    """Of rows."""
    return by_column(x.T, y.T, BatchStatistics("local"))


def pair(b, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, b, d, dtype=torch.float64, generator=generator).unbind()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_double_loop(shape, options):
    teacher, student = pair(*shape)
    l_0, l_1, *temperatures = options
    row = naive(teacher.tolist(), student.tolist(), *temperatures)
    space = naive(teacher.T.tolist(), student.T.tolist(), *temperatures)
    parts = DIST(*options)(student=student, teacher=teacher)
    assert parts["row"].item() == pytest.approx(row, rel=1e-11, abs=1e-12)
    assert parts["space"].item() == pytest.approx(space, rel=1e-11, abs=1e-12)
    assert parts["loss"].item() == pytest.approx(l_0 * row + l_1 * space, rel=1e-11, abs=1e-12)


def test_the_temperatures_are_not_swapped():
    teacher, student = pair(6, 5)
    right = naive(teacher.tolist(), student.tolist(), 0.9, 0.1)
    swapped = naive(student.tolist(), teacher.tolist(), 0.9, 0.1)
    row = DIST(s_temp=0.9, t_temp=0.1)(student=student, teacher=teacher)["row"].item()
    assert row == pytest.approx(right, rel=1e-11)
    assert abs(row - swapped) > 1e-3


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (4, 5)])
def test_gradcheck(shape):
    teacher, student = pair(*shape)
    loss = DIST(0.7, 1.3, 0.5, 0.6)
    assert torch.autograd.gradcheck(lambda s: loss(student=s, teacher=teacher)["loss"], student.requires_grad_())


def test_pearson_is_numpys():
    x, y = pair(7, 9)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(x.numpy(), y.numpy(), strict=True)]
    assert pearson(x, y).tolist() == pytest.approx(expected, rel=1e-12)


def test_pearson_of_small_numbers_is_not_drawn_to_zero():
    x, y = pair(7, 9)
    torch.testing.assert_close(pearson(1e-6 * x + 1e-6, 1e-7 * y), pearson(x, y), rtol=1e-9, atol=0)


@pytest.mark.parametrize("constant", [0.0, 1 / 3, 1e-3, 7e5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_row_correlates_with_nothing_and_has_no_slope(constant, dtype):
    x, y = (v.to(dtype) for v in pair(4, 129))
    x[1] = constant
    x.requires_grad_()
    value = pearson(x, y)
    assert value[1] == 0
    value.sum().backward()
    assert (x.grad[1] == 0).all()
    assert (x.grad[0] != 0).any()
    assert torch.isfinite(x.grad).all()


def test_bounds_and_what_a_correlation_ignores():
    teacher, student = pair(6, 5)
    same = DIST(s_temp=0.5, t_temp=0.5)(student=teacher, teacher=teacher)
    assert same["loss"].item() == pytest.approx(0, abs=1e-14)
    plain = DIST(s_temp=0.5, t_temp=0.5)(student=student, teacher=teacher)
    assert 0 < plain["row"] < 2
    assert 0 < plain["space"] < 2
    moved = DIST(s_temp=0.5, t_temp=0.5)(student=student + torch.arange(6.0, dtype=torch.float64)[:, None],
                                         teacher=teacher)
    assert moved["row"].item() == pytest.approx(plain["row"].item(), rel=1e-12)  # a softmax sees no shift of its row
    assert abs(moved["space"].item() - plain["space"].item()) > 1e-3
