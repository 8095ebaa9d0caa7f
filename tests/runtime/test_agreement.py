"""What ranks find and decide together, in one process and in two."""

import platform

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import on_ranks

from runtime.agreement import all_reduce_max, on_first_rank, same_on_every_rank, share_error, together
from runtime.device import Process
from runtime.errors import RunStopped, UserError


def process_of(rank):
    return Process(rank, dist.get_world_size(), torch.device("cpu"), dist.new_group(backend="gloo"))


def told(work):
    """The error of ``work()``: its type, exit code, words, and whether each process has it."""
    try:
        work()
    except UserError as error:
        return type(error).__name__, error.exit_code, str(error), error.every_process
    return ""


def fails(error):
    if error:
        raise error


def opens(error, process):
    with together(process):
        fails(error)


def test_alone():
    process = Process(0, 1, torch.device("cpu"))
    assert all_reduce_max([3, -1], process) == [3, -1]
    assert on_first_rank(lambda: 5, process) == 5
    same_on_every_rank({"images": 3}, process)
    opens(None, process)
    error = RunStopped("x.jpg is broken")
    with pytest.raises(RunStopped, match=r"^x\.jpg is broken$") as caught:
        opens(error, process)
    assert caught.value is error


def decide(rank):
    process = process_of(rank)
    found = [all_reduce_max([rank, -rank, 7], process), on_first_rank(lambda: f"of {rank}", process)]
    for error in (None, UserError(f"rank {rank} met x.jpg", every_process=False) if rank else None,
                  RunStopped("stop") if rank == 1 else None):
        found.append(told(lambda error=error: share_error(error, process)))
    found.append(told(lambda: on_first_rank(lambda: fails(UserError("the first rank's trouble")), process)))
    for error in (None, UserError("no such folder", every_process=False) if rank == 1 else None,
                  UserError(f"no folder {rank}"), RunStopped("stop") if rank == 0 else None):
        found.append(told(lambda error=error: opens(error, process)))
    for differ in (0, 1):
        values = {"images": 3, "--lr": 0.1 * (1 + rank * differ), "--k": (1, 2)}
        found.append(told(lambda values=values: same_on_every_rank(values, process)))
    return found


def test_ranks_decide_together(tmp_path):
    results = on_ranks(2, decide, tmp_path)
    here = platform.node()
    assert results[0] == results[1] == [
        [1, 0, 7], "of 0", "", ("UserError", 2, "rank 1 met x.jpg", True), ("RunStopped", 3, "stop", True),
        ("UserError", 2, "the first rank's trouble", True),
        "", ("UserError", 2, f"rank 1 on {here}: no such folder", True), ("UserError", 2, "no folder 0", True),
        ("RunStopped", 3, f"rank 0 on {here}: stop", True),
        "", ("UserError", 2, "--lr: rank 0 has 0.1 and rank 1 has 0.2; every process of a job needs the same images "
             "and settings, on each machine", True)]
