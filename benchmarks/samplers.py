#!/usr/bin/env python
"""Time and memory until the first batch of an epoch: our samplers compared with an epoch composed in Python.

    python benchmarks/samplers.py                    # ImageNet's 1,281,167 images, 31 neighbours each
    python benchmarks/samplers.py --k 384

Each sampler runs in a fresh process. The neighbour table is a file (int64, random neighbours within 600 places,
images of a cluster side by side). Ours maps it and the reference loads it, as the original code does; neither figure
includes that, since both start when the sampler is built. Memory is the growth of the process's peak resident memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from runtime.start import begin
    begin(reads_proc=True)

import numpy as np

from data.neighbours import load_neighbours
from data.samplers import (
    ClusterNeighbourSampler,
    ClusterSampler,
    NeighbourSampler,
    RandomSampler,
)

BATCH, NEAREST_K, TOTAL_K, REACH = 64, 15, 31, 600


# ---- the reference: the same epochs, composed whole before the first batch, an image at a time


def reference_random(n: int, near: None, clusters: None) -> Iterator[list[int]]:
    order = np.random.default_rng(0).permutation(n).tolist()
    return iter([order[start:start + BATCH] for start in range(0, n - BATCH + 1, BATCH)])


def reference_cf(n: int, near: np.ndarray, clusters: None) -> Iterator[list[int]]:
    batches, batch = [], []
    for anchor in np.random.default_rng(0).permutation(n).tolist():
        batch.append(anchor)
        batch.extend(np.random.choice(near[anchor][:TOTAL_K], NEAREST_K, replace=False))
        if len(batch) == BATCH * (1 + NEAREST_K):
            batches.append(batch)
            batch = []
    return iter(batches)


def reference_cluster(n: int, near: None, clusters: list[list[int]]) -> Iterator[list[int]]:
    generator, batches = np.random.default_rng(0), []
    for number in generator.permutation(len(clusters)).tolist():
        images = clusters[number]
        images = [images[place] for place in generator.permutation(len(images)).tolist()]
        batches.extend(images[start:start + BATCH] for start in range(0, len(images) - BATCH + 1, BATCH))
    return iter(batches)


def reference_cluster_cf(n: int, near: np.ndarray, clusters: list[list[int]]) -> Iterator[list[int]]:
    """Clusters in turn, the next unseen image of each with its nearest, until 95 % were seen."""
    order = np.random.default_rng(0).permutation(len(clusters)).tolist()
    seen, batches, batch, place, turn = set(), [], [], [0] * len(clusters), 0
    while len(seen) < 0.95 * n:
        number = order[turn % len(order)]
        turn += 1
        images = clusters[number]
        while place[number] < len(images) and images[place[number]] in seen:
            place[number] += 1
        if place[number] == len(images):
            continue
        anchor = images[place[number]]
        group = [anchor, *near[anchor][:NEAREST_K].tolist()]
        seen.update(group)
        batch.extend(group)
        if len(batch) == BATCH * (1 + NEAREST_K):
            batches.append(batch)
            batch = []
    return iter(batches)


REFERENCES: dict[str, Callable] = {"random": reference_random, "cf": reference_cf, "cluster": reference_cluster,
                                   "cluster+cf": reference_cluster_cf}


# ---- one measurement, in a process of its own


def peak_memory() -> int:
    """The largest resident memory of this process since the last reset, in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def start_measuring() -> tuple[float, float, int]:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # what was freed goes back, or it would be used again unseen
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    return time.perf_counter(), time.process_time(), peak_memory()


def measured(start: float, cpu: float, peak: int) -> dict[str, float]:
    return {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "bytes": peak_memory() - peak}


def measure(which: str, name: str, table: Path, num_clusters: int) -> dict[str, float]:
    """Seconds and bytes from building the sampler to the first batch; for ours the rest of the epoch too."""
    n = len(np.load(table, mmap_mode="r"))
    labels = (np.arange(n) * num_clusters // n).astype(np.int32)
    if which == "reference":
        near = np.load(table) if "cf" in name else None
        clusters = [part.tolist() for part in np.split(np.arange(n), np.flatnonzero(np.diff(labels)) + 1)]
        begun = start_measuring()
        next(REFERENCES[name](n, near, clusters))
        return measured(*begun)
    mapped, _ = load_neighbours(table, "", n, TOTAL_K)
    begun = start_measuring()
    sampler = {"random": lambda: RandomSampler(n, BATCH),
               "cf": lambda: NeighbourSampler(mapped, BATCH, NEAREST_K, TOTAL_K),
               "cluster": lambda: ClusterSampler(labels, BATCH),
               "cluster+cf": lambda: ClusterNeighbourSampler(mapped, labels, BATCH, NEAREST_K, TOTAL_K)}[name]()
    iteration = iter(sampler)
    next(iteration)
    result = measured(*begun)
    start = time.perf_counter()
    steps = sum(1 for _ in iteration)
    result |= {"per_step": (time.perf_counter() - start) / steps, "said": str(sampler.statistics)}
    start = time.perf_counter()
    sampler.set_epoch(1, steps // 2)  # in the middle of an epoch not seen before, as after a restart
    next(iter(sampler))
    return result | {"resume": time.perf_counter() - start}


def write_table(path: Path, n: int, k: int) -> None:
    generator = np.random.default_rng(0)
    table = np.lib.format.open_memmap(path, "w+", np.int64, (n, k))
    for start in range(0, n, 65536):
        rows = np.arange(start, min(n, start + 65536))[:, None]
        table[rows[:, 0]] = (rows + generator.integers(1, REACH, (len(rows), k))) % n
    table.flush()
    with path.open("rb") as file:  # out of the page cache, as a file of yesterday: pages just written come in bulk
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1_281_167, help="images; default ImageNet's")
    parser.add_argument("--k", type=int, default=31, help="columns of the neighbour table; default 31")
    parser.add_argument("--num-clusters", type=int, default=1000, help="default 1000")
    parser.add_argument("--folder", default=None, help="where the table is written; default: the system's")
    parser.add_argument("--one", nargs=3, metavar=("WHICH", "NAME", "TABLE"), help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.one:
        which, name, table = args.one
        print(json.dumps(measure(which, name, Path(table), args.num_clusters)))
        return
    print(f"{args.n:,} images, {args.k} neighbours each in the table, {BATCH} anchors a step"
          f" with {NEAREST_K} of {TOTAL_K}, {args.num_clusters:,} clusters")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        table = Path(folder) / "closek_info.npy"
        write_table(table, args.n, args.k)
        for name in REFERENCES:
            ours, reference = (json.loads(subprocess.run(
                [sys.executable, __file__, "--num-clusters", str(args.num_clusters), "--one", which, name, str(table)],
                check=True, capture_output=True, text=True).stdout) for which in ("ours", "reference"))
            print(f"{name:10s} first batch {1e3 * ours['seconds']:.0f} ms ({1e3 * ours['cpu']:.0f} ms of CPU), "
                  f"reference {reference['seconds']:.2f} s ({reference['cpu']:.2f}), ratio "
                  f"{reference['seconds'] / ours['seconds']:.1f};  more memory {ours['bytes'] / 1e6:.1f} MB, "
                  f"reference {reference['bytes'] / 1e6:6.1f} MB, ratio "
                  f"{reference['bytes'] / max(ours['bytes'], 1):6.1f};  "
                  f"{1e6 * ours['per_step']:.0f} us a step, start in mid-epoch {1e3 * ours['resume']:.0f} ms")
            print(f"{'':10s} an epoch: {ours['said']}")


if __name__ == "__main__":
    main()
