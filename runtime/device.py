"""Which process this is, which device it owns, and the few collectives the project needs."""

from __future__ import annotations

import contextlib
import inspect
import os
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from runtime.errors import PeerLost, UserError
from runtime.numbers import amount, from_environment

JOIN_SECONDS = 600  # how long the processes of a job wait for each other at the start; COSS_JOIN_SECONDS overrides it
DEVICES = "auto, cpu, cuda, cuda:N or mps"
UNEVEN_WORK = timedelta(days=7)  # timeout of evaluations, in which one process may fit for hours while the others wait


@dataclass(frozen=True)
class Process:
    """One process of a run: alone, or one of ``world_size`` started by torchrun.

    ``control`` is a gloo group of all ranks, for the few numbers that decide what they do next without waiting for a
    device. ``closing`` closes its entries when the process ends, however it ends.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup | None = field(default=None, compare=False)
    closing: ExitStack = field(default_factory=ExitStack, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def start_process(device: str = "auto", patience: timedelta | None = None, float64: bool = False) -> Iterator[Process]:
    """Join the job that the environment describes (torchrun's RANK, LOCAL_RANK, WORLD_SIZE), or run alone.

    ``device`` is one of :data:`DEVICES`; ``float64``: the device must have it, which ``mps`` has not. Under torchrun
    each process takes the GPU of its LOCAL_RANK; the backend is NCCL on GPUs and gloo on CPUs. The process group is
    closed on exit. ``patience``: timeout of collectives; by default torch's, 10 minutes for NCCL and 30 for gloo.

    Raises :class:`PeerLost` if the job is not complete after JOIN_SECONDS.
    """
    local_rank, world_size = from_environment("LOCAL_RANK", 0), from_environment("WORLD_SIZE", 1, 1)
    chosen = _pick_device(device, local_rank)
    if float64 and chosen.type == "mps":
        raise UserError("--device mps has no float64, in which this script computes; give --device cpu")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    with ExitStack() as closing:
        if world_size == 1:
            yield Process(0, 1, chosen, closing=closing)
            return
        store, rank, world_size = own_store()
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world_size, timeout=patience)
        closing.callback(dist.destroy_process_group)
        control = dist.new_group(backend="gloo", timeout=patience)
        yield Process(dist.get_rank(), dist.get_world_size(), chosen, control, closing)


def own_store() -> tuple[dist.Store, int, int]:
    """The launcher's store with a prefix unique to this start of the processes; rank and world size.

    With ``--max-restarts``, torchrun keeps one store for all starts, in which gloo and NCCL would find the addresses of
    dead processes (pytorch issue 135712). So the first rank draws a prefix, and answers each of the others under the
    key which that rank drew: keys left by earlier processes never answer.
    """
    world_size, seconds = from_environment("WORLD_SIZE", 1, 1), from_environment("COSS_JOIN_SECONDS", JOIN_SECONDS, 1)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(f"WORLD_SIZE={world_size} in the environment says that this is one of {world_size} processes, "
                        f"but {' and '.join(missing)} is not set; start them by torchrun, or unset WORLD_SIZE")
    rank, port = from_environment("RANK", 0, 0, world_size - 1), from_environment("MASTER_PORT", 0, 0, 65535)
    try:
        return _meet(rank, world_size, timedelta(seconds=seconds)), rank, world_size
    except dist.DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{port}"
        if "EADDRINUSE" in str(error):
            raise UserError(f"port {port} of this machine (MASTER_PORT), where the processes of the job should meet, "
                            "is in use; give all of them another") from None
        raise PeerLost(f"the {world_size} processes of this job (WORLD_SIZE) did not meet at {where} within {seconds} "
                       f"seconds (COSS_JOIN_SECONDS); this is rank {rank}: start all of them, and check that "
                       "each can reach that address; to run one process alone, unset WORLD_SIZE") from None


def _meet(rank: int, world_size: int, patience: timedelta) -> dist.Store:
    """Raises dist.DistError if not all processes join within ``patience``."""
    store, *_ = next(rendezvous("env://", timeout=patience))
    store.set_timeout(patience)
    mine, until = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    if rank == 0:
        store.set("start", mine)
        for other in range(1, world_size):
            store.set(f"{mine}/{other}/{store.get(f'{mine}/{other}').decode()}", "")
        return dist.PrefixStore(mine, store)
    while time.monotonic() < until:
        name = store.get("start").decode()
        store.set(f"{name}/{rank}", mine)
        if store.check([f"{name}/{rank}/{mine}"]):
            return dist.PrefixStore(name, store)
        time.sleep(0.02)
    raise dist.DistStoreError("the first rank did not answer")


def _pick_device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is not a device; give {DEVICES}") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is not supported; give {DEVICES}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name} is for Macs with Apple silicon, and PyTorch does not find it here; give "
                        "auto, cpu or cuda")
    if device.type == "mps" and from_environment("WORLD_SIZE", 1, 1) > 1:
        raise UserError(f"--device {name} is for a single process; start it without torchrun, or give --device cpu")
    if device.index is not None and from_environment("WORLD_SIZE", 1, 1) > 1:
        raise UserError(f"--device {name} gives every process the same device; give --device {device.type}")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if device.index is None else device.index
        last = max(index, int(os.environ.get("LOCAL_WORLD_SIZE", 1)) - 1)  # so that every rank raises, none waits
        if last >= count:
            raise UserError(f"--device {name} asks for GPU {last}, counted from 0, but this machine shows {count} "
                            "GPU(s), and each process takes one; start fewer processes, set CUDA_VISIBLE_DEVICES, or "
                            "use --device cpu")
        return torch.device("cuda", index)
    return device


def free_memory(device: torch.device) -> int:
    """Free bytes on ``device``; of main memory, this process's share among the ranks of its machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    with contextlib.suppress(OSError, StopIteration, ValueError):  # not Linux
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with contextlib.suppress(OSError, StopIteration, ValueError):  # a container's own limit, "max" for none
        group = Path("/sys/fs/cgroup")
        lines = (group / "memory.stat").read_text(encoding="utf-8").splitlines()
        cached = int(next(line for line in lines if line.startswith("inactive_file")).split()[1])
        used = int((group / "memory.current").read_text(encoding="utf-8")) - cached
        free.append(int((group / "memory.max").read_text(encoding="utf-8")) - used)
    return max(0, min(free)) // from_environment("LOCAL_WORLD_SIZE", 1, 1)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy ``tensor`` from the host to ``device`` without waiting for the device's queued work.

    That needs pinned memory; torch keeps it until the copy is done and then reuses it.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def need_memory(size: int, flag: str) -> None:
    """Refuse ``flag`` if fewer than ``size`` bytes of main memory are free for its buffers: the system may allocate
    them and then kill the process that writes there."""
    free = free_memory(torch.device("cpu"))
    if size > free:
        raise UserError(f"{flag} takes {amount(size)} of memory and {amount(free)} are free; give less")


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (every device). Samplers and augmentations take the seed as an argument instead."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def distributed() -> bool:
    """Whether a process group is up."""
    return dist.is_available() and dist.is_initialized()


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenate every rank's ``tensor`` [n, …] (equal shapes) along dim 0 in rank order. No gradient."""
    if not distributed():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_reduce_mean(tensor: torch.Tensor) -> torch.Tensor:
    """The mean of every rank's ``tensor``; the input is left alone. No gradient."""
    if not distributed():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's ``tensor``; the input is left alone. No gradient."""
    if not distributed():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Rank 0's ``tensor``, written into every other rank's (in place, and returned)."""
    if distributed():
        dist.broadcast(tensor, src=0)
    return tensor


def gather_objects(value: Any) -> list[Any]:
    """Every rank's ``value`` (small, picklable) in rank order, on every rank."""
    if not distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    """Wait for every rank."""
    if distributed():
        dist.barrier()


def wrap(module: torch.nn.Module, process: Process) -> torch.nn.Module:
    """``module`` inside DistributedDataParallel if there are several processes; its tensors stay as they are.

    :meth:`runtime.run.Run.open` makes them equal on all ranks. During training each rank keeps its own buffers, as in
    the original; rank 0's are saved.
    """
    if process.world_size == 1:
        return module
    parallel = torch.nn.parallel.DistributedDataParallel
    devices = [process.device] if process.device.type == "cuda" else None
    renamed = "forward_sync_buffers" in inspect.signature(parallel).parameters  # in torch 2.15
    own_buffers = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    wrapped = parallel(module, device_ids=devices, init_sync=False,
                       gradient_as_bucket_view=True, **own_buffers)
    if process.device.type == "cpu" and process.world_size > 2:
        wrapped.register_comm_hook(None, _mean_in_order)
    return wrapped


def _mean_in_order(_, bucket):  # noqa: ANN001, ANN202 - DistributedDataParallel does not understand them as text
    """Average gradients in rank order, so that a resumed run has bit-identical sums.

    gloo's order of addition depends on a gradient's place in its bucket, and DistributedDataParallel rebuilds its
    buckets after the first step of each start. (With two ranks the order does not matter.)
    """
    world = dist.get_world_size()
    parts = [torch.empty_like(bucket.buffer()) for _ in range(world)]

    def mean(_: object) -> torch.Tensor:
        for part in parts[1:]:
            parts[0].add_(part)
        return parts[0].div_(world)

    return dist.all_gather(parts, bucket.buffer(), async_op=True).get_future().then(mean)
