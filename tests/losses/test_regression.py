"""`cosine` and `mse` against loops in Python's own floats."""

import math

import pytest
import torch

from losses.coss import CoSS
from losses.regression import MSE, Cosine

SHAPES = [(1, 1), (1, 7), (2, 1), (3, 5), (5, 3), (16, 33)]


def naive_cosine(teacher, student):
    values = []
    for t, s in zip(teacher, student, strict=True):
        dot = math.fsum(a * b for a, b in zip(t, s, strict=True))
        values.append(1 - dot / math.sqrt(math.fsum(a * a for a in t) * math.fsum(b * b for b in s)))
    return math.fsum(values) / len(values)


def naive_mse(teacher, student):
    squares = [(a - b) ** 2 for t, s in zip(teacher, student, strict=True) for a, b in zip(t, s, strict=True)]
    return math.fsum(squares) / len(squares)


def pair(b, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, b, d, dtype=torch.float64, generator=generator).unbind()


@pytest.mark.parametrize(("kind", "naive"), [(Cosine, naive_cosine), (MSE, naive_mse)])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_double_loop(shape, kind, naive):
    teacher, student = pair(*shape)
    value = kind()(student=student, teacher=teacher)["loss"].item()
    assert value == pytest.approx(naive(teacher.tolist(), student.tolist()), rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("kind", [Cosine, MSE])
def test_gradcheck(kind):
    teacher, student = pair(4, 5)
    assert torch.autograd.gradcheck(lambda s: kind()(student=s, teacher=teacher)["loss"], student.requires_grad_())


def test_cosine_is_cosss_row_term_without_its_scale():
    teacher, student = pair(6, 5)
    row = CoSS(s_temp=0.5, t_temp=0.25)(student=student, teacher=teacher)["row"].item()
    assert Cosine()(student=student, teacher=teacher)["loss"].item() == pytest.approx(1 + row / 8, rel=1e-13)


def test_what_each_ignores_and_bounds():
    teacher, student = pair(6, 5)
    cosine, mse = Cosine(), MSE()
    plain = cosine(student=student, teacher=teacher)["loss"].item()
    assert cosine(student=7 * student, teacher=teacher / 3)["loss"].item() == pytest.approx(plain, rel=1e-12)
    assert cosine(student=3 * teacher, teacher=teacher)["loss"].item() == pytest.approx(0, abs=1e-14)
    assert cosine(student=-teacher, teacher=teacher)["loss"].item() == pytest.approx(2, rel=1e-13)
    assert mse(student=teacher, teacher=teacher)["loss"] == 0
    moved = mse(student=student + 3, teacher=teacher + 3)["loss"].item()
    assert moved == pytest.approx(mse(student=student, teacher=teacher)["loss"].item(), rel=1e-12)
