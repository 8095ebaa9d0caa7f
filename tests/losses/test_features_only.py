"""What holds of every loss that compares features alone: precision, dead features, batches of one, inputs unharmed."""

import pytest
import torch

from losses.coss import CentredCoSS, CoSS
from losses.dino import DINO, DINOSS
from losses.dist import DIST
from losses.regression import MSE, Cosine
from losses.rkd import RKD

LOSSES = [CoSS, CentredCoSS, DINO, DINOSS, DIST, Cosine, MSE, RKD]


def pair(b, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(2, b, d, generator=generator).unbind()
    return teacher, student + 0.5 * teacher


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", LOSSES)
def test_half_precision_is_computed_in_float32(kind, dtype, autocast):
    teacher, student = (x.to(dtype) for x in pair(16, 24))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        parts = kind()(student=student, teacher=teacher)
    expected = kind()(student=student.float(), teacher=teacher.float())
    assert parts.keys() == expected.keys()
    for name, value in parts.items():
        assert value.dtype == torch.float32
        assert value.shape == ()
        assert torch.equal(value, expected[name])


@pytest.mark.parametrize("kind", LOSSES)
def test_float32_is_near_float64(kind):
    teacher, student = pair(16, 24)
    single = kind()(student=student, teacher=teacher)["loss"]
    double = kind()(student=student.double(), teacher=teacher.double())["loss"]
    assert double.dtype == torch.float64
    assert single.item() == pytest.approx(double.item(), rel=2e-6)


@pytest.mark.parametrize("dead", ["rows", "columns", "all", "constant"])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_gradient_is_finite_with_dead_features(kind, dead):
    teacher, student = (x.half() for x in pair(8, 6))
    for x in (teacher, student):
        if dead == "rows":
            x[2:5] = 0
        elif dead == "columns":
            x[:, 2:5] = 0
        else:
            x.fill_(0 if dead == "all" else 0.3)
    student.requires_grad_()
    loss = kind()(student=student, teacher=teacher)["loss"]
    (loss * 128).backward()  # as behind a gradient scaler
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_a_batch_of_one(kind):
    teacher, student = pair(1, 6)
    student.requires_grad_()
    loss = kind()(student=student, teacher=teacher)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("kind", LOSSES)
def test_the_order_of_the_images_does_not_matter_and_inputs_stay_as_they_were(kind):
    teacher, student = (x.double() for x in pair(7, 5))
    before = teacher.clone(), student.clone()
    order = torch.randperm(7, generator=torch.Generator().manual_seed(1))
    parts = kind()(student=student.requires_grad_(), teacher=teacher)
    shuffled = kind()(student=student[order], teacher=teacher[order])
    assert shuffled["loss"].item() == pytest.approx(parts["loss"].item(), rel=1e-12)
    parts["loss"].backward()
    assert teacher.grad is None
    assert torch.equal(teacher, before[0])
    assert torch.equal(student.detach(), before[1])


@pytest.mark.parametrize("kind", LOSSES)
def test_a_step_down_the_gradient_lowers_it(kind):
    teacher, student = (x.double() for x in pair(7, 5))
    student.requires_grad_()
    loss = kind()(student=student, teacher=teacher)["loss"]
    loss.backward()
    step = 1e-4 / student.grad.norm()
    assert kind()(student=student.detach() - step * student.grad, teacher=teacher)["loss"] < loss


@pytest.mark.parametrize("kind", LOSSES)
def test_keyword_arguments_only(kind):
    with pytest.raises(TypeError):
        kind()(*pair(3, 4))
