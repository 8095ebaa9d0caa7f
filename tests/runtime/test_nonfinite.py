"""The alarm over losses that are not finite, what it saves, and steps that leave no trace."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from runtime.errors import RunStopped
from runtime.nonfinite import FiniteAlarm, Snapshot


def parts(loss, row=1.0, student=1.0):
    return {"loss": torch.tensor(loss, requires_grad=True), "row": torch.tensor(row, dtype=torch.float64),
            "student": torch.tensor([[1.0, 1.0], [student, 1.0]])}


def batch(*indices):
    return SimpleNamespace(indices=torch.tensor(indices), views=(torch.full((len(indices), 3, 2, 2), 7,
                                                                            dtype=torch.uint8),))


def step(alarm, loss, number, *indices, **more):
    alarm.begin(batch(*indices), 0, number)
    alarm.watch(parts(loss, **more))


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("rank", "name"), [(0, "nonfinite.json"), (3, "rank3.nonfinite.json")])
def test_alarm(tmp_path, model, value, rank, name):
    alarm = FiniteAlarm(tmp_path, rank, {"state_dict": model, "updater": None})
    assert alarm.problem() is None
    step(alarm, 1.0, 0, 1, 2)
    assert alarm.problem() is None
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    step(alarm, value, 1, 3, 4, 3, row=2.5)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model[0].weight.data.fill_(float("nan"))  # the update
    torch.rand(9)
    assert not list(tmp_path.iterdir())
    error = alarm.problem()
    assert isinstance(error, RunStopped)
    assert error.exit_code == 3
    assert not error.every_process
    found = json.loads((tmp_path / name).read_text())
    assert (found["epoch"], found["step"], found["indices"]) == (1, 2, [3, 4, 3])
    assert float(found["parts"]["row"]) == 2.5
    assert repr(float(found["parts"]["loss"])) == repr(value)
    for word in ("epoch 1, step 2", str(tmp_path / name), "--on-nonfinite skip"):
        assert word in str(error)
    assert "\n" not in str(error)
    assert alarm.problem() is None
    saved = torch.load((tmp_path / name).with_suffix(".pth"), weights_only=True)
    assert all(torch.equal(saved["state_dict"][k], v) for k, v in before.items())
    assert (saved["views"][0] == 7).all()
    torch.set_rng_state(saved["random"]["torch"])
    assert torch.equal(torch.rand(3), drawn)


def test_a_full_disk_does_not_hide_it(tmp_path, model):
    (tmp_path / "file").write_text("in the way")
    alarm = FiniteAlarm(tmp_path / "file", 0, {"state_dict": model})
    step(alarm, float("nan"), 1, 3)
    assert "not finite at epoch 1, step 2" in str(alarm.problem())


def test_a_step_that_is_skipped_leaves_no_trace(tmp_path, model):
    alarm = FiniteAlarm(tmp_path, 0, {"state_dict": model}, limit=2)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    step(alarm, float("nan"), 0, 1)
    model(torch.full((3, 2), float("inf")))
    assert not model[1].running_mean.isfinite().all()
    assert "the loss is not finite at epoch 1, step 1" in alarm.bad_step([torch.ones(2)])
    alarm.undo()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert alarm.problem() is None


@pytest.mark.parametrize(("gradients", "bad"), [
    ([torch.ones(3), torch.zeros(2, 2)], False), ([torch.ones(3), torch.tensor([1.0, float("inf")])], True),
    ([torch.tensor([float("nan")])], True), ([], False)])
def test_gradients_count_too(tmp_path, model, gradients, bad):
    alarm = FiniteAlarm(tmp_path, 0, {"state_dict": model})
    step(alarm, 1.0, 0, 1)
    assert bool(alarm.bad_step(gradients)) is bad


@pytest.mark.parametrize(("student", "bad"), [(1e18, False), (1e20, True), (float("nan"), True)])
def test_outputs_count_too_whose_length_float32_does_not_hold(tmp_path, model, student, bad):
    """A loss of directions alone does not see it."""
    alarm = FiniteAlarm(tmp_path, 0, {"state_dict": model})
    step(alarm, 1.0, 2, 1, student=student)
    assert ("the longest student output is not finite at epoch 1, step 3" in str(alarm.problem())) is bad
    step(alarm, 1.0, 3, 1, student=student)
    assert bool(alarm.bad_step([torch.ones(2)])) is bad


def test_too_many_in_a_row_stop_the_run(tmp_path, model):
    alarm = FiniteAlarm(tmp_path, 0, {"state_dict": model}, limit=2)
    alarm.refuse_row(2)
    with pytest.raises(RunStopped, match="3 steps in a row .* --nonfinite-limit 2"):
        alarm.refuse_row(3)


def test_snapshot(model):
    snapshot = Snapshot({"a": model, "b": object()})
    snapshot.take()
    first = {k: v.clone() for k, v in model.state_dict().items()}
    model(torch.randn(4, 2))
    snapshot.take()
    second = {k: v.clone() for k, v in model.state_dict().items()}
    assert not torch.equal(first["1.running_mean"], second["1.running_mean"])
    model[0].weight.data.zero_()
    snapshot.give_back()
    assert all(torch.equal(v, second[k]) for k, v in model.state_dict().items())
    assert set(snapshot.copies) == {"a"}


@pytest.mark.parametrize("where", ["the loss", "the teacher"])
def test_what_is_advised_depends_on_whose_numbers_are_not_finite(tmp_path, model, where):
    alarm = FiniteAlarm(tmp_path, 0, {"state_dict": model}, limit=0)
    teacher = torch.full((2, 2), float("nan") if where == "the teacher" else 1.0)
    alarm.begin(batch(1, 2), 0, 0)
    alarm.watch({**parts(float("nan")), "teacher": teacher})
    said = [str(alarm.problem())]
    with pytest.raises(RunStopped) as caught:
        alarm.refuse_row(1)
    for text in (*said, str(caught.value)):
        assert ("lower --lr" in text) == (where == "the loss")
        assert ("the teacher's features are not finite" in text) == (where == "the teacher")
