#!/usr/bin/env python
"""Test images corrupted as in ImageNet-C and CIFAR-10-C, for `evaluate.py robustness` and SHIFTED=DIR of
scripts/compare_methods.sh.

    pip install imagecorruptions "setuptools<81" "numpy<2"  # beside requirements.txt, in an environment of its own
    python benchmarks/corrupt.py --data cifar --output cifar-c --image-size 64 --images 50 --severities 1 3 5

Takes the first --images of each class of the test images, cut as the linear protocol cuts them, so that a corruption's
strength means the same for images of any size. Writes OUTPUT/CORRUPTION/SEVERITY/CLASS/NUMBER.png. numpy's random
numbers are seeded for each image, which makes all but impulse_noise repeatable. Corruptions that the installed versions
cannot compute are named and left out.
"""

from __future__ import annotations

import argparse
import sys
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

if __name__ == "__main__":
    from runtime.start import begin
    begin()

import numpy as np
from PIL import Image

from data.augment import linear_transform
from data.datasets import open_source
from runtime.errors import UserError, run_script
from runtime.numbers import number
from runtime.packages import need_package


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a data set with test images in class folders")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--image-size", type=number(int, 1), default=224,
                        help="the side of the network's images; default 224")
    parser.add_argument("--images", type=number(int, 1), default=50, help="of each class; default 50")
    parser.add_argument("--severities", type=int, nargs="+", default=[1, 2, 3, 4, 5], choices=range(1, 6))
    return parser.parse_args()


def first_of_each_class(data: str, size: int, count: int) -> list[tuple[str, np.ndarray]]:
    """The first ``count`` test images of each class as (its name, uint8 [size, size, 3])."""
    source, transform = open_source(data, "test", labelled=True), linear_transform(size)
    rows = [i for label in range(len(source.classes)) for i in np.flatnonzero(source.labels == label)[:count].tolist()]
    return [(source.classes[source.labels[i]], transform(source.open(i)).permute(1, 2, 0).numpy()) for i in rows]


def main() -> None:
    args = parse_args()
    package = need_package("imagecorruptions", "corrupt.py", install='imagecorruptions "setuptools<81" "numpy<2"')
    if args.output.exists():
        raise UserError(f"--output {args.output} exists; name a new folder")
    images = first_of_each_class(args.data, args.image_size, args.images)
    for name in package.get_corruption_names():
        try:
            package.corrupt(images[0][1], corruption_name=name, severity=args.severities[0])
        except (TypeError, AttributeError) as error:  # an argument or a type that newer versions no longer have
            print(f"{name} is left out: {error}")
            continue
        for severity in args.severities:
            for i, (kind, pixels) in enumerate(images):
                np.random.seed(zlib.crc32(f"{name}/{severity}/{i}".encode()))  # noqa: NPY002  (the package's own)
                made = package.corrupt(pixels, corruption_name=name, severity=severity)
                file = args.output / name / str(severity) / kind / f"{i:05d}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.uint8(made)).save(file)
        print(f"{name}: {len(images) * len(args.severities)} images")


if __name__ == "__main__":
    run_script(main)
