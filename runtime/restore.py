"""Restores modules from a checkpoint: compares names, shapes and types first, then loads strictly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from runtime.agreement import together
from runtime.device import Process, broadcast, distributed, gather_objects
from runtime.errors import UserError
from runtime.store import digest, load_checkpoint

Stateful = Any  # has state_dict and load_state_dict


def restore_on_all(modules: Mapping[str, Stateful], state: dict[str, Any] | None, path: Path | None,
                   process: Process) -> dict[str, Any] | None:
    """Load the checkpoint on every rank, or raise on every rank."""
    with together(process):
        if path:
            state = state or load_checkpoint(path)
            restore(modules, state, path)
    return state


def restore(modules: Mapping[str, Stateful], state: Mapping[str, Any], path: Path) -> None:
    """Load each module's part of a checkpoint, strictly."""
    for name, module in modules.items():
        with refused_unless_it_fits(f"this run's {name}", path):
            if isinstance(module, nn.Module):
                check_tensors(module.state_dict(), state[name])
            module.load_state_dict(state[name])


@contextlib.contextmanager
def refused_unless_it_fits(what: str, path: Path | None = None) -> Iterator[None]:
    """Turns any error while loading the parts of a checkpoint into one :class:`UserError`."""
    try:
        yield
    except (KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"--resume{f' {path}' if path else ''}: the checkpoint does not fit {what} ({reason}); give "
                        "that of a run with the same networks, or another --output") from None


def check_tensors(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Raise ValueError unless both have the same names with tensors of the same shapes and dtypes."""
    missing, more = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
    if missing or more:
        raise ValueError(f"{missing[0]} is missing" if missing else f"it holds {more[0]} too")
    for name, value in mine.items():
        if isinstance(value, Tensor):
            other = theirs[name]
            found = (other.dtype, other.shape, other.layout) if isinstance(other, Tensor) else type(other).__name__
            if found != (value.dtype, value.shape, value.layout):
                raise ValueError(f"{name} is {_kind(other)} and should be {_kind(value)}")


def _kind(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _buffers(modules: Mapping[str, Stateful]) -> dict[str, Tensor]:
    return {f"{name}.{key}": buffer for name, module in modules.items() if isinstance(module, nn.Module)
            for key, buffer in module.named_buffers()}


def differing_buffers(modules: Mapping[str, Stateful], rank: int) -> list[dict[str, Tensor]]:
    """For each rank, by name, its buffers that differ from the first rank's (a collective)."""
    mine = _buffers(modules)
    digests = gather_objects({name: digest(buffer) for name, buffer in mine.items()})
    return gather_objects({name: mine[name].cpu() for name, value in digests[rank].items()
                           if value != digests[0].get(name)})


def alike_on_all(modules: Mapping[str, Stateful]) -> None:
    """Copy the first rank's parameters and buffers to every rank (a collective)."""
    for module in modules.values() if distributed() else ():
        for value in module.state_dict().values() if isinstance(module, nn.Module) else ():
            value.copy_(broadcast(value.contiguous()))


def load_buffers(modules: Mapping[str, Stateful], saved: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`differing_buffers`, for one rank."""
    buffers = _buffers(modules)
    check_tensors({name: buffers[name] for name in saved}, saved)
    for name, value in saved.items():
        buffers[name].copy_(value)


def mean_state(states: list[dict[str, Any]]) -> dict[str, Any]:
    """One state of :class:`Averages` with the means over all ``states``."""
    names = states[0]["totals"]
    return {"totals": {name: sum(state["totals"][name] for state in states) / len(states) for name in names},
            "counts": states[0]["counts"]}
