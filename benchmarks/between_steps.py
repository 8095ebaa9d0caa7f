#!/usr/bin/env python
"""Overhead of a run per step: communication between ranks, and the copy kept to inspect a bad step.

    python benchmarks/between_steps.py --arch resnet18 resnet50
    torchrun --nproc_per_node 4 benchmarks/between_steps.py

Prints one JSON object: milliseconds, the median and the least of --rounds; and, to compare with, a forward and backward
pass of --images at --size pixels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from runtime.start import begin
    begin()

import torch
import torchvision

from runtime.agreement import all_reduce_max, same_on_every_rank
from runtime.device import Process, start_process
from runtime.nonfinite import Snapshot
from runtime.state import random_state


def timed(work: Callable[[], object], rounds: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds a call of ``work``."""
    found = []
    for _ in range(rounds + 1):  # the first warms up
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(1e3 * (time.perf_counter() - began) / repeats)
    return {"median": round(statistics.median(found[1:]), 4), "least": round(min(found[1:]), 4)}


def measure(args: argparse.Namespace, process: Process) -> dict[str, object]:
    """All figures of this process."""
    device = process.device
    report: dict[str, object] = {"device": str(device), "processes": process.world_size,
                                 "threads": torch.get_num_threads(),
                                 "agreement": timed(lambda: all_reduce_max([0, 0, 0], process), args.rounds, 200,
                                                    device),
                                 "random state": timed(random_state, args.rounds, 20, device)}
    for arch in args.arch:
        model = torchvision.models.get_model(arch).to(device)
        images = torch.randn(args.images, 3, args.size, args.size, device=device)
        report[arch] = {"copy": timed(Snapshot({"student": model}).take, args.rounds, 5, device),
                        "step": timed(lambda m=model, x=images: m(x).sum().backward(), args.rounds, 1, device)}
    return report


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["resnet18"], help="students; default resnet18")
    parser.add_argument("--images", type=int, default=8, help="of a step; default 8")
    parser.add_argument("--size", type=int, default=64, help="their side in pixels; default 64")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--device", default="auto", help="auto (default: a GPU if there is one), cpu or cuda")
    args = parser.parse_args()
    with start_process(args.device) as process:
        same_on_every_rank(vars(args), process)
        report = measure(args, process)
        if process.is_main:
            print(json.dumps(report))


if __name__ == "__main__":
    main()
