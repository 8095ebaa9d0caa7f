"""One process alone: the collectives are no-ops, and the seed decides every generator."""

import random
import socket
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from runtime import device
from runtime.device import Process, start_process
from runtime.errors import PeerLost, UserError


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
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


@pytest.mark.parametrize(("changed", "words"), [
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE: 'abc' is not a whole number at least 1"),
    ({"WORLD_SIZE": "9" * 400}, "WORLD_SIZE: '9999999999"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK: 'x' is not a whole number"),
    ({"WORLD_SIZE": "2"}, "RANK and MASTER_ADDR and MASTER_PORT is not set"),
    ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "RANK: '2' is not .* at most 1"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"}, "MASTER_PORT: '70000'"),
    ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "COSS_JOIN_SECONDS": "soon"},
     "COSS_JOIN_SECONDS: 'soon'")])
def test_an_environment_that_makes_no_sense(changed, words, monkeypatch):
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words) as caught, start_process("cpu"):
        pass
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.fixture
def port():
    """A port of this machine that is in use."""
    with socket.create_server(("localhost", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_in_use(port, monkeypatch):
    for name, value in {"WORLD_SIZE": 2, "RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=f"port {port} .* is in use") as caught, start_process("cpu"):
        pass
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("rank", "host"), [(0, "localhost"), (1, "localhost"), (1, "no-such-host.invalid")])
def test_a_job_that_is_not_complete_ends_in_time(rank, host, monkeypatch):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    for name, value in {"WORLD_SIZE": 2, "RANK": rank, "MASTER_ADDR": host, "MASTER_PORT": port,
                        "COSS_JOIN_SECONDS": 1}.items():
        monkeypatch.setenv(name, str(value))
    began = time.monotonic()
    with pytest.raises(PeerLost, match=f"did not meet at {host}:{port} within 1 seconds.*rank {rank}") as caught, \
            start_process("cpu"):
        pass
    assert caught.value.exit_code == 4
    assert time.monotonic() - began < 20


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
