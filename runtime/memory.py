"""How much memory a training step needs, measured on a few rows and scaled, to refuse too large a step at once.

Not counted: what the networks already take, workspaces of the kernels, and fragmentation, which together are a small
part of a step that is too large. So a refusal is nearly certain (the estimate for EfficientNet-B0 is 4 % too high; for
ResNet-18 and ViTs on a CPU it was 0.66 to 0.95 of the peak, least in small steps, docs/results/SPEED.md), and a
step that barely fits is warned about.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.device import free_memory
from runtime.errors import UserError
from runtime.micro_batches import buffers_put_back
from runtime.numbers import amount

TIGHT = 0.85  # share of the free memory from which a step is called tight
STATES = {"SGD": 1, "LARS": 1, "AdamW": 2}  # numbers that an optimizer keeps for each weight


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and that are still there; ``peak``: the most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        before = {x.untyped_storage()._cdata for x in tree_leaves((given, named)) if isinstance(x, Tensor)}
        found = function(*given, **(named or {}))
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in before | self.known:  # not a view
                self._add(x.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def bytes_per_row(forward: Callable[[int], Any], networks: Iterable[nn.Module], device: torch.device, least: int = 2,
                  ) -> float:
    """The memory that each row adds to the peak of ``forward(rows)``, whose result keeps what its backward pass needs:
    the difference between ``least`` rows and half as many more."""
    fewer, more = (peak_of(forward, rows, networks, device) for rows in (least, least + least // 2))
    return max(0.0, (more - fewer) / (least // 2))


def peak_of(forward: Callable[[int], Any], rows: int, networks: Iterable[nn.Module], device: torch.device) -> int:
    """The bytes at the peak of ``forward(rows)``. Buffers of the ``networks`` and random state are as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []), buffers_put_back(*networks):
        with LiveBytes() as live:
            kept = forward(rows)
        del kept
        return live.peak


def training_state(optimizer: torch.optim.Optimizer, world_size: int) -> int:
    """Bytes of the gradients, of the optimizer's numbers and, with several processes, of DDP's buckets."""
    weights = sum(p.nbytes for group in optimizer.param_groups for p in group["params"])
    return weights * (1 + STATES.get(type(optimizer).__name__, 1) + (world_size > 1))


def fits(needed: Mapping[str, float], device: torch.device) -> bool:
    """Whether :func:`check_memory` has nothing to say."""
    return sum(needed.values()) <= TIGHT * free_memory(device)


def check_memory(needed: Mapping[str, float], device: torch.device, advice: str) -> str:
    """A warning if the bytes ``needed``, by what for, are nearly all that is free on ``device``; otherwise ''.

    Raises :class:`UserError`, which ends with ``advice``, if they are more.
    """
    total, free = sum(needed.values()), free_memory(device)
    where = "the GPU" if device.type == "cuda" else "this machine"
    largest = sorted(filter(lambda x: x[1], needed.items()), key=lambda x: -x[1])
    said = f"a step needs about {amount(total)} of memory ({', '.join(f'{amount(y)} for {x}' for x, y in largest)})"
    if total > free:
        raise UserError(f"{said} and {amount(free)} are free on {where}; {advice}", every_process=False)
    return f"{said} of {amount(free)} that are free on {where}; if it runs out, {advice}" * (total > TIGHT * free)
