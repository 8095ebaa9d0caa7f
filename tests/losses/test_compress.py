"""CompRess beside the formula in loops: two queues of the same images, of different widths."""

import math

import pytest
import torch
from helpers.naive import Ring, dot, log_softmax, mean, units

from losses.compress import CompRess


def batch(step, b=3):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(b, d, dtype=torch.float64, generator=generator) for d in (2, 5, 2)]


def naive(student, teacher, theirs, ours, s_temp, t_temp):
    losses = []
    for s, t in zip(units(student), units(teacher), strict=True):
        log_p = log_softmax([dot(t, x) / t_temp for x in theirs])
        log_q = log_softmax([dot(s, x) / s_temp for x in ours])
        losses.append(math.fsum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
    return mean(losses)


@pytest.mark.parametrize(("s_temp", "t_temp"), [(0.04, 0.04), (0.2, 0.1)])
def test_equals_the_loop_over_what_was_put_in(s_temp, t_temp):
    loss = CompRess(5, 2, 7, s_temp, t_temp).double()
    theirs, ours = Ring([[0.0] * 5] * 7), Ring([[0.0] * 2] * 7)
    for step in range(6):
        student, teacher, momentum = batch(step)
        value = loss(student=student, teacher=teacher, momentum=momentum)["loss"].item()
        filled = theirs.filled(), ours.filled()
        expected = naive(student.tolist(), teacher.tolist(), *filled, s_temp, t_temp) if step else 0
        assert value == pytest.approx(expected, rel=1e-10, abs=1e-12)
        theirs.put(units(teacher.tolist()))
        ours.put(units(momentum.tolist()))


def test_noise_teaches_nothing_at_first():
    loss, (student, teacher, momentum) = CompRess(5, 2, 7).double(), batch(0)
    parts = loss(student=student.requires_grad_(), teacher=teacher, momentum=momentum)
    parts["loss"].backward()
    assert parts["loss"].item() == 0
    assert (student.grad == 0).all()


@pytest.mark.parametrize("steps", [1, 4])
def test_gradcheck(steps):
    filled = CompRess(5, 2, 7, 0.3, 0.2).double()
    for step in range(steps):
        student, teacher, momentum = batch(step)
        filled(student=student, teacher=teacher, momentum=momentum)

    def value(s):
        loss = CompRess(5, 2, 7, 0.3, 0.2).double()
        loss.load_state_dict(filled.state_dict())
        return loss(student=s, teacher=teacher, momentum=momentum)["loss"]

    assert torch.autograd.gradcheck(value, batch(9)[0].requires_grad_())


def test_published_defaults():
    loss = CompRess(dim=3, student_dim=2)
    assert (len(loss.theirs), len(loss.ours), loss.s_temp, loss.t_temp) == (128000, 128000, 0.04, 0.04)
