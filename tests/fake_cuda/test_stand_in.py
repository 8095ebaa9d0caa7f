"""The stand-in for a GPU finds what it is there to find."""

import pytest
import torch
from helpers.stand_in import Event, Misuse, StandIn, Stream
from torch import nn

CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu():
    with StandIn() as device:
        yield device


def waits(gpu):
    return {what for _, what in gpu.waits}


WAITING = {
    "a number": lambda x: x.sum().item(),
    "a float": lambda x: float(x.sum()),
    "a decision": lambda x: 1 if x.sum() > 0 else 0,
    "a list": lambda x: x.tolist(),
    "on the host": lambda x: x.cpu(),
    "places": lambda x: (x > 0).nonzero(),
    "a mask": lambda x: x[x > 0],
    "written by a mask": lambda x: x.clone().__setitem__(x > 0, x[:2, 0].clone()),
    "an index without dimensions": lambda x: x[x.argmax() // 4],
    "host indices": lambda x: x[torch.tensor([0, 1])],
    "a new tensor": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "sent": lambda x: torch.ones(3).to(x.device),
    "sent from pageable memory": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "written into": lambda x: x.clone().copy_(torch.ones(4, 4)),
    "fetched into pageable memory": lambda x: torch.empty(4, 4).copy_(x, non_blocking=True),
    "equal": lambda x: torch.equal(x, x),
    "where with a host scalar": lambda x: torch.where(x > 0, x, torch.tensor(1.0)),
}
NOT_WAITING = {
    "arithmetic": lambda x: (x @ x.T).softmax(1).mean() * 3 + torch.tensor(2.0),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "masked": lambda x: x.masked_fill(x > 0, torch.inf),
    "filled by a mask": lambda x: x.clone().__setitem__(x > 0, 0.0),
    "indices": lambda x: x[x.argmax(1)],
    "pinned": lambda x: torch.ones(3).pin_memory().to(x.device, non_blocking=True),
    "fetched": lambda x: x.to("cpu", non_blocking=True),
    "made there": lambda x: torch.arange(4, device=x.device) + torch.zeros((), device=x.device),
    "the host's own": lambda x: torch.arange(4)[torch.tensor([True, False, True, False])].tolist(),
}


@pytest.mark.parametrize("name", WAITING)
def test_a_wait_is_noted_with_its_place(name, gpu):
    WAITING[name](torch.randn(4, 4, device=CUDA))
    assert gpu.waits
    assert {place for place, _ in gpu.waits} <= {"tests/fake_cuda/test_stand_in.py:<lambda>"}


@pytest.mark.parametrize("name", NOT_WAITING)
def test_what_does_not_wait(name, gpu):
    NOT_WAITING[name](torch.randn(4, 4, device=CUDA))
    assert not gpu.waits


@pytest.mark.parametrize("name", WAITING)
def test_so_in_inference_mode(name, gpu):
    with torch.inference_mode():
        WAITING[name](torch.randn(4, 4, device=CUDA))
    assert gpu.waits


def test_a_tensor_on_the_wrong_device(gpu):
    with pytest.raises(RuntimeError, match="devices"):
        torch.randn(4, 4, device=CUDA) + torch.randn(4)


def test_the_host_is_real(gpu):
    assert torch.arange(4).sum().item() == 6
    assert not gpu.waits


def test_a_read_before_the_copy_has_arrived(gpu):
    x, event = torch.randn(3, device=CUDA), torch.cuda.Event()
    there = x.to("cpu", non_blocking=True)
    with pytest.raises(Misuse, match="arrived"):
        there.tolist()
    with pytest.raises(Misuse, match="arrived"):
        there.numpy()
    event.record()
    event.synchronize()
    assert there.tolist() == [1, 1, 1]
    assert waits(gpu) == {"an event"}


def test_an_event_of_too_early(gpu):
    event = torch.cuda.Event()
    event.record()
    there = torch.randn(3, device=CUDA).to("cpu", non_blocking=True)
    event.synchronize()
    with pytest.raises(Misuse, match="arrived"):
        there.sum()


@pytest.mark.parametrize("waited", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_a_tensor_from_another_stream(waited, kept, gpu):
    side, here = torch.cuda.Stream(CUDA), torch.cuda.current_stream(CUDA)
    with torch.cuda.stream(side):
        x = torch.ones(3).pin_memory().to(CUDA, non_blocking=True)
        event = side.record_event()
    if waited:
        here.wait_event(event)
    if kept:
        x.record_stream(here)
    if waited and kept:
        x + 1
        return
    with pytest.raises(Misuse, match="record_stream" if waited else "waited"):
        x + 1


def test_events_say_only_what_their_stream_knew(gpu):
    first, second = Stream(), Stream()
    first.now = 5
    early = first.record_event()
    first.now = 6
    second.wait_event(early)
    assert second.knows(first, 5) and not second.knows(first, 6)
    third = Stream()
    third.wait_event(second.record_event(Event()))
    assert third.knows(first, 5)


def test_backward_finds_the_parameters(gpu):
    network = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).to(CUDA)
    network[2].bias.requires_grad_(False)
    network(torch.randn(5, 4, device=CUDA)).square().mean().backward()
    assert [p.grad is not None for p in network.parameters()] == [True, True, True, False]
    assert all(p.grad.is_cuda and p.grad.shape == p.shape for p in network.parameters() if p.grad is not None)
    assert waits(gpu) == {"a copy to the device that blocks"}  # of .to()


def test_nothing_is_left_behind():
    with StandIn():
        pass
    assert torch.ones(2).tolist() == [1, 1]
    assert torch.cuda.Stream is not Stream
    network = nn.Linear(2, 1)
    network(torch.ones(1, 2)).sum().backward()
    assert network.weight.grad.tolist() == [[1, 1]]
