"""Sums of losses: the arithmetic, who is given what, and what does not go together."""

import pytest
import torch

from losses import build_objective, needs_of
from losses.base import CombinedNeeds, Inputs, Loss, Needs
from losses.combine import Objective, combined_needs
from runtime.errors import UserError


class Distance(Loss):
    """One view: the mean square."""

    def forward(self, *, student, teacher):
        return {"loss": (student - teacher).square().mean(), "most": (student - teacher).abs().max()}


class TwoViews(Loss):
    needs = Needs(views=2, momentum=True, passes=2)

    def inputs(self, views, teachers):
        return Inputs(views, views, views[1:], {"factor": 3.0})

    def forward(self, *, student, teacher, momentum, factor):
        assert isinstance(student, tuple)
        assert len(student) == len(teacher) == 2
        return {"loss": factor * (student[0] + student[1] - 2 * teacher[0] + momentum).sum()}


def run(objective, views):
    """What the loop does, with networks that are plain factors, another one for each head and each answer."""
    inputs = objective.inputs(views)
    heads, answers = objective.needs.heads, objective.needs.teacher
    outputs = {"student": tuple((2 + 10 * i) * x for x in inputs.student for i in range(len(heads))),
               "teacher": tuple((3 + 10 * i) * x for x in inputs.teacher for i in range(len(answers))),
               "momentum": tuple((5 + 10 * i) * x for x in inputs.momentum for i in range(len(heads)))}
    return inputs, objective(**outputs, **inputs.context)


def test_one_loss_keeps_its_parts_names_and_beta_scales_the_loss_alone():
    x = torch.rand(4, 3, dtype=torch.float64)
    _, parts = run(Objective({"distance": Distance()}, [0.5], beta=0.25), [x])
    assert set(parts) == {"loss", "most"}
    assert parts["loss"].item() == pytest.approx(0.125 * (x ** 2).mean().item(), rel=1e-12)
    assert parts["most"].item() == pytest.approx(x.max().item())


def test_a_sum_is_weighted_named_and_gives_each_what_it_asked_for():
    x, y = torch.rand(2, 4, 3, dtype=torch.float64)
    objective = Objective({"distance": Distance(), "two": TwoViews()}, [0.5, 2.0], beta=0.1)
    heads = (("projection", "features"),)
    assert objective.needs == CombinedNeeds(2, False, ("features",), heads, True, 2, True, False)
    inputs, parts = run(objective, [x, y])
    assert [len(inputs.student), len(inputs.teacher), len(inputs.momentum)] == [2, 2, 1]  # x passes once
    one, two = (x ** 2).mean().item(), 3 * (2 * x + 2 * y - 6 * x + 5 * y).sum().item()
    assert set(parts) == {"loss", "distance/loss", "distance/most", "two/loss"}
    assert parts["distance/loss"].item() == pytest.approx(one)
    assert parts["two/loss"].item() == pytest.approx(two)
    assert parts["loss"].item() == pytest.approx(0.1 * (0.5 * one + 2 * two))


def test_the_teacher_sees_views_of_its_own_size_where_the_batch_has_them():
    small, large = [torch.rand(4, 3) for _ in range(2)], [torch.rand(4, 6) for _ in range(2)]
    class TeachersOwn(Loss):
        needs = Needs(views=2, momentum=True, passes=2)
    inputs = Objective({"distance": Distance(), "own": TeachersOwn()}).inputs([*small, *large])
    assert all(map(torch.equal, inputs.student, small))
    assert all(map(torch.equal, inputs.teacher, large))
    assert all(map(torch.equal, inputs.momentum, small))
    assert [len(inputs.student), len(inputs.teacher), len(inputs.momentum)] == [2, 2, 2]


def test_losses_of_different_heads_get_each_their_own():
    class OtherHead(TwoViews):
        needs = Needs(views=2, teacher="head", head="mlp", momentum=True)

    class Alone(Loss):
        needs = Needs(views=2, teacher=None, head="mlp")

        def forward(self, *, student):
            return {"loss": student[1].sum()}

    x, y = torch.rand(2, 4, 3, dtype=torch.float64)
    objective = Objective({"distance": Distance(), "other": OtherHead(), "alone": Alone()})
    assert objective.needs.heads == (("projection", "features"), ("mlp", "head"), ("mlp", None))
    assert objective.needs.teacher == ("features", "head")
    _, parts = run(objective, [x, y])
    assert parts["distance/loss"].item() == pytest.approx((x ** 2).mean().item())
    assert parts["other/loss"].item() == pytest.approx(3 * (12 * x + 12 * y - 26 * x + 15 * y).sum().item())
    assert parts["alone/loss"].item() == pytest.approx(22 * y.sum().item())


def test_without_any_teacher():
    assert combined_needs({"a": Needs(teacher=None, head="mlp")}).teacher == ()


@pytest.mark.parametrize("names", ["pairs+single", "single+pairs"])
def test_pairs_do_not_go_with_single_images(names):
    needs = {"pairs": Needs(pairs=True), "single": Needs()}
    with pytest.raises(UserError) as caught:
        combined_needs({name: needs[name] for name in names.split("+")})
    assert str(caught.value) == (f"--loss {names}: pairs needs batches of pairs and single of single images; add up "
                                 "losses that need the same")


@pytest.mark.parametrize(("names", "said"), [("coss+nothing", "--loss nothing is unknown"), ("coss+", "unknown"),
                                             ("coss+coss", "names coss twice")])
def test_names_that_are_refused(names, said):
    for build in (needs_of, build_objective):
        with pytest.raises(UserError, match=said):
            build(names)


def test_the_epoch_reaches_every_loss():
    objective = Objective({"a": Distance(), "b": Distance()})
    objective.set_epoch(3)
    assert [loss.epoch for loss in objective.losses.values()] == [3, 3]


def test_settings_are_the_constructors_whole():
    loss = build_objective("coss", s_temp=0.2, l_0=None, other=1).losses["coss"]
    assert loss.settings == {"l_0": 1.0, "l_1": 1.0, "s_temp": 0.2, "t_temp": 0.07, "space_batch": "local"}
