"""Figures of distillations of the demo set, with a rate that suits it and with ones that are too high."""

import pytest

from runtime.watch import GrowthWatch

GOOD = [(21.5, .8265, .8753), (108.8, .9029, .9182), (137.9, .8485, .856), (157.1, .8503, .8692), (168.2, .8599, .8666),
        (147.5, .8879, .9104), (124.8, .9135, .8702), (153.2, .9701, .8527), (134.5, .9555, .9112)]
TOO_HIGH = [(155.6, .8342, .8753), (968.6, .9044, .9182), (1553, .748, .856), (2404, .783, .8692), (2592, .8408, .8666)]
FAR_TOO_HIGH = [(3.54e4, .7218, .8753), (7.927e4, .7583, .9182), (8.704e4, .7401, .856), (1.049e5, .8362, .9112)]


NAMES = ("student_norm", "row_cosine", "constant_cosine")
START = (2.63, 0.021, 0.87)


def say(watch, figures):
    return [watch(dict(zip(NAMES, values, strict=True))) for values in figures]


def said_of(figures):
    watch = GrowthWatch()
    assert watch({"loss": 1.0}) == ""
    return say(watch, [START, *figures])


def test_a_run_that_learns_is_left_alone():
    assert not any(said_of(GOOD * 5))
    assert not any(said_of([(norm * 1000, 0.95, constant) for norm, _, constant in GOOD]))  # long, and right


@pytest.mark.parametrize(("figures", "line"), [(TOO_HIGH, 3), (FAR_TOO_HIGH, 2)])
def test_a_run_that_grows_and_learns_nothing_is_named_once(figures, line):
    said = said_of(figures * 3)
    assert [i for i, text in enumerate(said) if text] == [line]
    assert said[line].startswith("the student's features are ")
    assert said[line].endswith("start again with a lower --lr or longer --warmup-epochs")


def test_a_resumed_run_is_compared_with_its_start():
    before, after, third = GrowthWatch(), GrowthWatch(), GrowthWatch()
    assert not any(say(before, [START, FAR_TOO_HIGH[0]]))
    after.load_state_dict(before.state_dict())
    assert [bool(text) for text in say(after, FAR_TOO_HIGH[1:])] == [False, True, False]
    third.load_state_dict(after.state_dict())
    assert not any(say(third, FAR_TOO_HIGH))  # it has been said


def test_one_line_alone_says_nothing():
    assert not any(said_of([(1e4, .7, .8), (1e4, .9, .8)] * 4))
