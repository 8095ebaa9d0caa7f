"""MoCo and DisCo beside their formulas in loops, over several steps in which the queue goes around."""

import pytest
import torch
from helpers.naive import Ring, dot, info_nce, mean, squared_distance, units

from losses.disco import DisCo
from losses.moco import MoCo


def batch(step, count, b=3, d=4):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(b, d, dtype=torch.float64, generator=generator) for _ in range(count)]


def hits(rows, positives, queue):
    return mean(all(dot(z, p) > dot(z, n) for n in queue) for z, p in zip(rows, positives, strict=True))


@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_moco_equals_the_loop(temperature):
    loss = MoCo(4, 7, temperature).double()
    ring = Ring(loss.queue.items.tolist())
    for step in range(6):
        q, k = batch(step, 2)
        parts = loss(student=q, momentum=k)
        rows, keys = units(q.tolist()), units(k.tolist())
        assert parts["loss"].item() == pytest.approx(info_nce(rows, keys, ring.rows, temperature), rel=1e-11)
        assert parts["accuracy"].item() == pytest.approx(hits(rows, keys, ring.rows))
        ring.put(keys)
        torch.testing.assert_close(loss.queue.items, torch.tensor(ring.rows, dtype=torch.float64))


@pytest.mark.parametrize(("weight", "summed"), [(32.0, False), (0.5, False), (32.0, True)])
def test_disco_equals_the_loop(weight, summed):
    loss = DisCo(4, 7, 0.2, weight, summed).double()
    ring = Ring(loss.queue.items.tolist())
    for step in range(4):
        s1, s2, t1, t2, k = batch(step, 5)
        parts = loss(student=(s1, s2), teacher=(t1, t2), momentum=k)
        s1, s2, t1, t2, k = (units(x.tolist()) for x in (s1, s2, t1, t2, k))
        squares = [squared_distance(a, b) + squared_distance(c, d) for a, b, c, d in zip(t1, s1, t2, s2, strict=True)]
        moco = info_nce(s1, k, ring.rows, 0.2)
        expected = moco + (sum(squares) if summed else weight * mean(squares))
        assert parts["loss"].item() == pytest.approx(expected, rel=1e-11)
        assert parts["moco"].item() == pytest.approx(moco, rel=1e-11)
        assert parts["distance"].item() == pytest.approx(mean(squares), rel=1e-11)
        ring.put(k)


def test_discos_default_weight_is_the_originals_sum_over_32_images_a_gpu():
    outputs = batch(0, 5, b=32)
    values = []
    for summed in (False, True):
        torch.manual_seed(0)
        loss = DisCo(4, 7, disco_sum=summed).double()
        values.append(loss(student=outputs[:2], teacher=outputs[2:4], momentum=outputs[4])["loss"].item())
    assert values[0] == pytest.approx(values[1], rel=1e-12)


def test_gradcheck():
    s1, s2, t1, t2, k = batch(0, 5)

    def moco(s):
        torch.manual_seed(0)
        return MoCo(4, 5).double()(student=s, momentum=k)["loss"]

    def disco(a, b):
        torch.manual_seed(0)
        return DisCo(4, 5).double()(student=(a, b), teacher=(t1, t2), momentum=k)["loss"]

    s1.requires_grad_()
    s2.requires_grad_()
    assert torch.autograd.gradcheck(moco, s1)
    assert torch.autograd.gradcheck(disco, (s1, s2))


def test_who_sees_what():
    views = [torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)]
    for loss, seen in ((MoCo(4, 5), "0 - 1"), (DisCo(4, 5), "01 23 1")):
        inputs = loss.inputs(views, [x + 2 for x in views])
        said = ["".join(str(int(x.mean())) for x in role) or "-" for role in
                (inputs.student, inputs.teacher, inputs.momentum)]
        assert " ".join(said) == seen


def test_published_defaults():
    for loss in (MoCo(), DisCo()):
        assert (loss.queue.items.shape, loss.s_temp) == ((65536, 128), 0.2)
    assert (DisCo().weight, DisCo().summed) == (32, False)
    assert DisCo(disco_sum=True).per_process
    assert not DisCo().per_process
