"""How much memory a training step needs, measured on a few rows and scaled, to refuse too large a step at once.

Counted are the tensors that live together at the worst moment of a forward and backward pass, and what the optimizer
keeps. A step needs that at least, and is refused only if that is more than there is. What it will take on a CPU is
about ``HEAP`` times as much and ``CODE``, since the allocator (glibc's) cannot reuse all that was freed, and the first
step loads code; from that on it is warned about (docs/results/SPEED.md has the estimate beside the measured peak).
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
HEAP, CODE = 1.35, 50e6  # on a CPU
STATES = {"SGD": 1, "LARS": 1, "AdamW": 2}  # numbers that an optimizer keeps for each weight


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and that are still there: ``now``, and in ``history``
    after each new one."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.history = 0, [0]
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
        self.history.append(self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def peak_of(forward: Callable[[int], Any], rows: int, networks: Iterable[nn.Module], device: torch.device,
            least: int = 2) -> float:
    """The bytes at the peak of ``forward(rows)`` and of the backward pass of its result to the ``networks``' weights,
    whose gradients stay. Buffers of the ``networks`` and random state are as before.

    It is computed from what lives after each operation with ``least`` rows and with half as many more: a straight line
    for each, since which of them is the worst depends on ``rows`` (with few, the end, where all gradients are there).
    """
    more = least + least // 2
    low, high = (torch.tensor(_history(forward, count, networks, device), dtype=torch.float64)
                 for count in (least, more))
    if len(low) != len(high):  # the code does something else with more rows
        low, high = low.max(), high.max()
    return max(high.max().item(), (low + (high - low) * ((rows - least) / (more - least))).max().item())


def _history(forward: Callable[[int], Any], rows: int, networks: Iterable[nn.Module], device: torch.device,
             ) -> list[int]:
    """What lives after each operation of ``forward(rows)`` and its backward pass, in bytes."""
    weights = list(dict.fromkeys(p for network in networks for p in network.parameters() if p.requires_grad))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), buffers_put_back(*networks):
        with LiveBytes() as live:
            kept = forward(rows)
            outputs = [x for x in tree_leaves(kept) if isinstance(x, Tensor) and x.requires_grad]
            if outputs:
                gradients = torch.autograd.grad(outputs, weights, [torch.ones_like(x) for x in outputs],
                                                allow_unused=True)
                del gradients
        return live.history


def optimizer_state(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the optimizer's own numbers after its first step."""
    return weight_bytes(optimizer) * STATES.get(type(optimizer).__name__, 1)


def weight_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all weights that are trained, and so of their gradients."""
    return sum(p.nbytes for group in optimizer.param_groups for p in group["params"])


def likely(least: float, device: torch.device) -> float:
    """What a step will take of ``device`` that needs ``least`` bytes."""
    return least * HEAP + CODE if device.type == "cpu" else least


def check_memory(needed: Mapping[str, float], device: torch.device, advice: str) -> str:
    """A warning if a step that needs the bytes ``needed``, by what for, will take nearly all that is free on
    ``device``; otherwise ''.

    Raises :class:`UserError`, which ends with ``advice``, if they are more.
    """
    least, free = sum(needed.values()), free_memory(device)
    about, where = likely(least, device), "the GPU" if device.type == "cuda" else "this machine"
    largest = sorted(filter(lambda x: x[1], needed.items()), key=lambda x: -x[1])
    parts = ", ".join(f"{amount(y)} for {x}" for x, y in largest)
    if least > free:
        raise UserError(f"a step needs at least {amount(least)} of memory ({parts}) and {amount(free)} are free on "
                        f"{where}; {advice}", every_process=False)
    return (f"a step takes about {amount(about)} of memory, at least {amount(least)} ({parts}), and {amount(free)} are "
            f"free on {where}; if it runs out, {advice}") * (about > TIGHT * free)
