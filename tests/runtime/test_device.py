"""One process alone: the collectives are no-ops, and the seed decides every generator."""

import random
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from runtime import device
from runtime.device import Process, start_process
from runtime.errors import UserError


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_alone():
    with start_process("cpu") as process:
        assert process == Process(0, 1, torch.device("cpu"))
        assert process.is_main
        assert not device.distributed()
        x = torch.randn(3, 2)
        assert torch.equal(device.all_gather(x), x)
        assert torch.equal(device.all_reduce_mean(x), x)
        assert torch.equal(device.broadcast(x), x)
        assert device.gather_objects({"a": 1}) == [{"a": 1}]
        device.barrier()
        device.agree(None)
        with pytest.raises(UserError, match="problem"):
            device.agree("problem")
        module = nn.Linear(2, 2)
        assert device.wrap(module, process) is module


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "", "cpu0"])
def test_unknown_device(name):
    with pytest.raises(UserError, match=r"^--device ") as caught, start_process(name):
        pass
    assert "\n" not in str(caught.value)


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="asks for GPU 1, counted from 0, but this machine shows 1"), \
            start_process("cuda:1"):
        pass
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(UserError, match="asks for GPU 3"), start_process("cuda"):
        pass


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_on_one_gpu_are_refused_on_both(monkeypatch, rank):
    """NCCL has no two ranks on one GPU; a rank that found its own would wait ten minutes for the other."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("LOCAL_RANK", rank), ("WORLD_SIZE", 2), ("LOCAL_WORLD_SIZE", 2)):
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match="asks for GPU 1.*start fewer processes"), start_process("cuda"):
        pass


def test_processes_wait_for_each_other_as_long_as_they_are_told(monkeypatch):
    """In every group, since an evaluation's waits are in all of them."""
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(device, "own_store", lambda: (dist.HashStore(), 0, 2))
    monkeypatch.setattr(dist, "init_process_group", lambda *_, timeout, **__: asked.append(timeout))
    monkeypatch.setattr(dist, "new_group", lambda *_, timeout, **__: asked.append(timeout))
    for name, answer in (("get_rank", 0), ("get_world_size", 2), ("destroy_process_group", None)):
        monkeypatch.setattr(dist, name, lambda answer=answer: answer)
    with start_process("cpu", timedelta(days=1)), start_process("cpu"):
        pass
    assert asked == [timedelta(days=1)] * 2 + [None] * 2


def test_seed():
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    device.seed_everything(4)
    one = draws()
    assert draws() != one
    device.seed_everything(4)
    assert draws() == one
    device.seed_everything(5)
    assert not set(draws()) & set(one)
