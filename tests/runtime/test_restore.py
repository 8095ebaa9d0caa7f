"""What a checkpoint holds is compared with what it goes into, before anything of it is believed."""

from pathlib import Path

import pytest
import torch
from torch import nn

from runtime.errors import UserError
from runtime.optim import Updater
from runtime.optimizers import build_optimizer
from runtime.restore import load_buffers, restore

PATH = Path("checkpoint.pth")


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize(("change", "words"), [
    ({"0.weight": torch.zeros(4, 3, dtype=torch.int64)}, r"0.weight is torch.int64 \[4, 3\] and should be torch.flo"),
    ({"0.weight": torch.zeros(4, 3, dtype=torch.complex64)}, "complex64"),
    ({"0.weight": torch.zeros(3, 4)}, r"\[3, 4\]"), ({"0.weight": torch.zeros(4, 3).to_sparse()}, "0.weight"),
    ({"0.weight": 3.0}, "is float and should be"), ({"0.weight": None}, "NoneType"), ({"more": torch.ones(1)}, "more"),
    ({"1.num_batches_tracked": torch.zeros(1, dtype=torch.int64)}, "num_batches_tracked")])
def test_a_network_of_other_tensors_is_refused_and_stays_as_it_was(change, words):
    network = model()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError, match=f"--resume checkpoint.pth: the checkpoint does not fit this run's.*{words}"):
        restore({"net": network}, {"net": {**{k: v + 1 for k, v in before.items()}, **change}}, PATH)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    restore({"net": network}, {"net": {k: v + 1 for k, v in before.items()}}, PATH)
    assert torch.equal(network[0].weight, before["0.weight"] + 1)


@pytest.mark.parametrize("state", [{}, {"net": None}, {"net": 3}, {"net": []}])
def test_a_part_of_another_kind_or_none_at_all(state):
    with pytest.raises(UserError, match="does not fit this run's net"):
        restore({"net": model()}, state, PATH)


def trained(name):
    network = model()
    updater = Updater(build_optimizer(name, network.parameters(), 0.1, 0.9, 0.0), torch.device("cpu"))
    updater.step(network(torch.randn(5, 3)).square().mean(), 0.1)
    return network, updater


@pytest.mark.parametrize(("name", "key"), [("sgd", "momentum_buffer"), ("lars", "momentum_buffer"),
                                           ("adamw", "exp_avg"), ("adamw", "exp_avg_sq"), ("adamw", "step")])
@pytest.mark.parametrize("value", [torch.ones(1), torch.ones(2_000_000), torch.ones(4, 3, dtype=torch.float64),
                                   torch.ones(3, 4), torch.ones(4, 3).to_sparse(), 3, "x"])
def test_what_an_optimizer_has_accumulated_has_the_shape_of_its_parameter(name, key, value):
    """A fused kernel reads and writes as many numbers as the parameter has, whatever the file gave."""
    state = trained(name)[1].state_dict()
    network, updater = trained(name)
    updater.load_state_dict(state)
    first = next(iter(state["optimizer"]["state"]))
    state["optimizer"]["state"][first][key] = value
    with pytest.raises(UserError, match=f"its {key} of parameter {first} is .* and should be float32"):
        restore({"updater": updater}, {"updater": state}, PATH)
    updater.step(network(torch.randn(5, 3)).square().mean(), 0.1)


def test_what_is_accumulated_is_of_the_parameters_kind():
    """Weights in float64 have a float64 buffer, and one of float32 beside them is refused."""
    network = model().double()
    updater = Updater(build_optimizer("sgd", network.parameters(), 0.1, 0.9, 0.0), torch.device("cpu"))
    updater.step(network(torch.randn(5, 3, dtype=torch.float64)).square().mean(), 0.1)
    state = updater.state_dict()
    updater.load_state_dict(state)
    state["optimizer"]["state"][0]["momentum_buffer"] = torch.ones(4, 3)
    with pytest.raises(UserError, match=r"is torch.float32 \[4, 3\] and should be float64 \[4, 3\]"):
        restore({"updater": updater}, {"updater": state}, PATH)


@pytest.mark.parametrize("change", [{99: {"momentum_buffer": torch.ones(1)}}, {0: {"other": torch.ones(4, 3)}}])
def test_parameters_and_names_that_are_not_there(change):
    _, updater = trained("sgd")
    state = updater.state_dict()
    state["optimizer"]["state"].update(change)
    with pytest.raises(UserError, match="its optimizer has"):
        restore({"updater": updater}, {"updater": state}, PATH)


def test_buffers_of_a_rank():
    network = model()
    load_buffers({"net": network}, {"net.1.running_mean": torch.full((4,), 2.0)})
    assert network[1].running_mean.tolist() == [2.0] * 4
    for saved in ({"net.1.running_mean": torch.ones(1)}, {"net.1.running_mean": torch.ones(4, dtype=torch.int64)},
                  {"none": torch.ones(1)}):
        with pytest.raises((ValueError, KeyError)):
            load_buffers({"net": network}, saved)
    assert network[1].running_mean.tolist() == [2.0] * 4
