"""LARS against its formula in plain numbers, the groups, and AdamW and SGD as torch has them."""

import math

import pytest
import torch
from torch import nn

from runtime.errors import UserError
from runtime.optim import Updater
from runtime.optimizers import LARS, Optimization, build_optimizer

CPU = torch.device("cpu")


def test_a_rate_that_was_not_given_is_in_proportion_to_the_images_of_a_step():
    one, said = Optimization(epochs=3).scaled(0.03, 1024, 64)
    assert (one.lr, one.epochs, said) == (0.001875, 3, "--lr 0.001875: 0.03 for 1,024 images a step, scaled to 64")
    given = Optimization(lr=0.1)
    assert given.scaled(0.03, 1024, 64) == (given, "")


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_the_papers_rate_is_none_for_another_optimizer(name):
    Optimization(optimizer=name, lr=0.001).check()
    with pytest.raises(UserError, match=f"--optimizer {name} has no default learning rate; give --lr, "):
        Optimization(optimizer=name).check()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)).double()


def gradients_of(step, shapes):
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def naive(weights, steps, rate, momentum, decay, decay_rest, trust):
    """You et al., algorithm 1, number by number; vectors by plain SGD."""
    flat = [w.flatten().tolist() for w in weights]
    speed = [[0.0] * len(w) for w in flat]
    for step in range(steps):
        for i, g in enumerate(gradients_of(step, [w.shape for w in weights])):
            g, w = g.flatten().tolist(), flat[i]
            if weights[i].ndim > 1:
                norm_w, norm_g = math.sqrt(sum(x * x for x in w)), math.sqrt(sum(x * x for x in g))
                factor = trust * norm_w / (norm_g + decay * norm_w) if norm_w and norm_g else 1.0
                g = [factor * (a + decay * b) for a, b in zip(g, w, strict=True)]
            else:
                g = [a + decay_rest * b for a, b in zip(g, w, strict=True)]
            speed[i] = [momentum * v + a for v, a in zip(speed[i], g, strict=True)]
            flat[i] = [x - rate * v for x, v in zip(w, speed[i], strict=True)]
    return [torch.tensor(x, dtype=torch.float64).view_as(w) for x, w in zip(flat, weights, strict=True)]


@pytest.mark.parametrize(("decayed", "decay_rest"), [("auto", 0.0), ("kernels", 0.0), ("all", 0.01)])
def test_lars_is_the_papers_formula(decayed, decay_rest):
    model = network()
    with torch.no_grad():
        model[2].weight.zero_()  # without a length there is no ratio
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer("lars", model.parameters(), 2.0, 0.9, 0.01, decayed)
    for step in range(4):
        for p, g in zip(model.parameters(), gradients_of(step, [w.shape for w in weights]), strict=True):
            p.grad = g
        optimizer.step()
    for p, expected in zip(model.parameters(), naive(weights, 4, 2.0, 0.9, 0.01, decay_rest, 0.001), strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-14)


def test_lars_sees_through_a_gradient_scaler_and_leaves_no_trace_of_an_infinite_step():
    """What torch's scaler hands to a fused optimizer: gradients times a scale, the scale, and whether any was inf."""
    ends = []
    for scale in (1.0, 1024.0):
        model = network()
        optimizer = build_optimizer("lars", model.parameters(), 2.0, 0.9, 0.01)
        for step in range(3):
            for p, g in zip(model.parameters(), gradients_of(step, [w.shape for w in model.parameters()]), strict=True):
                p.grad = g * scale * (math.inf if step == 1 else 1)
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(scale), torch.tensor(float(step == 1))
            optimizer.step()
        ends.append([p.detach() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        assert torch.isfinite(a).all()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_lars_passes_over_what_has_no_gradient():
    model = network()
    before = model[0].weight.detach().clone()
    optimizer = LARS(model.parameters(), 1.0)
    model[2].weight.grad = torch.ones_like(model[2].weight)
    optimizer.step()
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(("name", "decayed", "expected"), [
    ("sgd", "auto", {"all": 0.1}), ("sgd", "all", {"all": 0.1}), ("sgd", "kernels", {"kernels": 0.1, "rest": 0.0}),
    ("adamw", "auto", {"kernels": 0.1, "rest": 0.0}), ("adamw", "all", {"all": 0.1})])
def test_what_decays(name, decayed, expected):
    model = network()
    model[0].bias.requires_grad_(False)
    optimizer = build_optimizer(name, model.parameters(), 0.5, 0.8, 0.1, decayed)
    trained = [p for p in model.parameters() if p.requires_grad]
    named = {"all": trained, "kernels": [p for p in trained if p.ndim > 1], "rest": [p for p in trained if p.ndim < 2]}
    assert [(group["params"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (named[key], decay) for key, decay in expected.items()]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_others_are_torchs_own(name):
    mine, theirs = network(), network()
    optimizer = build_optimizer(name, mine.parameters(), 0.03, 0.8, 1e-2, "all")
    plain = (torch.optim.SGD(theirs.parameters(), 0.03, 0.8, weight_decay=1e-2) if name == "sgd" else
             torch.optim.AdamW(theirs.parameters(), 0.03, (0.8, 0.999), weight_decay=1e-2))
    for step in range(3):
        for model, one in ((mine, optimizer), (theirs, plain)):
            for p, g in zip(model.parameters(), gradients_of(step, [p.shape for p in model.parameters()]), strict=True):
                p.grad = g
            one.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def loss_of(model, step):
    return model(torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))).square().sum()


def updater_of(name, model, **options):
    return Updater(build_optimizer(name, model.parameters(), 0.01, 0.9, 1e-2), CPU, **options)


@pytest.mark.parametrize("name", ["sgd", "lars", "adamw"])
def test_a_checkpoint_goes_on_where_it_was(name, tmp_path):
    straight = network()
    updater = updater_of(name, straight)
    for step in range(5):
        updater.step(loss_of(straight, step), 0.01)
    first = network()
    updater = updater_of(name, first)
    for step in range(3):
        updater.step(loss_of(first, step), 0.01)
    torch.save({"model": first.state_dict(), "updater": updater.state_dict()}, tmp_path / "c.pth")
    state = torch.load(tmp_path / "c.pth", weights_only=True)
    again = network()
    again.load_state_dict(state["model"])
    updater = updater_of(name, again)
    updater.load_state_dict(state["updater"])
    for step in range(3, 5):
        updater.step(loss_of(again, step), 0.01)
    for a, b in zip(again.parameters(), straight.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_brings_what_was_accumulated_and_not_the_settings():
    model = network()
    old = Updater(build_optimizer("sgd", model.parameters(), 0.01, 0.9, 1e-2), CPU)
    old.step(loss_of(model, 0), 0.01)
    new = Updater(build_optimizer("sgd", model.parameters(), 0.01, 0.5, 0.0), CPU)
    new.load_state_dict(old.state_dict())
    assert (new.optimizer.param_groups[0]["momentum"], new.optimizer.param_groups[0]["weight_decay"]) == (0.5, 0.0)
    assert torch.equal(new.optimizer.state[model[0].weight]["momentum_buffer"],
                       old.optimizer.state[model[0].weight]["momentum_buffer"])
    with pytest.raises(ValueError, match="trained by SGD and --optimizer is AdamW"):
        updater_of("adamw", model).load_state_dict(old.state_dict())
    with pytest.raises(ValueError, match="grouped in another way"):
        Updater(build_optimizer("sgd", model.parameters(), 0.01, 0.9, 1e-2, "kernels"), CPU).load_state_dict(
            old.state_dict())


def test_momentum_takes_the_layout_of_the_weights():
    """A checkpoint of plain tensors, and weights that lie channels last: the fused kernel wants both alike."""
    plain, last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    last.load_state_dict(plain.state_dict())
    old, new = updater_of("sgd", plain), updater_of("sgd", last)
    images = torch.randn(2, 3, 5, 5)
    old.step(plain(images).square().sum(), 0.01)
    last.load_state_dict(plain.state_dict())
    new.load_state_dict(old.state_dict())
    buffer = new.optimizer.state[last.weight]["momentum_buffer"]
    assert buffer.stride() == last.weight.stride() != plain.weight.stride()
    assert torch.equal(buffer, old.optimizer.state[plain.weight]["momentum_buffer"])
    old.step(plain(images).square().sum(), 0.01)
    new.step(last(images).square().sum(), 0.01)
    torch.testing.assert_close(last.weight, plain.weight)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e9])
def test_clipping(clip):
    model, plain = network(), network()
    updater_of("sgd", model, clip=clip).step(loss_of(model, 0), 0.01)
    loss_of(plain, 0).backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in plain.parameters()))
    assert norm > 0.5
    factor = min(1.0, clip / norm) if clip else 1.0
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - 0.01 * (factor * q.grad + 1e-2 * q.detach()),
                                   rtol=1e-6, atol=1e-9)


def test_what_follows_an_update():
    model, seen = network(), []
    updater_of("sgd", model, after=lambda: seen.append(model[0].weight.detach().clone())).step(loss_of(model, 0), 0.01)
    assert torch.equal(seen[0], model[0].weight)
