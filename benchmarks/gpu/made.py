#!/usr/bin/env python
"""What benchmarks/gpu.sh feeds a run with: photographs, made up if there are none, and a teacher of random weights."""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import cycle, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from runtime.start import begin
    begin(reads_proc=True)

import numpy as np
from PIL import Image

SIZE = (500, 375)  # the middle of ImageNet's


def photograph(path: Path, size: tuple[int, int] = SIZE, tint: int | None = None) -> None:
    """A JPEG with structure at every scale, as a photograph has it; its name is its seed. ``tint``: one of ten hues."""
    rng = np.random.default_rng(int(path.stem))
    picture = np.zeros((size[1], size[0], 3), np.float32)
    for cells, strength in ((4, 70), (16, 35), (64, 18), (250, 9)):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)).resize(size, Image.BICUBIC)
        picture += (np.asarray(noise, np.float32) / 127.5 - 1) * strength
    hue = 0 if tint is None else 90 * np.cos(2 * np.pi * (tint / 10 + np.arange(3) / 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(picture + 128 + hue, 0, 255).astype(np.uint8)).save(path, quality=90)


def listed(listing: Path, count: int, source: Path | None) -> None:
    """``listing``: a line for each of ``count`` images, those under ``source`` again and again, or made here."""
    if source:
        found = sorted(path for path in source.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        paths = list(islice(cycle(found), count if found else 0))
    else:
        paths = [listing.parent / "photos" / f"{i:06d}.jpg" for i in range(count)]
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(partial(photograph, size=SIZE if count > 100 else (60, 45)), paths, chunksize=16))
    listing.write_text("".join(f"{path.absolute()}\n" for path in paths))


def tree(root: Path, train: int, test: int) -> None:
    """``root``/{train,test}/CLASS/: five classes that differ in hue."""
    for split, count, first in (("train", train, 0), ("test", test, 10_000)):
        for kind in range(5):
            for i in range(count):
                photograph(root / split / f"class{kind}" / f"{first + 100 * i + kind}.jpg", (40, 40), 2 * kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path, required=True, help="list of images to write")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--source", type=Path, help="folder of photographs to list; default: made")
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--arch", required=True)
    parser.add_argument("--image-size", type=int, required=True)
    args = parser.parse_args()
    args.photos.parent.mkdir(parents=True, exist_ok=True)
    listed(args.photos, args.count, args.source)
    import torch  # here, since the rest is also imported by who has no need of it
    from step_recipes import random_networks
    teacher, _ = random_networks(args.arch, "shufflenet_v2_x0_5", args.image_size)
    torch.save({"arch": args.arch, "stem": "imagenet", "image_size": args.image_size,
                "state_dict": teacher.backbone.state_dict()}, args.teacher)
    print(f"{args.count} images in {args.photos}, {args.teacher}")


if __name__ == "__main__":
    main()
