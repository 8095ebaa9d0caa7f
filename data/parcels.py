"""Sending a worker's batch to the main process: in shared memory if it has room, else through the pipe."""

from __future__ import annotations

import functools
import os
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from torch.utils.data._utils.pin_memory import pin_memory

from runtime.numbers import amount

SHARED = "/dev/shm"
SPARE = 8  # 1/SPARE of the shared memory stays free, for NCCL and other jobs


@dataclass(frozen=True)
class Parcel:
    """A pickled batch. The worker pickles it itself, because an error in the queue's own thread, where torch would
    pickle it, is only printed, and the main process would wait for ever."""

    content: bytes
    in_shared_memory: bool

    @classmethod
    def of(cls, batch: Any) -> Parcel:
        """Pickle ``batch`` with its tensors in shared memory, or with their content if shared memory or
        file descriptors run out."""
        tensors = list(_tensors(batch))
        if fits(sum(x.untyped_storage().nbytes() for x in tensors if not x.is_shared())):
            try:
                for x in tensors:  # all of them before pickling registers the first for the main process
                    x.share_memory_()
                return cls(bytes(ForkingPickler.dumps(batch)), True)
            except (RuntimeError, OSError):  # another process took the memory meanwhile
                pass
        return cls(pickle.dumps(batch, pickle.HIGHEST_PROTOCOL), False)

    def open(self) -> Any:
        """The batch, in the main process."""
        if not self.in_shared_memory:
            _say_short()
        return pickle.loads(self.content)

    def pin_memory(self) -> Any:
        """The batch in pinned memory; torch's pinning thread calls this."""
        return pin_memory(self.open())


def packed(batch: Any) -> Any:
    """A collate_fn for data sets that return whole batches: a :class:`Parcel` in a worker, else the batch unchanged."""
    return batch if get_worker_info() is None else Parcel.of(batch)


def room() -> tuple[int, int] | None:
    """Free and total bytes of shared memory; None if the system does not tell."""
    try:
        found = os.statvfs(SHARED)
    except (OSError, AttributeError):
        return None
    return found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize


def fits(size: int) -> bool:
    """Whether ``size`` bytes more leave enough shared memory free."""
    free, total = room() or (size, 0)
    return free - size >= total // SPARE


def allocate(size: int) -> Tensor:
    """uint8 [size], uninitialised. In a worker it is in shared memory if it fits, so that sending it copies nothing."""
    if get_worker_info() is not None and fits(size):
        try:  # as torch's own default_collate does
            return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(size))
        except RuntimeError:
            pass
    return torch.empty(size, dtype=torch.uint8)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


@functools.cache  # once a process
def _say_short() -> None:
    free, total = room() or (0, 0)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"{SHARED} has too little shared memory ({amount(free)} of {amount(total)} are free), so workers send "
              "their batches through pipes, which is slower; enlarge it (docker run --shm-size 8g), or "
              "lower --workers or the batch size", file=sys.stderr, flush=True)
