"""Workers that die: the epoch ends in one sentence, which names the worker and the likely cause."""

import os
import re
import signal
from collections import namedtuple

import pytest
import torch
from helpers.noise import N, Source, augment
from torch.utils.data._utils import signal_handling
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

import data.parcels
from data.batches import named_deaths
from data.loader import build_loader
from data.samplers import RandomSampler
from runtime.errors import UserError


class Deadly(Source):
    """Its worker ends when image 13 is asked for."""

    end = None

    def pixels(self, i):
        if i == 13:
            os.kill(os.getpid(), self.end) if self.end else os._exit(7)
        return super().pixels(i)


@pytest.mark.parametrize("end", [signal.SIGKILL, None])
def test_a_dead_worker_ends_the_epoch_in_one_sentence(end, monkeypatch):
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.2,))  # torch looks every 5 s
    source, handler = Deadly(), signal.getsignal(signal.SIGCHLD)
    source.end = end
    loader = build_loader(source, [augment()], RandomSampler(N, 4), 2, 0, "cpu")
    with pytest.raises(UserError, match="data worker [01] .*(ended by SIGKILL|ended with exit code 7)"):
        list(loader)
    assert signal.getsignal(signal.SIGCHLD) is handler


def test_torchs_handler_is_gone_before_a_worker_can_die(monkeypatch):
    seen, handler = [], signal.getsignal(signal.SIGCHLD)
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)  # as in a fresh process
    monkeypatch.setattr(torch.utils.data.DataLoader, "_get_iterator",
                        lambda self: seen.append(signal.getsignal(signal.SIGCHLD)) or iter(()))
    assert list(build_loader(Source(), [augment()], RandomSampler(N, 4), 2, 0, "cpu")) == []
    assert seen == [handler]
    assert signal_handling._SIGCHLD_handler_set


Worker = namedtuple("Worker", "pid exitcode join", defaults=(lambda seconds: None,))
TORCH = RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")


@pytest.mark.parametrize(("code", "said"), [(-9, "SIGKILL.*out of memory.*--workers"),
                                            (-7, "SIGBUS.*packed file, was cut short"),
                                            (-11, "SIGSEGV.*crashed its decoder.*--data-path pil"),
                                            (-15, "SIGTERM.*another process"), (7, "exit code 7.*--workers 0")])
@pytest.mark.parametrize("error", [TORCH, ConnectionResetError(), EOFError()])
def test_a_dead_worker_is_named_with_the_likely_cause(code, said, error):
    with pytest.raises(UserError, match=f"data worker 1 .process 12. .*{said}") as caught, \
            named_deaths([Worker(11, None), Worker(12, code), Worker(13, 0)]):
        raise error
    assert "\n" not in str(caught.value)
    assert not caught.value.every_process


def test_sigbus_is_shared_memorys_where_that_is_full(monkeypatch):
    monkeypatch.setattr(data.parcels, "room", lambda: (0, 64_000_000))
    with pytest.raises(UserError, match=r"SIGBUS.*shared memory is full.*--shm-size"), named_deaths([Worker(11, -7)]):
        raise TORCH


@pytest.mark.parametrize("error", [RuntimeError("a mistake"), OSError("no disk"), TORCH])
def test_what_is_no_death_is_left_alone(error):
    with pytest.raises(type(error), match=re.escape(str(error))), named_deaths([Worker(11, None), Worker(12, 0)]):
        raise error


def test_other_errors_of_a_worker_are_left_alone():
    class Wrong(Source):
        def pixels(self, i):
            raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        list(build_loader(Wrong(), [augment()], RandomSampler(N, 4), 1, 0, "cpu"))
