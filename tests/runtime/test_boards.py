"""runtime/boards.py: --log-to wandb gets the same scalars and settings as TensorBoard, and one curve over resumes."""

import sys
import types

import pytest

from runtime.boards import check_board
from runtime.errors import UserError
from runtime.log import RunLog


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the library, which writes down what it is told."""
    module, told = types.ModuleType("wandb"), []
    run = types.SimpleNamespace(log=lambda values: told.append(("log", values)),
                                define_metric=lambda *a, **b: told.append(("metric", a, b)),
                                finish=lambda: told.append(("finish",)))
    module.init = lambda **options: told.append(("init", options)) or run
    module.told = told
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def log(folder, first_step=0, **more):
    config = {"lr": 0.1, "starts": [{"time": "noon"}, {"time": str(first_step)}]}
    return RunLog(folder, config, True, first_step, **more)


def test_it_gets_the_scalars_and_the_settings(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    for first_step in (0, 5):  # started, and resumed
        one = log(tmp_path / "run", first_step, log_to="wandb")
        one.scalars(first_step + 1, 0, {"loss": 2.0, "lr": 0.1})
        one.scalars(first_step + 1, 0, {"top1": 50.0}, "knn")
        one.sync()
        one.close()
    first, again = (options for what, *rest in wandb.told if what == "init" for options in rest)
    assert first["config"]["lr"] == 0.1 and first["project"] == "mine" and first["name"] == "run"
    assert first["dir"] == str(tmp_path / "run") and first["resume"] == "allow"
    assert len(first["id"]) == 16 and first["id"] == again["id"]
    assert [rest[0] for what, *rest in wandb.told if what == "log"] == [
        {"train/loss": 2.0, "train/lr": 0.1, "step": 1}, {"knn/top1": 50.0, "step": 1},
        {"train/loss": 2.0, "train/lr": 0.1, "step": 6}, {"knn/top1": 50.0, "step": 6}]
    assert [what for what, *_ in wandb.told].count("finish") == 2
    assert list((tmp_path / "run").glob("events.out.tfevents*"))  # TensorBoard stays


def test_without_the_flag_it_is_not_touched(tmp_path, wandb):
    one = log(tmp_path)
    one.scalars(1, 0, {"loss": 2.0})
    one.close()
    assert wandb.told == []


def test_a_library_that_does_not_start_is_one_sentence(tmp_path, wandb):
    def init(**_):
        raise RuntimeError("no API key\nconfigured")
    wandb.init = init
    with pytest.raises(UserError, match="wandb: it does not start .RuntimeError: no API key configured.*WANDB_MODE"):
        log(tmp_path, log_to="wandb")


def test_a_missing_library_is_said_before_any_work(monkeypatch, wandb):
    check_board("wandb"), check_board("tensorboard")
    for missing in (None, types.ModuleType("wandb")):  # not installed; a folder of that name
        monkeypatch.setitem(sys.modules, "wandb", missing)
        with pytest.raises(UserError, match="wandb needs the package wandb, which is not installed; run `pip install"):
            check_board("wandb")
