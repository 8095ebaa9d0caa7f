"""CoSS against loops written from the paper's formula in Python's own floats, and its gradients by differences."""

import math

import pytest
import torch
import torch.nn.functional as F

from losses import LOSSES, build_loss
from losses.coss import CentredCoSS, CoSS
from runtime.errors import UserError

SHAPES = [(1, 1), (1, 7), (2, 1), (2, 2), (3, 5), (5, 3), (8, 8), (16, 33), (33, 16), (64, 12)]
WEIGHTS = [(1.0, 1.0, 0.1, 0.07), (1.0, 0.5, 0.1, 0.07), (0.0, 1.0, 0.2, 0.3), (1.0, 0.0, 1.0, 1.0),
           (0.3, 2.5, 0.04, 0.9), (-1.0, 0.0, 0.1, 0.07)]


def naive(teacher, student, l_0, l_1, s_temp, t_temp):
    """The formula of methods.md, element by element: (loss, row term, space term)."""
    b, d = len(teacher), len(teacher[0])

    def length(values):
        return max(math.sqrt(math.fsum(v * v for v in values)), 1e-12)

    def negative_mean_cosine(rows_t, rows_s):
        dots = []
        for row_t, row_s in zip(rows_t, rows_s, strict=True):
            norm_t, norm_s = length(row_t), length(row_s)
            dots.append(-math.fsum(t / norm_t * (s / norm_s) for t, s in zip(row_t, row_s, strict=True)))
        return math.fsum(dots) / len(dots) / (t_temp * s_temp)

    def columns(rows):
        return [[rows[i][j] for i in range(b)] for j in range(d)]

    row = negative_mean_cosine(teacher, student)
    space = negative_mean_cosine(columns(teacher), columns(student))
    return l_0 * row + l_1 * space, row, space


def original(teacher, student, l_0, l_1, s_temp, t_temp):
    """The original code's expression, by F.normalize."""
    def dot(t, s):
        return -(F.normalize(t, dim=-1) * F.normalize(s, dim=-1)).sum(dim=-1) / (t_temp * s_temp)

    return l_0 * dot(teacher, student).mean() + l_1 * dot(teacher.T, student.T).mean()


def pair(b, d, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(b, d, dtype=torch.float64, generator=generator)
    student = torch.randn(b, d, dtype=torch.float64, generator=generator)
    return teacher * scale, student + 0.5 * teacher


def assert_matches(parts, expected, options):
    scale = 1 / (options[2] * options[3])
    for name, value in zip(("loss", "row", "space"), expected, strict=True):
        tolerance = 1e-13 * max(abs(value), scale)  # each term is a mean of numbers of size up to scale
        assert abs(parts[name].item() - value) <= tolerance, name
        assert parts[name].shape == ()


@pytest.mark.parametrize("options", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_double_loop(shape, options):
    for seed in range(3):
        teacher, student = pair(*shape, seed=seed, scale=10.0 ** (seed - 1))
        parts = CoSS(*options)(student=student, teacher=teacher)
        assert parts["loss"].dtype == torch.float64
        assert_matches(parts, naive(teacher.tolist(), student.tolist(), *options), options)


@pytest.mark.parametrize("options", WEIGHTS)
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 1])
def test_centred_is_the_double_loop_without_the_means(shape, options):
    """And the gradient goes through the mean, by central differences."""
    teacher, student = pair(*shape, seed=2)

    def expected(student):
        rows = [x.tolist() for x in (teacher, student)]
        means = [[math.fsum(column) / len(column) for column in zip(*x, strict=True)] for x in rows]
        return naive(*([[value - mean for value, mean in zip(row, of, strict=True)] for row in x]
                       for x, of in zip(rows, means, strict=True)), *options)

    parts = CentredCoSS(*options)(student=student.requires_grad_(), teacher=teacher + 1.0)  # what all have in common
    parts["loss"].backward()
    scale = 1 / (options[2] * options[3])
    for name, value in zip(("loss", "row", "space"), expected(student), strict=True):
        assert abs(parts[name].item() - value) <= 1e-11 * max(abs(value), scale), name
    if min(shape) > 2:
        direction = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        one, other = (expected(student.detach() + sign * 1e-5 * direction)[0] for sign in (1, -1))
        assert (student.grad * direction).sum().item() == pytest.approx((one - other) / 2e-5, abs=1e-6 * scale)


@pytest.mark.parametrize("where", ["row_t", "row_s", "row_both", "column_t", "column_s", "column_both", "all"])
@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (5, 6)])
def test_zero_rows_and_columns(shape, where):
    teacher, student = pair(*shape)
    for name, tensor in (("t", teacher), ("s", student)):
        if where == "all":
            tensor.zero_()
        elif where.endswith((name, "both")):
            (tensor[0] if where.startswith("row") else tensor[:, 0]).zero_()
    student.requires_grad_()
    options = WEIGHTS[1]
    parts = CoSS(*options)(student=student, teacher=teacher)
    assert_matches(parts, naive(teacher.tolist(), student.tolist(), *options), options)
    parts["loss"].backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() < 1e6  # F.normalize's would be of size 1e12
    if where == "all" or (where in ("row_s", "row_both") and shape[0] == 1):
        assert (student.grad == 0).all()


def test_a_dead_row_or_column_of_the_student_has_no_slope_in_that_term():
    teacher, student = pair(5, 6)
    student[2] = 0
    student.requires_grad_()
    CoSS(l_0=1, l_1=0)(student=student, teacher=teacher)["loss"].backward()
    assert (student.grad[2] == 0).all()
    assert (student.grad[0] != 0).all()
    teacher, student = pair(5, 6)
    student[:, 3] = 0
    student.requires_grad_()
    CoSS(l_0=0, l_1=1)(student=student, teacher=teacher)["loss"].backward()
    assert (student.grad[:, 3] == 0).all()
    assert (student.grad[:, 0] != 0).all()


@pytest.mark.parametrize("length", [1e-3, 1e-10, 2e-12, 5e-13, 1e-13, 1e-20])
def test_short_vectors_are_divided_by_the_eps(length):
    options = WEIGHTS[0]
    teacher, student = pair(4, 5)
    student[1] *= length / student[1].norm()
    expected = naive(teacher.tolist(), student.tolist(), *options)
    assert_matches(CoSS(*options)(student=student, teacher=teacher), expected, options)


@pytest.mark.parametrize("options", WEIGHTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_originals_expression(shape, options):
    teacher, student = pair(*shape, seed=7)
    theirs_student, ours_student = (student.clone().requires_grad_() for _ in range(2))
    theirs = original(teacher, theirs_student, *options)
    ours = CoSS(*options)(student=ours_student, teacher=teacher)["loss"]
    scale = 1 / (options[2] * options[3])
    assert abs(ours.item() - theirs.item()) <= 1e-13 * scale * 2
    theirs.backward()
    ours.backward()
    torch.testing.assert_close(ours_student.grad, theirs_student.grad, rtol=1e-10, atol=1e-11 * scale)


@pytest.mark.parametrize("shape", [(1, 3), (3, 1), (4, 5), (6, 2)])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.7, 1.3)])
def test_gradcheck(shape, weights):
    teacher, student = pair(*shape)
    loss = CoSS(*weights, s_temp=0.5, t_temp=0.6)
    assert torch.autograd.gradcheck(lambda s: loss(student=s, teacher=teacher)["loss"],
                                    student.requires_grad_(), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_gradient_by_central_differences_of_the_double_loop():
    options = WEIGHTS[1]
    teacher, student = pair(4, 3)
    student.requires_grad_()
    CoSS(*options)(student=student, teacher=teacher)["loss"].backward()
    step = 1e-5
    for i in range(4):
        for j in range(3):
            values = []
            for sign in (1, -1):
                moved = student.detach().clone()
                moved[i, j] += sign * step
                values.append(naive(teacher.tolist(), moved.tolist(), *options)[0])
            slope = (values[0] - values[1]) / (2 * step)
            assert abs(slope - student.grad[i, j].item()) < 1e-5 * 143


def test_the_teacher_may_not_need_a_gradient_and_inputs_stay_as_they_were():
    teacher, student = pair(4, 3)
    before = teacher.clone(), student.clone()
    parts = CoSS()(student=student.requires_grad_(), teacher=teacher)
    parts["loss"].backward()
    assert teacher.grad is None
    assert torch.equal(teacher, before[0])
    assert torch.equal(student.detach(), before[1])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype, autocast):
    teacher, student = (x.to(dtype) for x in pair(32, 48))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        parts = CoSS()(student=student, teacher=teacher)
    expected = CoSS()(student=student.float(), teacher=teacher.float())
    for name in ("loss", "row", "space"):
        assert parts[name].dtype == torch.float32
        assert torch.equal(parts[name], expected[name])
    # and against the loop on the same rounded numbers, which no half-precision sum of 32 or 48 terms would meet
    exact = naive(teacher.double().tolist(), student.double().tolist(), *WEIGHTS[0])
    assert abs(parts["loss"].item() - exact[0]) < 1e-4


def test_mixed_types_and_autocast_leave_float32_alone():
    teacher, student = (x.float() for x in pair(32, 48))
    plain = CoSS()(student=student, teacher=teacher)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CoSS()(student=student, teacher=teacher)["loss"], plain)
    mixed = CoSS()(student=student, teacher=teacher.half())["loss"]
    assert mixed.dtype == torch.float32
    assert abs(mixed.item() - plain.item()) < 0.1


def test_half_precision_gradient_is_finite_with_dead_features():
    teacher, student = (x.half() for x in pair(8, 6))
    student[:, 2] = 0
    student[3] = 0
    student.requires_grad_()
    (CoSS()(student=student, teacher=teacher)["loss"] * 1024).backward()  # as behind a gradient scaler
    assert student.grad.dtype == torch.float16
    assert torch.isfinite(student.grad).all()


def test_row_term_ignores_the_scale_of_rows_and_space_term_that_of_columns():
    teacher, student = pair(6, 5)
    plain = CoSS()(student=student, teacher=teacher)
    rows = torch.rand(6, 1, dtype=torch.float64) + 0.1
    columns = torch.rand(1, 5, dtype=torch.float64) + 0.1
    by_row = CoSS()(student=student * rows, teacher=teacher * rows.flip(0))
    by_column = CoSS()(student=student * columns, teacher=teacher * columns.flip(1))
    torch.testing.assert_close(by_row["row"], plain["row"], rtol=1e-12, atol=0)
    torch.testing.assert_close(by_column["space"], plain["space"], rtol=1e-12, atol=0)
    assert (by_row["space"] - plain["space"]).abs() > 1e-3  # the other term does see it
    assert (by_column["row"] - plain["row"]).abs() > 1e-3
    torch.testing.assert_close(CoSS()(student=7 * student, teacher=0.01 * teacher)["loss"], plain["loss"],
                               rtol=1e-12, atol=0)


def trained(halvings, rate, decay):
    """The weights after SGD with momentum on CoSS whose temperatures are both halved so often."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.ReLU(), torch.nn.Linear(12, 4))
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=0.9, weight_decay=decay)
    loss = CoSS(s_temp=0.1 / 2**halvings, t_temp=0.07 / 2**halvings)
    for _ in range(20):
        images, teacher = torch.randn(8, 6), torch.randn(8, 4)
        optimizer.zero_grad()
        loss(student=network(images), teacher=teacher)["loss"].backward()
        optimizer.step()
    return torch.cat([weights.flatten() for weights in network.parameters()])


def test_halved_temperatures_are_a_rate_four_times_as_high():
    """To the last bit, since both only scale; weight decay, which the rate multiplies too, is divided by it."""
    hot = trained(0, 4 * 0.001, 1e-3 / 4)
    assert torch.equal(trained(1, 0.001, 1e-3), hot)
    assert not torch.equal(trained(0, 0.001, 1e-3), hot)


@pytest.mark.parametrize("options", WEIGHTS)
def test_bounds(options):
    l_0, l_1, s_temp, t_temp = options
    teacher, student = pair(6, 5)
    scale = 1 / (s_temp * t_temp)
    perfect = CoSS(*options)(student=3 * teacher, teacher=teacher)
    assert perfect["loss"].item() == pytest.approx(-(l_0 + l_1) * scale, rel=1e-13)
    assert perfect["row"].item() == pytest.approx(-scale, rel=1e-13)
    opposite = CoSS(*options)(student=-teacher, teacher=teacher)
    assert opposite["loss"].item() == pytest.approx((l_0 + l_1) * scale, rel=1e-13)
    other = CoSS(*options)(student=student, teacher=teacher)
    assert -scale < other["row"].item() < scale
    assert -scale < other["space"].item() < scale


def test_defaults_are_the_papers():
    teacher, student = pair(6, 5)
    expected = naive(teacher.tolist(), student.tolist(), 1.0, 1.0, 0.1, 0.07)
    assert_matches(CoSS()(student=student, teacher=teacher), expected, WEIGHTS[0])


def test_registry_builds_by_name_and_takes_only_what_the_loss_names():
    teacher, student = pair(6, 5)
    built = build_loss("coss", l_0=0.3, l_1=2.5, s_temp=0.04, t_temp=0.9, queue_size=65536)
    assert type(built) is LOSSES["coss"] is CoSS
    expected = naive(teacher.tolist(), student.tolist(), 0.3, 2.5, 0.04, 0.9)
    assert_matches(built(student=student, teacher=teacher), expected, WEIGHTS[4])
    with pytest.raises(TypeError):
        built(student, teacher)  # keyword arguments only: the two are easily swapped


def test_unknown_loss():
    with pytest.raises(UserError, match=r"^--loss cos is unknown; .*coss") as caught:
        build_loss("cos")
    assert "\n" not in str(caught.value)
