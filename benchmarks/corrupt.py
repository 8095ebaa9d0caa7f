#!/usr/bin/env python
"""Test images corrupted as in ImageNet-C and CIFAR-10-C, for `evaluate.py robustness` and SHIFTED=DIR of
scripts/compare_methods.sh.

    pip install imagecorruptions "setuptools<81" "numpy<2"        # best in an environment of its own
    python benchmarks/corrupt.py --data cifar --output cifar-c --image-size 64 --images 50 --severities 1 3 5

Takes the first --images of each class of DATA/test (or val), cut as the linear protocol cuts them (Resize(256),
CenterCrop(224), scaled to --image-size), so that a corruption's strength means the same for images of any size. Writes
OUTPUT/CORRUPTION/SEVERITY/CLASS/NUMBER.png. The package's random numbers are seeded for each image. Corruptions that
the installed versions cannot compute are named and left out.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with test/CLASS/ or val/CLASS/")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--image-size", type=int, default=224, help="the side of the network's images; default 224")
    parser.add_argument("--images", type=int, default=50, help="of each class; default 50")
    parser.add_argument("--severities", type=int, nargs="+", default=[1, 2, 3, 4, 5], choices=range(1, 6))
    return parser.parse_args()


def cut(path: Path, size: int) -> np.ndarray:
    """uint8 [size, size, 3]."""
    with Image.open(path) as image:
        image, short = image.convert("RGB"), round(size * 256 / 224)
        scale = short / min(image.size)
        image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BILINEAR)
    left, top = ((side - size) // 2 for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def chosen(folder: Path, count: int) -> Iterator[Path]:
    """The first files of each class."""
    for kind in sorted(path for path in folder.iterdir() if path.is_dir()):
        yield from sorted(path for path in kind.iterdir() if path.suffix.lower() in SUFFIXES)[:count]


def main() -> None:
    args = parse_args()
    try:
        from imagecorruptions import corrupt, get_corruption_names
    except ImportError as error:
        sys.exit(f"error: the package imagecorruptions cannot be imported ({error}); its installation is in --help")
    folder = next((args.data / name for name in ("test", "val") if (args.data / name).is_dir()), None)
    if folder is None:
        sys.exit(f"error: --data {args.data} holds neither test/ nor val/")
    if args.output.exists():
        sys.exit(f"error: --output {args.output} exists; name a new folder")
    images = [(path, cut(path, args.image_size)) for path in chosen(folder, args.images)]
    for name in get_corruption_names():
        try:
            corrupt(images[0][1], corruption_name=name, severity=args.severities[0])
        except (TypeError, AttributeError) as error:  # an argument or a type that newer versions no longer have
            print(f"{name} is left out: {error}")
            continue
        for severity in args.severities:
            for number, (path, pixels) in enumerate(images):
                np.random.seed(zlib.crc32(f"{name}/{severity}/{number}".encode()))  # noqa: NPY002  (the package's own)
                made = corrupt(pixels, corruption_name=name, severity=severity)
                file = args.output / name / str(severity) / path.parent.name / f"{number:05d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.uint8(made)).save(file)
        print(f"{name}: {len(images) * len(args.severities)} images")


if __name__ == "__main__":
    main()
