#!/usr/bin/env python
"""Our nearest-neighbour search compared with the reference algorithm: in one run, alternating, medians.

    python benchmarks/knn.py                                              # 25,000 x 512, k = 384, on GPU or CPU
    python benchmarks/knn.py --rows 1281167 --dim 2048 --device cuda --repeats 1 --reference-rows 128116 \\
        --products bf16 tf32 float32                                      # ImageNet's size on one GPU, in minutes

The reference (below) multiplies 256 rows at a time with all, excludes the row itself, and takes topk of the complete
row. Features are Gaussian around --clusters centres, in cluster order, with length 1. Memory is the peak without
features and results. --reference-rows limits the comparison, as the reference is slow, and then searches all rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

if __name__ == "__main__":
    from runtime.start import begin
    begin(reads_proc=True)

import torch
from torch import Tensor

from runtime.errors import UserError
from search.exact import search
from search.faiss_search import search_faiss
from search.products import PRODUCTS

IMAGENET = (1_281_167, 2_048, 384)
REFERENCE_ROWS = 256


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=25_000, help="features; default 25000")
    parser.add_argument("--dim", type=int, default=512, help="numbers a feature; default 512")
    parser.add_argument("--k", type=int, default=384, help="neighbours a row; default 384")
    parser.add_argument("--clusters", type=int, default=100, help="centres of the made features; default 100")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="cpu, cuda or cuda:N; default: a GPU, if any")
    parser.add_argument("--repeats", type=int, default=3, help="repetitions, alternating; default 3")
    parser.add_argument("--memory", type=float, default=None, metavar="GB",
                        help="limit of our search, in GiB; default: half of what is free")
    parser.add_argument("--products", nargs="+", choices=PRODUCTS, default=["float32"],
                        help="numbers of our products, a line each; default float32")
    parser.add_argument("--reference-rows", type=int, default=0, metavar="N",
                        help="compare on N of the rows, evenly taken, then search among all, near alone")
    parser.add_argument("--seconds", type=float, default=float("inf"),
                        help="start no search of all rows that would end after so many; default: no limit")
    parser.add_argument("--json", metavar="FILE", help="the figures, written anew after each search of all rows")
    parser.add_argument("--threads", type=int, default=None, help="threads of a CPU; default: torch's")
    return parser.parse_args()


def made_features(rows: int, dim: int, clusters: int, device: torch.device) -> Tensor:
    """Features float32 [rows, dim] of length 1."""
    generator = torch.Generator(device).manual_seed(0)
    centres = torch.randn(clusters, dim, generator=generator, device=device)
    features = torch.randn(rows, dim, generator=generator, device=device)
    for first in range(0, rows, 65_536):
        number = torch.arange(first, min(first + 65_536, rows), device=device) * clusters // rows
        part = features[first:first + 65_536].add_(centres[number] / 2)
        part.div_(part.norm(dim=1, keepdim=True))
    return features


def reference(features: Tensor, k: int, far: bool) -> Tensor:
    """The original's way: int64 [n, k] near, and far computed beside it."""
    near = torch.empty(len(features), k, dtype=torch.int64)
    for first in range(0, len(features), REFERENCE_ROWS):
        similarity = features[first:first + REFERENCE_ROWS] @ features.T
        own = torch.arange(len(similarity), device=features.device)
        similarity[own, own + first] = -torch.inf
        near[first:first + REFERENCE_ROWS] = similarity.topk(k, dim=1).indices.cpu()
        if far:
            similarity[own, own + first] = torch.inf
            similarity.topk(k, dim=1, largest=False).indices.cpu()
    return near


def product(features: Tensor, products: str = "float32") -> None:
    """All rows with all, a tile of 4,096 x 4,096 at a time (16,384 x 16,384 on a GPU), into the same memory."""
    step = min(4096 if features.device.type == "cpu" else 16_384, len(features))
    features = features.bfloat16() if products == "bf16" else features
    out = torch.empty(step * step, device=features.device, dtype=features.dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if products == "tf32" else "highest")
    for first in range(0, len(features), step):
        rows = features[first:first + step]
        for other in range(0, len(features), step):
            columns = features[other:other + step]
            torch.mm(rows, columns.T, out=out[:len(rows) * len(columns)].view(len(rows), len(columns)))
    torch.set_float32_matmul_precision(before)


def gathered(blocks: object) -> Tensor:
    """Indices of all blocks, near ones."""
    return torch.cat([block.near.indices for block in blocks])


class Peak:
    """Peak memory in bytes: of the GPU, or of this process, sampled every 5 ms."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.most, self.over = device, 0, threading.Event()

    def __enter__(self) -> Peak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            self.before = self._resident()
            self.thread = threading.Thread(target=self._watch)
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.most = torch.cuda.max_memory_allocated(self.device) - self.before
            return
        self.over.set()
        self.thread.join()
        self.most -= self.before

    def _watch(self) -> None:
        while not self.over.wait(0.005):
            self.most = max(self.most, self._resident())

    @staticmethod
    def _resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def timed(work: Callable[[], object], device: torch.device) -> tuple[float, int, object]:
    """Seconds, peak bytes and the result of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    with Peak(device) as peak:
        start = time.perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return seconds, peak.most, result


def on_paper(seconds: float, product_seconds: float, rows: int, dim: int, halves: bool, devices: int) -> float:
    """Seconds for ImageNet: products scale by their multiplications, the rest by the number of scores. One device makes
    half of the products; each of 8 makes those of its rows with its share of the bank, 1/16 of them twice."""
    n, d, _ = IMAGENET
    made = 0.5 if halves else 1.0
    of_products = min(product_seconds * made, seconds)
    share = (0.5 if devices == 1 else 1 - 0.5 / devices) if halves else 1.0
    pairs = n / rows * n / rows / devices
    return pairs * (of_products / made * share * d / dim + (seconds - of_products))


def main() -> None:
    """Compare, say what it means for ImageNet, and search among all rows where the comparison was on some."""
    args = parse_args()
    began = time.monotonic()
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    features = made_features(args.rows, args.dim, args.clusters, device)
    some = features if not args.reference_rows else features[
        torch.linspace(0, args.rows - 1, args.reference_rows, device=device).long()]
    medians, report = compared(some, args, device)
    report = {"device": name_of(device), "torch": torch.__version__, "rows": args.rows, "dim": args.dim, "k": args.k,
              "compared": report, "all": {}}
    write(report, args.json)
    if not args.reference_rows:
        return
    print(f"\nall {args.rows:,} rows, near")
    for products in args.products:
        pairs = (args.rows / len(some)) ** 2
        guess = pairs * medians[f"ours, {products}, near"]
        if time.monotonic() - began + guess > args.seconds:
            print(f"  {products}: left out, it would take about {guess:.0f} s", flush=True)
            continue
        report["all"][products] = whole(features, products, pairs * medians[f"product, {products}"], args, device)
        write(report, args.json)


def name_of(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def write(report: dict, path: str | None) -> None:
    if path:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")


def options_of(args: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Of our search."""
    return {"memory": None if args.memory is None else int(args.memory * 2**30), "device": device}


def whole(features: Tensor, products: str, bare: float, args: argparse.Namespace, device: torch.device,
          ) -> dict[str, float]:
    """Our search among all rows. ``bare``: seconds of the bare product. Of 256 rows the neighbours are looked up in the
    reference's way as well."""
    sample = torch.linspace(0, len(features) - 1, min(256, len(features))).long()

    def work() -> Tensor:
        kept = []
        for block in search(None, features, args.k, products=products, **options_of(args, device)):
            mine = sample[(sample >= block.first) & (sample < block.first + len(block.near.indices))] - block.first
            kept.append(block.near.indices[mine])
        return torch.cat(kept)

    seconds, peak, found = timed(work, device)
    scores = features[sample.to(device)] @ features.T
    scores[torch.arange(len(sample), device=device), sample.to(device)] = -torch.inf
    same = same_rows(found, scores.topk(args.k, dim=1).indices.cpu())
    print(f"  {products}: {seconds:.1f} s, {seconds / bare:.2f} of the bare product ({bare:.1f} s), "
          f"{peak / 1e6:,.0f} MB more than the features, {100 * same:.1f} % of {len(sample)} rows as in the reference",
          flush=True)
    return {"seconds": seconds, "of_product": seconds / bare, "peak_mb": peak / 1e6, "same": same}


def compared(features: Tensor, args: argparse.Namespace, device: torch.device) -> tuple[dict[str, float], dict]:
    """Run all ways in turn, print the table and what it means for ImageNet; medians of the seconds, and all figures."""
    rows, options = len(features), options_of(args, device)
    works: dict[str, Callable[[], object]] = {
        **{f"product, {products}": lambda products=products: product(features, products)
           for products in dict.fromkeys(["float32", *args.products])},
        "reference, near": lambda: reference(features, args.k, False),
        "reference, near and far": lambda: reference(features, args.k, True)}
    for products in args.products:
        for far in (False, True):
            works[f"ours, {products}, near{' and far' * far}"] = lambda products=products, far=far: gathered(
                search(None, features, args.k, far=far, products=products, **options))
    try:
        faiss = search_faiss()
        if device.type == "cpu":
            works["faiss, near"] = lambda: gathered(faiss(None, features, args.k))
    except UserError:
        print("faiss is not installed, so it is not in the table")
    small = features[:min(4096, rows)].clone()
    for products in args.products:
        product(small, products)
        gathered(search(None, small, min(args.k, len(small) - 1), products=products, **options))  # warms up

    times: dict[str, list[float]] = {name: [] for name in works}
    peaks: dict[str, int] = dict.fromkeys(works, 0)
    found = {}
    for _ in range(args.repeats):
        for name, work in works.items():
            seconds, peak, result = timed(work, device)
            times[name].append(seconds)
            peaks[name] = max(peaks[name], peak)
            if result is not None:
                found[name] = result
    medians = {name: statistics.median(values) for name, values in times.items()}

    print(f"{rows:,} x {args.dim}, k = {args.k}, {name_of(device)}, torch {torch.__version__}, medians of "
          f"{args.repeats}; each beside the product in its numbers")
    print(f"{'':32s}{'seconds':>9s}{'reference / it':>16s}{'it / product':>14s}{'extra MB':>10s}{'rows as ref.':>14s}")
    report = {}
    for name, seconds in medians.items():
        fair = medians["reference, near and far" if name.endswith("far") else "reference, near"]
        same = same_rows(found[name], found["reference, near"]) if name in found else None
        numbers = next((x for x in args.products if x in name), "float32")
        bare = seconds / medians[f"product, {numbers}"]
        report[name] = {"seconds": seconds, "ratio": fair / seconds, "of_product": bare, "same": same}
        print(f"{name:32s}{seconds:9.3f}{fair / seconds:16.2f}{bare:14.2f}{peaks[name] / 1e6:10.0f}"
              + (f"{100 * same:12.3f} %" if same is not None else ""), flush=True)
    say_on_paper(medians, rows, args)
    return medians, {"rows": rows, "ways": report}


def say_on_paper(medians: dict[str, float], rows: int, args: argparse.Namespace) -> None:
    """Print the estimate for ImageNet."""
    n, d, k = IMAGENET
    print(f"\nEstimate for ImageNet ({n:,} x {d:,}, k = {k}): features {n * d * 4 / 1e9:.1f} GB in float32 or "
          f"{n * d * 2 / 1e9:.1f} in float16, neighbours {n * k * 8 / 1e9:.1f} GB; on the disk while mining "
          f"{n * (d * 4 + k * 8) / 1e9:.1f} GB; on a device the bank and {n * (3 * k + 128) * 8 / 1e9:.1f} GB of "
          "candidates if one device is to make each product once (less memory: more products, at most twice as many)")
    for products in args.products:
        seconds, bare = medians[f"ours, {products}, near"], medians[f"product, {products}"]
        each = [on_paper(seconds, bare, rows, args.dim, True, devices) for devices in (1, 8)]
        print(f"ours, {products}, near: {each[0]:,.0f} s on 1 device like this one, {each[1]:,.0f} s on 8")


def same_rows(a: Tensor, b: Tensor) -> float:
    """The share of rows whose sets of neighbours agree; where they do not, scores differ by rounding."""
    equal = [(x.sort(1).values == y.sort(1).values).all(1).sum() for x, y in
             zip(a.split(65_536), b.split(65_536), strict=True)]
    return float(sum(equal)) / len(a)


if __name__ == "__main__":
    main()
