"""Decisions that the processes of a job take together: whether to continue, and whether they do the same work."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from runtime.device import Process, gather_objects
from runtime.errors import PeerLost, UserError

T = TypeVar("T")


def share_error(error: UserError | None, process: Process) -> None:
    """Raise the error of the first rank that has one on every rank, so that no rank is left waiting in a collective.

    For an error that was caught earlier; :func:`together` is for a block of code.
    """
    found = next(filter(None, _everyones(error, process)), None)
    if found:
        found.every_process = True
        raise found


@contextlib.contextmanager
def together(process: Process) -> Iterator[None]:
    """Around work that each rank does by itself, without collectives: if any raises a :class:`UserError`, all ranks do.

    An error that only some ranks have begins with the rank and the name of its machine.
    """
    error = None
    try:
        yield
    except UserError as found:
        error = found
    errors = _everyones(None if error is None else (error, platform.node()), process)
    if any(errors) and not all(errors):
        rank, (found, machine) = next((rank, said) for rank, said in enumerate(errors) if said)
        found.args = (f"rank {rank} on {machine}: {found}",)
        error = found
    share_error(error, process)


def on_first_rank(work: Callable[[], T], process: Process) -> T:
    """Run ``work`` on the first rank; its result (small, picklable) or its error reaches every rank."""
    value, error = None, None
    if process.is_main:
        try:
            value = work()
        except UserError as problem:
            error = problem
    share_error(error, process)
    values = [value]
    if process.control is not None:
        dist.broadcast_object_list(values, 0, process.control)
    return values[0]


def same_on_every_rank(what: Mapping[str, Any], process: Process) -> None:
    """Raise on every rank if the processes differ in any of ``what`` {readable name: small value}."""
    first, *others = _everyones(dict(what), process)
    for rank, other in enumerate(others, 1):
        for name in {**first, **other}:
            a, b = first.get(name), other.get(name)
            if a != b:
                raise UserError(f"{name}: rank 0 has {a} and rank {rank} has {b}; every process of a job needs the "
                                "same images and settings, on each machine")


def all_reduce_max(values: list[int], process: Process) -> list[int]:
    """The element-wise maximum of all ranks' ``values``. Raises :class:`PeerLost` if a rank is gone."""
    if process.control is None:
        return values
    tensor = torch.tensor(values)
    try:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, process.control)
    except RuntimeError:
        raise PeerLost from None
    return tensor.tolist()


def _everyones(value: T, process: Process) -> list[T]:
    """Every rank's ``value`` (small, picklable) over the hosts' network, in rank order, on every rank."""
    if process.control is None:
        return gather_objects(value)
    values: list[Any] = [None] * process.world_size
    dist.all_gather_object(values, value, process.control)
    return values
