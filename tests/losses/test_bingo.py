"""BINGO beside its formula in loops; CutMix by counting pixels."""

import numpy as np
import pytest
import torch
from helpers.naive import Ring, info_nce, units

from common.distillation import views_of
from data.augment import draw_views
from losses.bingo import BINGO, cutmix
from losses.combine import Objective


def batch(step, count=5, b=3, d=4):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(b, d, dtype=torch.float64, generator=generator) for _ in range(count)]


def naive(student, teacher, queue, share, w, temperature):
    q, a, mixed, k, b = (units(x.tolist()) for x in (*student, *teacher))

    def ce(z, t):
        return info_nce(z, t, queue, temperature)

    total = sum(w[i][j] * ce(z, t) for i, z in enumerate((q, a)) for j, t in enumerate((k, b)))
    return (total + share * ce(mixed, k) + (1 - share) * ce(mixed, b)) / 3


@pytest.mark.parametrize("temperature", [0.2, 0.12])
@pytest.mark.parametrize(("epoch", "w"), [(0, ((1, 0), (0, 1))), (10, ((1, 0), (0, 1))), (11, ((.5, .5), (.5, .5)))])
def test_equals_the_loop(epoch, w, temperature):
    loss = BINGO(4, 7, temperature).double()
    loss.set_epoch(epoch)
    ring = Ring(loss.queue.items.tolist())
    for step in range(5):
        *student, k, b = batch(step)
        parts = loss(student=tuple(student), teacher=(k, b), share=0.3)
        assert parts["loss"].item() == pytest.approx(naive(student, (k, b), ring.rows, 0.3, w, temperature), rel=1e-11)
        thirds = sum(parts[name].item() for name in ("anchor", "neighbour", "mixed"))
        assert parts["loss"].item() == pytest.approx(thirds / 3, rel=1e-11)
        ring.put(units(k.tolist()))  # and nothing of b
        torch.testing.assert_close(loss.queue.items, torch.tensor(ring.rows, dtype=torch.float64))


def test_gradcheck():
    *student, k, b = (x.requires_grad_() for x in batch(0))

    def value(*outputs):
        torch.manual_seed(0)
        loss = BINGO(4, 5, bingo_alone=0).double()
        return loss(student=outputs, teacher=(k.detach(), b.detach()), share=0.7)["loss"]

    assert torch.autograd.gradcheck(value, tuple(student))


def test_each_view_is_made_at_the_size_of_the_network_that_sees_it():
    objective = Objective({"bingo": BINGO(4, 5)})
    sizes = [size for size, _ in draw_views(views_of("moco_v2", 32, 112, objective.needs), 0, np.arange(6))]
    assert sizes == [32, 112]
    inputs = objective.inputs([torch.zeros(6, 3, size, size, dtype=torch.uint8) for size in sizes])
    assert [x.shape for x in (*inputs.student, *inputs.teacher)] == [(3, 3, 32, 32)] * 3 + [(3, 3, 112, 112)] * 2


def test_pairs_are_taken_apart():
    """An image's number stands in all its pixels: 0, 2, 4 are anchors, 1, 3, 5 their neighbours; second views + 10."""
    first = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, 8, 8).contiguous()
    inputs = BINGO(4, 5).inputs([first, first], [first + 10, first + 10])
    numbers = [x[:, 0, 0, 0].tolist() for x in (*inputs.student[:2], *inputs.teacher)]
    assert numbers == [[0, 2, 4], [1, 3, 5], [10, 12, 14], [11, 13, 15]]
    mixed, share = inputs.student[2], inputs.context["share"]
    assert mixed.dtype == torch.uint8
    for row, anchor in enumerate((0, 2, 4)):
        assert (mixed[row] == anchor).float().mean().item() == pytest.approx(share, abs=1e-6)
        assert ((mixed[row] == anchor) | (mixed[row] == anchor + 1)).all()
    assert inputs.momentum == ()


@pytest.mark.parametrize("size", [(32, 32), (7, 13)])
def test_cutmix_says_the_share_of_pixels_that_is_left(size):
    ones, zeros, shares = torch.ones(2, 3, *size), torch.zeros(2, 3, *size), []
    for seed in range(200):
        torch.manual_seed(seed)
        mixed, share = cutmix(ones, zeros)
        assert mixed[0, 0].mean().item() == pytest.approx(share, abs=1e-6)
        assert torch.equal(mixed[0, 0], mixed[1, 2])
        box = (mixed[0, 0] == 0).nonzero()
        if len(box):  # a filled rectangle
            height, width = (box.amax(0) - box.amin(0) + 1).tolist()
            assert len(box) == height * width
        shares.append(share)
    assert (ones == 1).all()
    assert 0.5 < sum(shares) / len(shares) < 0.75  # one half by Beta(2, 2), more since boxes are cut off at the border
    assert min(shares) < 0.3
    assert max(shares) > 0.95


def test_cutmix_draws_from_torchs_generator():
    images, others = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        found.append(cutmix(images, others))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_published_defaults():
    loss = BINGO()
    assert (loss.queue.items.shape, loss.s_temp, loss.alone_epochs) == ((65536, 128), 0.2, 11)
