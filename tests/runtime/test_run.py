"""Runs of a tiny network, stopped at every place and gone on; and what ranks decide together."""

import copy
import json
import os
import pickle
import signal
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import on_ranks
from torch import nn

from runtime.device import Process, wrap
from runtime.errors import NotFinite, RunPaused, RunStopped, UserError
from runtime.job import Interval, RunSettings
from runtime.loop import Trainer
from runtime.optim import Updater
from runtime.restore import differing_buffers, load_buffers, mean_state
from runtime.run import Description, Run
from runtime.store import save_checkpoint

CPU = torch.device("cpu")
STEPS, EPOCHS = 5, 2


class Loader:
    """Batches that the epoch and the step decide; ``broken`` holds steps (of all) whose batch is not finite."""

    def __init__(self, broken=()):
        self.place, self.broken = (0, 0), broken

    def __len__(self):
        return STEPS - self.place[1]

    def __iter__(self):
        epoch, first = self.place
        for step in range(first, STEPS):
            generator = torch.Generator().manual_seed(100 * epoch + step)
            values = torch.randn(6, 3, generator=generator)
            if epoch * STEPS + step in self.broken:
                values[0, 0] = float("nan")
            yield SimpleNamespace(views=(values,), indices=torch.arange(6))


def train(folder, *, stop_at=None, broken=(), check=None, score=None, world=1, seed=0, **options):
    """A whole run, with dropout, batch norm and momentum; ``stop_at``: steps done when a signal comes. The model."""
    with ExitStack() as closing:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))
        updater = Updater(torch.optim.SGD(model.parameters(), 0.1, 0.9), CPU)
        process, loader = Process(0, world, CPU, closing=closing), Loader(broken)
        what = Description({"lr": 0.1}, {}, {"state_dict": model, "updater": updater}, ["model.pth"],
                           per_process=options.pop("per_process", ""))
        run = Run.open(RunSettings(str(folder), **{"save_every": "0", **options}), what, process, seed)

        def step(batch):
            if run.steps == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return {"loss": model(batch.views[0]).square().mean(), "size": batch.views[0].abs().mean()}

        trainer = Trainer(run, updater, loader, 6, EPOCHS, lambda *_: 0.1, 3, check or (lambda _: None))
        for epoch in range(run.epoch, EPOCHS):
            loader.place = epoch, run.step
            trainer.epoch(epoch, step)
            if score:
                run.note(epoch, "knn", {"top1": run.scored(score)}, "of the test")
            run.save(epoch, {"model.pth": model.state_dict()})
        run.finish()
        return model, run


def lines(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("images_per_second", "data_wait")} for line in found]


def same(a, b):
    return all(torch.equal(x, b[k]) for k, x in a.items())


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm")
    return train(folder)[0].state_dict(), lines(folder)


@pytest.mark.parametrize("stops", [[k] for k in range(STEPS * EPOCHS - 1)] + [[0, 1, 2, 3, 5, 8], [4, 5]])
def test_a_run_that_is_stopped_anywhere_ends_as_one_that_is_not(calm, tmp_path, stops):
    """The signal comes during a step, which is finished; after the last of all there is nothing to go on with."""
    for stop in stops:
        with pytest.raises(RunPaused):
            train(tmp_path, stop_at=stop)
        saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
        assert saved["steps"] == saved["epoch"] * STEPS + saved["step"] == stop + 1
    model, _ = train(tmp_path)
    assert same(calm[0], model.state_dict())
    assert lines(tmp_path) == calm[1]


def test_what_saves_a_run_makes_on_the_way_change_nothing(calm, tmp_path):
    model, _ = train(tmp_path, save_every="2", keep=3)
    assert same(calm[0], model.state_dict())
    assert lines(tmp_path) == calm[1]
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [
        "checkpoint-000000006.pth", "checkpoint-000000008.pth", "checkpoint.pth", "model.pth"]
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert (saved["epoch"], saved["step"], saved["steps"]) == (2, 0, 10)


@pytest.mark.parametrize("trouble", [UserError, ZeroDivisionError])
def test_a_score_that_fails_loses_nothing(tmp_path, trouble):
    """The epoch before it is saved first, and the same command goes on with the score; nothing is written twice."""
    scores = []

    def score():
        scores.append(float(torch.rand(())))
        if len(scores) == 2:
            raise trouble("an image cannot be read")
        return scores[-1]

    calm, _ = train(tmp_path / "calm", score=lambda: float(torch.rand(())))
    with pytest.raises(trouble):
        train(tmp_path / "wild", score=score)
    saved = torch.load(tmp_path / "wild" / "checkpoint.pth", weights_only=True)
    assert (saved["epoch"], saved["step"], saved["steps"]) == (1, STEPS, 2 * STEPS)
    model, run = train(tmp_path / "wild", score=score)
    assert len(scores) == 3
    assert same(calm.state_dict(), model.state_dict())
    assert lines(tmp_path / "wild") == lines(tmp_path / "calm")
    with (tmp_path / "wild" / "metrics.jsonl").open("a") as file:  # killed after its lines, before it was saved
        file.write(json.dumps({"step": 10, "epoch": 1, "group": "knn", "top1": 0.5}) + "\n")
    save_checkpoint({k: v for k, v in saved.items() if k != "checksum"}, tmp_path / "wild" / "checkpoint.pth")
    train(tmp_path / "wild", score=score)
    assert [x["group"] for x in lines(tmp_path / "wild")] == [x["group"] for x in lines(tmp_path / "calm")]


def test_features_that_training_made_infinite_stop_the_run(tmp_path):
    def score():
        error = NotFinite("10-NN: the features of 3 images are not finite", "look at that image")
        assert str(error) == "10-NN: the features of 3 images are not finite; look at that image"
        raise pickle.loads(pickle.dumps(error))  # as from another rank

    with pytest.raises(RunStopped, match=f"^10-NN: .* finite after {STEPS} steps, so the training has diverged"):
        train(tmp_path, score=score)


def test_a_run_that_has_nothing_left_to_do_says_so(tmp_path, capsys):
    train(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")}
    capsys.readouterr()
    train(tmp_path)
    assert "nothing is left to do: 2 epochs are done and --epochs is 2" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pth")} == before


def test_an_error_of_the_data_waits_for_a_signal_but_a_loss_that_is_not_finite_does_not(tmp_path):
    def check(batch):
        raise UserError("5.jpg could not be opened")

    with pytest.raises(UserError, match="could not be opened"):
        train(tmp_path / "a", check=check)

    def signalled(batch):
        os.kill(os.getpid(), signal.SIGUSR1)
        check(batch)

    with pytest.raises(RunPaused):
        train(tmp_path / "a", check=signalled)
    with pytest.raises(RunStopped, match="not finite at epoch 1, step 4"):
        train(tmp_path / "b", broken=[3], stop_at=3)
    assert not (tmp_path / "b" / "checkpoint.pth").exists()


def test_steps_that_are_not_finite_are_left_out(tmp_path):
    model, run = train(tmp_path / "skip", broken=[2, 3, 7], on_nonfinite="skip")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert run.steps == 10
    assert (tmp_path / "skip" / "log.txt").read_text().count("the step is skipped") == 3
    assert all(line["loss"] == line["loss"] for line in lines(tmp_path / "skip"))
    with pytest.raises(RunStopped, match="2 steps in a row were not finite, more than --nonfinite-limit 1"):
        train(tmp_path / "limit", broken=[2, 3], on_nonfinite="skip", nonfinite_limit=1)


def test_a_step_that_is_left_out_is_as_if_it_had_changed_nothing(tmp_path):
    """The weights after a bad first step are those that the run began with, and the momentum is none."""
    with pytest.raises(RunPaused):
        train(tmp_path, broken=[0], on_nonfinite="skip", stop_at=0)
    saved = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 2))
    assert same(model.state_dict(), saved["state_dict"])
    assert saved["updater"]["optimizer"]["state"] == {}
    assert saved["skipped"] == 1


def test_without_trouble_skip_changes_nothing(calm, tmp_path):
    model, _ = train(tmp_path, on_nonfinite="skip")
    assert same(calm[0], model.state_dict())


def test_another_number_of_processes(calm, tmp_path):
    """Refused where the loss is of each process's batch, unless asked for; else the averages go on as their mean."""
    with pytest.raises(RunPaused):
        train(tmp_path, stop_at=3)
    path = tmp_path / "checkpoint.pth"
    saved = torch.load(path, weights_only=True)
    saved.pop("checksum")
    (averages,) = saved["averages"]
    other = {"totals": {k: 3 * v for k, v in averages["totals"].items()}, "counts": averages["counts"]}
    saved |= {"random": saved["random"] * 2, "averages": [averages, other], "buffers": [{}, {}]}
    save_checkpoint(saved, path)
    words = f"--output {tmp_path} holds a run of 2 processes and this has 1; the loss is of each, so it would be"
    with pytest.raises(UserError) as caught:
        train(tmp_path, per_process="the loss is of each")
    assert words in str(caught.value)
    train(tmp_path, per_process="the loss is of each", resume="force")
    line = next(line for line in lines(tmp_path) if line["step"] == 5)
    first = next(line for line in calm[1] if line["step"] == 5)
    assert line["size"] == pytest.approx((2 * float(averages["totals"]["size"]) + 2 * first["size"]
                                          - float(averages["totals"]["size"])) / 2)
    assert "had 2 processes and now has 1" in (tmp_path / "log.txt").read_text()


def test_mean_of_averages():
    states = [{"totals": {"loss": torch.tensor(x)}, "counts": {"loss": 2}} for x in (1.0, 2.0, 6.0)]
    assert mean_state(states) == {"totals": {"loss": torch.tensor(3.0)}, "counts": {"loss": 2}}


@pytest.mark.parametrize(("text", "expected"), [("500", (500, 0)), ("90s", (0, 90)), ("30m", (0, 1800)),
                                                ("2h", (0, 7200)), ("0", (0, 0))])
def test_interval(text, expected):
    assert Interval.parse(text) == expected


@pytest.mark.parametrize("text", ["", "x", "-5", "5d", "1.5h", "m", "5 m"])
def test_no_interval(text):
    with pytest.raises(ValueError, match="neither a number of steps"):
        Interval.parse(text)


def test_when_it_is_time():
    steps, time = Interval.parse("5"), Interval.parse("2m")
    assert [n for n in range(12) if steps.due(n, 1e9)] == [5, 10]
    assert [time.due(5, x) for x in (0, 119, 120, 500)] == [False, False, True, True]
    assert not Interval.parse("0").due(5, 1e9)


# ---- on several ranks


def open_with(rank, folder, of_rank):
    """What a rank is told that opens a run with the settings and images of its own."""
    own = dict(of_rank[rank])
    try:
        what = Description({"data_fingerprint": "abc", "workers": rank}, {}, {}, resumable={"workers"},
                           alike={"the scored images": own.pop("scored", "x")})
        what.config.update(own)
        Run.open(RunSettings(str(folder)), what, process_of(rank), 0).finish()
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("other", "said"), [
    ({}, ""), ({"data_fingerprint": "abd"}, "data_fingerprint: rank 0 has abc and rank 1 has abd; "),
    ({"scored": "y"}, "the scored images: rank 0 has x and rank 1 has y; "),
    ({"far_k": 3}, "far_k: rank 0 has None and rank 1 has 3; ")])
def test_ranks_with_other_images_or_settings_are_refused_together(other, said, tmp_path):
    folder = tmp_path / "run"
    (tmp_path / "meet").mkdir()
    found = on_ranks(2, open_with, tmp_path / "meet", folder, [{}, other])
    assert found[0] == found[1]
    assert found[0].startswith(said)
    assert bool(found[0]) == bool(said)
    assert folder.exists() == (not said)


def process_of(rank):
    return Process(rank, dist.get_world_size(), CPU, dist.new_group(backend="gloo"))


def buffers(rank):
    model = nn.BatchNorm1d(3)
    model.running_mean.fill_(rank)
    saved = differing_buffers({"state_dict": model, "updater": None}, rank)
    fresh = nn.BatchNorm1d(3)
    load_buffers({"state_dict": fresh}, saved[rank])
    return [sorted(x) for x in saved], fresh.running_mean.tolist()


def begin_and_go_on(rank, folder):
    """Buffers of each rank after a new start from unlike tensors, and after a start that goes on, wrapped late."""
    found = []
    for start in range(2):
        process, model = process_of(rank), nn.BatchNorm1d(2)
        model.running_mean.fill_(10 + rank)
        nn.init.constant_(model.weight, rank + 1)
        run = Run.open(RunSettings(str(folder)), Description({}, {}, {"state_dict": model}), process, 0)
        wrap(model, process)
        found += [model.running_mean.tolist(), model.weight.tolist(), torch.rand(()).item()]
        model.running_mean.fill_(rank)
        if start == 0:
            run.save(0, {})
            found.append(torch.rand(()).item())
        run.finish()
        process.closing.close()
    return found


def test_ranks_begin_alike_and_go_on_with_what_each_had_wherever_the_network_is_wrapped(tmp_path):
    (tmp_path / "meet").mkdir()
    found = on_ranks(2, begin_and_go_on, tmp_path / "meet", tmp_path / "run")
    for rank, (mean, weight, drawn, after, mean_again, weight_again, drawn_again) in enumerate(found):
        assert (mean, weight) == ([10, 10], [1, 1])
        assert (mean_again, weight_again, drawn_again) == ([rank, rank], [1, 1], after)
        assert drawn != after
    assert found[0][2] != found[1][2]


def gradients_late_and_early(rank):
    """The second step's gradients by a wrapper that has seen the first, and by one that is new; and their mean."""
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for _ in range(3) for layer in (nn.Linear(300, 300), nn.ReLU())])
    fresh, process = copy.deepcopy(net), Process(rank, dist.get_world_size(), CPU)
    first, second = torch.randn(2, 4, 300, generator=torch.Generator().manual_seed(rank))
    model, new = wrap(net, process), wrap(fresh, process)
    model(first).square().sum().backward()
    net.zero_grad()
    model(second).square().sum().backward()
    new(second).square().sum().backward()
    alone = copy.deepcopy(net)
    alone.zero_grad()
    alone(second).square().sum().backward()
    means = [torch.cat([x.grad.flatten() for x in network.parameters()]) for network in (net, fresh)]
    expected = torch.cat([x.grad.flatten() for x in alone.parameters()]).double()
    dist.all_reduce(expected)
    return torch.equal(*means), float((means[0] - expected / dist.get_world_size()).abs().max() / expected.abs().max())


def test_gradients_of_a_run_that_goes_on_are_the_same_on_three_ranks(tmp_path):
    for same_bits, error in on_ranks(3, gradients_late_and_early, tmp_path):
        assert same_bits
        assert error < 1e-6


def test_what_differs_among_ranks_is_kept(tmp_path):
    for rank, (names, mean) in enumerate(on_ranks(2, buffers, tmp_path)):
        assert names == [[], ["state_dict.running_mean"]]
        assert mean == [rank] * 3
