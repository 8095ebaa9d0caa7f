"""The learning-rate rule against the original's written out, and an update whose precision is a no-op when off."""

import contextlib
import math

import pytest
import torch
from torch import nn

from runtime.errors import UserError
from runtime.optim import Updater, learning_rate, precision


def originals_rule(epoch, base, epochs, cos, schedule):
    """The original code: nothing happens in the first five epochs, then the cosine or the steps, one rate an epoch."""
    if epoch < 5:
        return base
    lr = base
    if cos:
        lr *= 0.5 * (1.0 + math.cos(math.pi * epoch / epochs))
    else:
        for milestone in schedule:
            lr *= 0.1 if epoch >= milestone else 1.0
    return lr


@pytest.mark.parametrize("epochs", [1, 3, 5, 6, 25, 200])
@pytest.mark.parametrize("cos", [True, False])
def test_default_is_the_originals(epochs, cos):
    for epoch in range(epochs):
        for step in (0, 3, 9):
            found = learning_rate(epoch, step, 10, base=0.03, epochs=epochs, cosine=cos, milestones=[120, 160])
            assert found == pytest.approx(originals_rule(epoch, 0.03, epochs, cos, [120, 160]), rel=1e-12)
    if epochs == 200 and not cos:
        assert found == pytest.approx(0.0003)


def test_papers_numbers():
    rates = [learning_rate(epoch, 0, 100, base=0.03, epochs=25) for epoch in range(25)]
    assert rates[:5] == [0.03] * 5
    assert rates[5] == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi / 5)))
    assert all(a > b for a, b in zip(rates[4:], rates[5:], strict=False))
    assert rates[24] == pytest.approx(0.03 * 0.5 * (1 + math.cos(math.pi * 0.96)))


@pytest.mark.parametrize("warmup", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_ramp_climbs_evenly_to_the_base_rate(warmup, steps):
    rates = [learning_rate(e, s, steps, base=0.4, epochs=20, warmup=warmup) for e in range(warmup)
             for s in range(steps)]
    count = warmup * steps
    assert rates == pytest.approx([0.4 * (i + 1) / count for i in range(count)])
    after = learning_rate(warmup, 0, steps, base=0.4, epochs=20, warmup=warmup)
    assert after == pytest.approx(0.4 * 0.5 * (1 + math.cos(math.pi * warmup / 20)))


def test_no_warmup():
    assert learning_rate(0, 0, 7, base=0.4, epochs=20, warmup=0) == 0.4
    assert learning_rate(1, 0, 7, base=0.4, epochs=20, warmup=0) < 0.4
    assert learning_rate(4, 0, 7, base=1, epochs=9, warmup=0, cosine=False, milestones=[2, 4]) == pytest.approx(0.01)
    assert learning_rate(3, 6, 7, base=1, epochs=9, warmup=0, cosine=False, milestones=[2, 4]) == pytest.approx(0.1)
    assert learning_rate(1, 6, 7, base=1, epochs=9, warmup=0, cosine=False, milestones=[2, 4]) == 1


def test_precision():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [precision("auto", d) for d in (cpu, gpu)] == ["off", "fp16"]
    assert [precision(a, d) for a in ("off", "bf16") for d in (cpu, gpu)] == ["off", "off", "bf16", "bf16"]
    assert precision("fp16", gpu) == "fp16"
    with pytest.raises(UserError, match="--amp fp16 needs a CUDA GPU"):
        precision("fp16", cpu)


@pytest.mark.parametrize(("amp", "taken"), [("auto", "off"), ("off", "off"), ("bf16", "bf16")])
def test_what_was_taken_is_there_for_config_json(amp, taken):
    updater = Updater(torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1), torch.device("cpu"), amp)
    assert updater.decided == {"precision": taken}
    with updater.autocast():
        assert torch.is_autocast_enabled("cpu") == (taken == "bf16")


def problem():
    torch.manual_seed(1)
    return nn.Linear(4, 3), torch.randn(8, 4), torch.randn(8, 3)


def test_what_is_off_is_a_no_op():
    """With precision off the steps are those of a plain torch loop, to the last bit."""
    model, x, y = problem()
    updater = Updater(torch.optim.SGD(model.parameters(), 99.0, 0.9, weight_decay=1e-2), torch.device("cpu"))
    plain, _, _ = problem()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=1e-2)
    for rate in (0.1, 0.05, 0.01):
        with updater.autocast():
            out = model(x)
            loss = (out - y).square().mean()
        assert out.dtype == torch.float32
        updater.step(loss, rate)
        assert all(p.grad is None for p in model.parameters())
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        (plain(x) - y).square().mean().backward()
        optimizer.step()
        assert torch.equal(model.weight, plain.weight)
        assert torch.equal(model.bias, plain.bias)
    assert not updater.scaler.is_enabled()


def test_every_parameter_group_gets_the_rate():
    model, x, y = problem()
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias], "lr": 5.0}], 1.0)
    Updater(optimizer, torch.device("cpu")).step((model(x) - y).square().mean(), 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_bf16_computes_layers_in_bfloat16_and_keeps_float32_weights():
    model, x, y = problem()
    updater = Updater(torch.optim.SGD(model.parameters(), 0.1), torch.device("cpu"), "bf16")
    before = model.weight.clone()
    with updater.autocast():
        out = model(x)
        loss = (out.float() - y).square().mean()
    assert out.dtype == torch.bfloat16
    updater.step(loss, 0.1)
    assert model.weight.dtype == torch.float32
    assert not torch.equal(model.weight, before)
    assert not updater.scaler.is_enabled()


def test_autocast_does_not_leak():
    model, x, _ = problem()
    updater = Updater(torch.optim.SGD(model.parameters(), 0.1), torch.device("cpu"), "bf16")
    with contextlib.suppress(RuntimeError), updater.autocast():
        raise RuntimeError
    assert model(x).dtype == torch.float32


def test_state_goes_on_bit_for_bit():
    def train(model, updater, steps):
        for step in range(steps):
            updater.step((model(x) - y).square().mean(), 0.1 / (1 + step))

    straight, x, y = problem()
    whole = Updater(torch.optim.SGD(straight.parameters(), 0.1, 0.9), torch.device("cpu"))
    train(straight, whole, 3)
    train(straight, whole, 2)
    broken, _, _ = problem()
    first = Updater(torch.optim.SGD(broken.parameters(), 0.1, 0.9), torch.device("cpu"))
    train(broken, first, 3)
    again, _, _ = problem()
    second = Updater(torch.optim.SGD(again.parameters(), 0.1, 0.9), torch.device("cpu"))
    again.load_state_dict(broken.state_dict())
    second.load_state_dict(first.state_dict())
    train(again, second, 2)
    assert torch.equal(again.weight, straight.weight)
