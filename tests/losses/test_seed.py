"""SEED beside the formula in loops, over several steps in which its queue goes around."""

import pytest
import torch
from helpers.naive import Ring, dot, log_softmax, mean, units

from losses.seed import SEED


def batch(step, b=3, d=4, width=4):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(b, w, dtype=torch.float64, generator=generator) for w in (d, width)]


def naive(student, teacher, queue, s_temp, t_temp):
    """(loss, entropy of the targets)."""
    losses, entropies = [], []
    for s, t in zip(units(student), units(teacher), strict=True):
        log_q = log_softmax([dot(s, t) / s_temp, *(dot(s, x) / s_temp for x in queue)])
        log_p = log_softmax([dot(t, t) / t_temp, *(dot(t, x) / t_temp for x in queue)])
        p = [torch.tensor(x, dtype=torch.float64).exp().item() for x in log_p]
        losses.append(-dot(p, log_q))
        entropies.append(-dot(p, [max(x, -1e9) for x in log_p]))
    return mean(losses), mean(entropies)


@pytest.mark.parametrize(("s_temp", "t_temp"), [(0.2, 1e-4), (0.2, 0.1), (1.0, 0.5)])
def test_equals_the_loop_while_the_queue_goes_around(s_temp, t_temp):
    loss = SEED(4, 7, s_temp, t_temp).double()
    ring = Ring(loss.queue.items.tolist())
    for step in range(6):
        student, teacher = batch(step)
        parts = loss(student=student, teacher=teacher)
        expected = naive(student.tolist(), teacher.tolist(), ring.rows, s_temp, t_temp)
        assert parts["loss"].item() == pytest.approx(expected[0], rel=1e-10)
        assert parts["entropy"].item() == pytest.approx(expected[1], rel=1e-8, abs=1e-9)
        ring.put(units(teacher.tolist()))
        torch.testing.assert_close(loss.queue.items, torch.tensor(ring.rows, dtype=torch.float64))


def test_gradcheck():
    student, teacher = batch(0)
    start = SEED(4, 5, 0.2, 0.1).double().state_dict()

    def value(s):
        loss = SEED(4, 5, 0.2, 0.1).double()
        loss.load_state_dict(start)
        return loss(student=s, teacher=teacher)["loss"]

    assert torch.autograd.gradcheck(value, student.requires_grad_())


def test_is_least_where_the_student_has_the_teachers_similarities():
    student, teacher = batch(0)
    loss = SEED(4, 50, 0.1, 0.1).double()
    parts = loss(student=3 * teacher, teacher=teacher)
    assert parts["loss"].item() == pytest.approx(parts["entropy"].item(), rel=1e-10)
    assert loss(student=student, teacher=teacher)["loss"] > parts["loss"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    loss = SEED(4, 7)
    student, teacher = (x.to(dtype).requires_grad_() for x in batch(0))
    with torch.autocast("cpu", torch.bfloat16):
        parts = loss(student=student, teacher=teacher.detach())
    assert parts["loss"].dtype == torch.float32
    (parts["loss"] * 1024).backward()
    assert torch.isfinite(student.grad).all()
    assert loss.queue.items.dtype == torch.float32


def test_published_defaults():
    loss = SEED(dim=8)
    assert (len(loss.queue), loss.s_temp, loss.t_temp) == (65536, 0.2, 1e-4)
