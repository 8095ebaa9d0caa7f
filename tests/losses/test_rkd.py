"""RKD against loops over pairs and triplets in Python's own floats."""

import math

import pytest
import torch

from losses import rkd
from losses.rkd import RKD

SHAPES = [(2, 3), (3, 1), (3, 5), (5, 3), (9, 17)]


def huber(x, y):
    gap = abs(x - y)
    return gap * gap / 2 if gap < 1 else gap - 0.5


def difference(x, y):
    return [a - b for a, b in zip(x, y, strict=True)]


def length(x):
    return math.sqrt(math.fsum(a * a for a in x))


def naive(teacher, student):
    """(distance term, angle term) by the formula."""
    b = len(teacher)
    pairs = [(i, j) for i in range(b) for j in range(b) if i != j]
    relative = []
    for rows in (teacher, student):
        distances = {(i, j): length(difference(rows[i], rows[j])) for i, j in pairs}
        mean = math.fsum(distances.values()) / len(pairs)
        relative.append({p: d / mean for p, d in distances.items()})
    distance = math.fsum(huber(relative[0][p], relative[1][p]) for p in pairs) / len(pairs)

    def cosine(rows, i, j, k):
        a, c = difference(rows[i], rows[j]), difference(rows[k], rows[j])
        product = length(a) * length(c)
        return math.fsum(x * y for x, y in zip(a, c, strict=True)) / product if product else 0.0

    triplets = [(i, j, k) for i, j in pairs for k in range(b) if k not in (i, j)]
    angles = [huber(cosine(teacher, *t), cosine(student, *t)) for t in triplets]
    return distance, math.fsum(angles) / max(1, len(angles))


def pair(b, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, b, d, dtype=torch.float64, generator=generator).unbind()


@pytest.mark.parametrize("chunk", [1, 40, 2**24])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_loops_in_parts_of_any_size(shape, chunk, monkeypatch):
    monkeypatch.setattr(rkd, "CHUNK", chunk)
    teacher, student = pair(*shape)
    student[0] *= 5  # so that Huber's linear part is met too
    distance, angle = naive(teacher.tolist(), student.tolist())
    parts = RKD((1.5, 0.7))(student=student, teacher=teacher)
    assert parts["distance"].item() == pytest.approx(distance, rel=1e-12)
    assert parts["angle"].item() == pytest.approx(angle, rel=1e-12, abs=1e-14)
    assert parts["loss"].item() == pytest.approx(1.5 * distance + 0.7 * angle, rel=1e-12)


def test_the_papers_weights():
    teacher, student = pair(6, 5)
    parts = RKD()(student=student, teacher=teacher)
    assert parts["loss"].item() == pytest.approx((parts["distance"] + 2 * parts["angle"]).item(), rel=1e-13)


@pytest.mark.parametrize("chunk", [40, 2**24])
def test_gradcheck(chunk, monkeypatch):
    monkeypatch.setattr(rkd, "CHUNK", chunk)
    teacher, student = pair(5, 4)
    assert torch.autograd.gradcheck(lambda s: RKD()(student=s, teacher=teacher)["loss"], student.requires_grad_())


def test_relations_do_not_see_a_turn_a_shift_or_a_scale():
    teacher, student = pair(6, 5)
    plain = RKD()(student=student, teacher=teacher)["loss"].item()
    turn, _ = torch.linalg.qr(pair(5, 5, seed=3)[0])
    assert RKD()(student=3 * student @ turn + 7, teacher=teacher)["loss"].item() == pytest.approx(plain, rel=1e-11)
    assert RKD()(student=3 * teacher @ turn + 7, teacher=teacher)["loss"].item() == pytest.approx(0, abs=1e-14)
    assert plain > 1e-3


def test_images_that_the_student_cannot_tell_apart():
    teacher, student = pair(6, 5)
    student[3] = student[1]
    student.requires_grad_()
    distance, angle = naive(teacher.tolist(), student.tolist())
    parts = RKD()(student=student, teacher=teacher)
    assert parts["distance"].item() == pytest.approx(distance, rel=1e-12)
    assert parts["angle"].item() == pytest.approx(angle, rel=1e-12)
    parts["loss"].backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 100


def test_the_backward_pass_keeps_no_triplets():
    """What is kept for it does not hold b x b x d or b x b x b numbers."""
    b, d = 24, 32
    teacher, student = pair(b, d)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        RKD()(student=student.requires_grad_(), teacher=teacher)["loss"].backward()
    assert kept
    assert max(kept) <= b * d
