"""`dino` and `dinoss` against loops written from the formula in Python's own floats."""

import math

import pytest
import torch

from losses.dino import DINO, DINOSS

SHAPES = [(1, 1), (1, 7), (2, 2), (3, 5), (5, 3), (16, 33), (33, 16)]
TEMPERATURES = [(0.1, 0.07), (1.0, 1.0), (0.5, 0.04)]


def softmax(values, temperature):
    top = max(values)
    powers = [math.exp((v - top) / temperature) for v in values]
    return [p / math.fsum(powers) for p in powers]


def log_softmax(values, temperature):
    top = max(values)
    total = math.log(math.fsum(math.exp((v - top) / temperature) for v in values))
    return [(v - top) / temperature - total for v in values]


def naive(teacher, student, s_temp, t_temp):
    """Mean over rows of the cross-entropy, element by element."""
    rows = [-math.fsum(p * q for p, q in zip(softmax(t, t_temp), log_softmax(s, s_temp), strict=True))
            for t, s in zip(teacher, student, strict=True)]
    return math.fsum(rows) / len(rows)


def pair(b, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, b, d, dtype=torch.float64, generator=generator).unbind()


@pytest.mark.parametrize("temperatures", TEMPERATURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_double_loop(shape, temperatures):
    teacher, student = pair(*shape)
    row = naive(teacher.tolist(), student.tolist(), *temperatures)
    space = naive(teacher.T.tolist(), student.T.tolist(), *temperatures)
    plain = DINO(*temperatures)(student=student, teacher=teacher)
    assert plain["loss"].item() == pytest.approx(row, rel=1e-12, abs=1e-13)
    both = DINOSS(s_temp=temperatures[0], t_temp=temperatures[1])(student=student, teacher=teacher)
    assert both["row"].item() == pytest.approx(row, rel=1e-12, abs=1e-13)
    assert both["space"].item() == pytest.approx(space, rel=1e-12, abs=1e-13)
    assert both["loss"].item() == pytest.approx(row + 0.5 * space, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("kind", [DINO, DINOSS])
@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (4, 5)])
def test_gradcheck(kind, shape):
    teacher, student = pair(*shape)
    assert torch.autograd.gradcheck(lambda s: kind(s_temp=0.5, t_temp=0.6)(student=s, teacher=teacher)["loss"],
                                    student.requires_grad_())


def test_least_where_the_distributions_agree_and_there_it_is_the_teachers_entropy():
    teacher, student = pair(6, 5)
    loss = DINO(0.3, 0.6)
    perfect = loss(student=teacher / 2 + 7, teacher=teacher)  # half the values at half the temperature, and moved
    assert perfect["loss"].item() == pytest.approx(perfect["entropy"].item(), rel=1e-12)
    other = loss(student=student, teacher=teacher)
    assert other["entropy"].item() == pytest.approx(perfect["entropy"].item(), rel=1e-12)
    assert other["loss"] > other["entropy"] + 0.1


def test_each_has_its_own_temperature():
    teacher, student = pair(6, 5)
    assert DINO(0.1, 0.9)(student=student, teacher=teacher)["loss"] != DINO(0.9, 0.1)(
        student=student, teacher=teacher)["loss"]


@pytest.mark.parametrize("kind", [DINO, DINOSS])
def test_large_features_do_not_overflow(kind):
    teacher, student = (1e4 * x.float() for x in pair(6, 5))
    student.requires_grad_()
    loss = kind()(student=student, teacher=teacher)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
