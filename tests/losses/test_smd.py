"""SMD against loops written from the formula in Python's own floats; one process against two."""

import math

import pytest
import torch
from helpers.ranks import on_ranks

from losses.smd import SMD
from runtime.device import all_reduce_mean

SHAPES = [(1, 3), (2, 2), (3, 5), (5, 3), (16, 8), (24, 33)]


def length(x):
    return math.sqrt(math.fsum(a * a for a in x))


def unit_rows(rows):
    return [[a / length(row) for a in row] for row in rows]


def gap(x, y):
    return length([a - b for a, b in zip(x, y, strict=True)])


def naive_view(teacher, student, tau, anchors=None):
    """The cross-entropy of one view, image by image; ``anchors``: over these only."""
    t, s = unit_rows(teacher), unit_rows(student)
    values = []
    for i in anchors if anchors is not None else range(len(t)):
        negatives = [j for j in range(len(t)) if gap(t[i], t[j]) > gap(t[i], s[i])]
        positives = [j for j in range(len(t)) if j not in negatives]
        assert i in positives
        ap = max(positives, key=lambda j: gap(t[i], s[j]))
        d_ap = gap(t[i], s[ap])
        positive = max(0.0, d_ap - gap(t[i], t[ap])) * d_ap / tau
        negative = 0.0
        if negatives:
            an = min(negatives, key=lambda j: gap(t[i], s[j]))
            d_an = gap(t[i], s[an])
            negative = max(0.0, gap(t[i], t[an]) - d_an) * d_an / tau
        top = max(negative, positive)
        values.append(top + math.log(math.exp(negative - top) + math.exp(positive - top)) - negative)
    return math.fsum(values) / len(values)


def naive(teachers, students, tau):
    """(metric, cosine), averaged over the views."""
    metric = [naive_view(t, s, tau) for t, s in zip(teachers, students, strict=True)]
    cosine = [-math.fsum(a * b for t, s in zip(unit_rows(of_t), unit_rows(of_s), strict=True)
                         for a, b in zip(t, s, strict=True)) / len(of_t)
              for of_t, of_s in zip(teachers, students, strict=True)]
    return math.fsum(metric) / len(metric), math.fsum(cosine) / len(cosine)


def views(b, d, near=0.5, seed=0):
    """Two views of teacher and student, the student ``near`` the teacher."""
    generator = torch.Generator().manual_seed(seed)
    teachers, noises = torch.randn(2, 2, b, d, dtype=torch.float64, generator=generator).unbind()
    return tuple(teachers), tuple(near * t + (1 - near) * n for t, n in zip(teachers, noises, strict=True))


def lists(tensors):
    return [x.tolist() for x in tensors]


@pytest.mark.parametrize("tau", [0.04, 0.004, 0.5])
@pytest.mark.parametrize("near", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_loops(shape, near, tau):
    teachers, students = views(*shape, near)
    metric, cosine = naive(lists(teachers), lists(students), tau)
    loss = SMD(smd_tau=tau)
    loss.set_epoch(2)
    parts = loss(student=students, teacher=teachers)
    assert parts["metric"].item() == pytest.approx(metric, rel=1e-10, abs=1e-12)
    assert parts["cosine"].item() == pytest.approx(cosine, rel=1e-12, abs=1e-13)
    assert torch.equal(parts["loss"], parts["metric"])


@pytest.mark.parametrize(("epoch", "warm"), [(0, True), (1, True), (2, False), (50, False)])
def test_the_first_two_epochs_add_the_cosine(epoch, warm):
    teachers, students = views(6, 5)
    loss = SMD()
    loss.set_epoch(epoch)
    parts = loss(student=students, teacher=teachers)
    assert parts["loss"].item() == pytest.approx((parts["metric"] + warm * parts["cosine"]).item(), rel=1e-13)
    assert parts["cosine"] < -0.1


@pytest.mark.parametrize("epoch", [0, 2])
def test_gradient_by_central_differences_with_the_weights_held(epoch):
    """gradcheck would let the weights vary; here the logits are rebuilt from weights that are not."""
    tau, (teachers, students) = 0.5, views(6, 4, near=0.7)
    loss = SMD(smd_tau=tau)
    loss.set_epoch(epoch)
    held = tuple(s.clone().requires_grad_() for s in students)
    loss(student=held, teacher=teachers)["loss"].backward()
    t, s = (torch.nn.functional.normalize(x[0], dim=1) for x in (teachers, students))
    d_t, d = torch.cdist(t, t), torch.cdist(t, s)
    negative = d_t > d.diag()[:, None]
    an, ap = d.masked_fill(~negative, 9e9).argmin(1), d.masked_fill(negative, -1).argmax(1)
    rows = torch.arange(6)
    w_an = (d_t[rows, an] - d[rows, an]).clamp_min(0) * negative.any(1)
    w_ap = (d[rows, ap] - d_t[rows, ap]).clamp_min(0)
    assert (w_an > 0).any()
    assert (w_ap > 0).any()

    def of(x):
        now = torch.nn.functional.normalize(x, dim=1)
        d = torch.cdist(t, now)
        logits = torch.stack([w_an * d[rows, an], w_ap * d[rows, ap]], 1) / tau
        cosine = -(t * now).sum(1).mean() if epoch < 2 else 0
        return (-logits.log_softmax(1)[:, 0].mean() + cosine) / 2

    step = 1e-6
    for i in range(6):
        for j in range(4):
            up, down = students[0].clone(), students[0].clone()
            up[i, j] += step
            down[i, j] -= step
            assert held[0].grad[i, j].item() == pytest.approx(((of(up) - of(down)) / (2 * step)).item(), abs=1e-8)


def test_a_perfect_student_has_no_slope_and_lengths_do_not_matter():
    teachers, students = views(8, 5)
    loss = SMD()
    loss.set_epoch(2)
    perfect = tuple((3 * t).requires_grad_() for t in teachers)
    parts = loss(student=perfect, teacher=teachers)
    assert parts["metric"].item() == pytest.approx(math.log(2), rel=1e-9)  # nothing is wrong: both logits are 0
    parts["loss"].backward()
    assert max(x.grad.abs().max() for x in perfect) < 1e-9
    plain = loss(student=students, teacher=teachers)["loss"].item()
    scaled = loss(student=[7 * s for s in students], teacher=[t / 9 for t in teachers])["loss"].item()
    assert scaled == pytest.approx(plain, rel=1e-10)


@pytest.mark.parametrize("dead", ["student", "both"])
def test_half_precision_with_dead_features(dead):
    teachers, students = views(8, 6)
    teachers, students = [t.half() for t in teachers], [s.half() for s in students]
    for x in (*students, *(teachers if dead == "both" else ())):
        x[2:5] = 0
        x[:, 3] = 0
    for s in students:
        s.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        parts = SMD()(student=students, teacher=teachers)
    expected = SMD()(student=[s.float() for s in students], teacher=[t.float() for t in teachers])
    assert parts["loss"].dtype == torch.float32
    assert torch.equal(parts["loss"], expected["loss"])
    (128 * parts["loss"]).backward()
    assert all(torch.isfinite(s.grad).all() for s in students)


def batch():
    """Two views of 12 images: the teacher's features, and the student's before its weights."""
    teachers, noises = views(12, 5)[0], views(12, 5, near=0, seed=1)[1]
    return teachers, [0.6 * t + 0.4 * n for t, n in zip(teachers, noises, strict=True)]


def with_gradient(scope, part):
    """The loss of some of the images, and its gradient with respect to weights of the student."""
    weight = torch.eye(5, dtype=torch.float64).requires_grad_()
    teachers, students = ([x[part] for x in xs] for xs in batch())
    loss = SMD(smd_tau=0.5, smd_batch=scope)
    loss.set_epoch(2)
    value = loss(student=[s @ weight for s in students], teacher=teachers)["loss"]
    return value.detach(), torch.autograd.grad(value, weight)[0]


def on_a_rank(rank):
    """Averaged as DistributedDataParallel averages: global and local."""
    mine = slice(6 * rank, 6 * rank + 6)
    return [[all_reduce_mean(x).numpy() for x in with_gradient(scope, mine)] for scope in ("global", "local")]


def test_two_processes_are_one_unless_each_keeps_to_its_own(tmp_path):
    whole = with_gradient("global", slice(None))
    halves = [with_gradient("global", part) for part in (slice(6), slice(6, None))]
    apart = [sum(x) / 2 for x in zip(*halves, strict=True)]
    for together, each_its_own in on_ranks(2, on_a_rank, tmp_path):
        for found, expected in ((together, whole), (each_its_own, apart)):
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(torch.as_tensor(x), y, rtol=1e-10, atol=1e-14)
    assert (whole[0] - apart[0]).abs() > 1e-3
