"""What a step needs: bytes counted by hand on small networks, nothing changed by counting, and the sentences."""

import pytest
import torch
from torch import nn

from runtime import memory
from runtime.device import Process
from runtime.errors import UserError
from runtime.memory import LiveBytes, check_memory, optimizer_state, peak_of

CPU = torch.device("cpu")


def test_what_lives_is_counted_once_and_no_longer_than_it_lives():
    x = torch.zeros(1000)
    with LiveBytes() as live:
        y = x + 1                          # 4,000 bytes
        z = y.view(10, 100).t()            # the same bytes
        z += 1
        assert (live.now, max(live.history)) == (4000, 4000)
        w = y.double()                     # 8,000
        del y, z
        assert (live.now, max(live.history)) == (8000, 12000)
        del w
    assert live.now == 0


def test_the_peak_by_hand():
    """Without gradient most is there at a ReLU: the network's input, and the ReLU's own input and output."""
    network = nn.Sequential(nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU(), nn.Linear(50, 50), nn.ReLU())

    def forward(rows):
        return network(torch.zeros(rows, 100))

    with torch.no_grad():
        assert peak_of(forward, 7, [network], CPU) == 7 * 4 * (100 + 2 * 50)


@pytest.mark.parametrize("rows", [2, 40, 4000])
def test_the_peak_is_that_of_a_training_step(rows):
    """With few rows most is there at the end, all gradients; with many at the start of the backward pass. A straight
    line through the peaks would take the first for the second."""
    network = nn.Sequential(nn.Linear(10, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 3))

    def forward(count):
        return network(torch.zeros(count, 10))

    with LiveBytes() as live:
        forward(rows).sum().backward()
    gradients = sum(p.grad.nbytes for p in network.parameters())
    assert gradients <= max(live.history) <= peak_of(forward, rows, [network], CPU) <= 1.05 * max(live.history)


def test_counting_leaves_no_trace():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before, random = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    assert peak_of(lambda rows: network(torch.randn(rows, 3, 8, 8)), 8, [network], CPU) > 0
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


@pytest.mark.parametrize(("name", "numbers"), [("SGD", 1), ("AdamW", 2)])
def test_the_optimizers_numbers(name, numbers):
    """Compared with what one step of the optimizer leaves behind."""
    network = nn.Linear(30, 10)
    options = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(network.parameters(), 0.1, **options)
    network(torch.ones(2, 30)).sum().backward()
    optimizer.step()
    kept = sum(x.nbytes for state in optimizer.state.values() for x in state.values()
               if isinstance(x, torch.Tensor) and x.ndim)
    assert optimizer_state(optimizer) == kept == numbers * 4 * 310


def test_the_sentences(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda _: 10_000_000_000)
    needed = {"the loader's batches": 1e9, "256 images of 224 pixels": 9e9, "nothing": 0}
    assert check_memory({"images": 6.2e9}, Process(0, 1, CPU).device, "lower it") == ""
    assert check_memory({"images": 8.4e9}, torch.device("cuda"), "lower it") == ""
    assert check_memory({"images": 6.3e9}, CPU, "lower it") == (
        "a step takes about 8.6 GB of memory, at least 6.3 GB (6.3 GB for images), and 10.0 GB are free on this "
        "machine; if it runs out, lower it")
    check_memory(needed, CPU, "")
    with pytest.raises(UserError, match=(
            r"^a step needs at least 10\.1 GB of memory \(9\.0 GB for 256 images of 224 pixels, 1\.1 GB for the "
            r"loader's batches\) and 10\.0 GB are free on this machine; lower it$")):
        check_memory({**needed, "the loader's batches": 1.1e9}, CPU, "lower it")
