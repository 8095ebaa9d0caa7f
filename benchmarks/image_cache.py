#!/usr/bin/env python
"""What --image-cache saves: batches of neighbours read from a folder, with and without the cache of decoded images.

    python -m benchmarks.image_cache --data imagenet-sample
    python -m benchmarks.image_cache --data cifar/train --image-size 32

One process, processor time, batches as workers make them if a device applies the colours. All images fit into the cache
and are already in it, so the ratio is an upper bound. `--cache host` keeps images of one size without it.
"""

from __future__ import annotations

import argparse
import statistics
import time

if __name__ == "__main__":
    from runtime.start import begin
    begin()

import numpy as np
import torch
from torch.utils.data import DataLoader

from data.augment import augmentation
from data.cache import CachedSource
from data.datasets import open_source
from data.loader import build_loader
from data.samplers import NeighbourSampler
from data.sources import ImageSource
from runtime.errors import run_script

NEAREST, OUT_OF = 15, 31


def loader_of(source: ImageSource, batch: int, size: int) -> DataLoader:
    """Batches of `batch` images with NEAREST neighbours each, drawn at random: what matters is how often each comes."""
    rng = np.random.default_rng(0)
    near = np.stack([rng.choice(len(source), OUT_OF, replace=False) for _ in range(len(source))])
    loader = build_loader(source, [augmentation("moco_v2", size)], NeighbourSampler(near, batch), 0, 0, "cpu").loader
    loader.dataset.colour_later = True
    return loader


def pace(loader: DataLoader) -> float:
    """Images per second of processor time of an epoch."""
    start, images = time.process_time(), 0
    for batch in loader:
        images += len(batch.indices)
    return images / (time.process_time() - start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="image folder")
    parser.add_argument("--image-size", type=int, default=224, help="default 224")
    parser.add_argument("--images", type=int, default=128, help="images used, spread evenly; default 128")
    parser.add_argument("--batch", type=int, default=2, help=f"anchors, {NEAREST} neighbours each; default 2")
    parser.add_argument("--gigabytes", type=float, default=0.5, help="of the pool; default 0.5")
    parser.add_argument("--rounds", type=int, default=3, help="alternating; default 3")
    args = parser.parse_args()
    torch.set_num_threads(1)
    source = open_source(args.data)
    source = source.take(np.linspace(0, len(source) - 1, min(args.images, len(source))).astype(np.int64))
    pool = CachedSource(source, args.gigabytes)
    loaders = [loader_of(x, args.batch, args.image_size) for x in (source, pool)]
    pace(loaders[1])  # fills the pool
    rates = [[pace(loader) for loader in loaders] for _ in range(args.rounds)]
    plain, cached = (statistics.median(column) for column in zip(*rates, strict=True))
    print(f"{len(source)} images of {args.data} at {args.image_size}: {plain:,.0f} images/s of a core from the files, "
          f"{cached:,.0f} from the pool, ratio {statistics.median(b / a for a, b in rates):.2f}\n{pool.summary()}")


if __name__ == "__main__":
    run_script(main)
