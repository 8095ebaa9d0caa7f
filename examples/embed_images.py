#!/usr/bin/env python
"""Embed the images of a folder with a student, a teacher or any other checkpoint that train_distill.py can read.

    python examples/embed_images.py runs/demo/student/student.pth photos/ features.npz

The result, for numpy.load, holds ``features``, float32 [n, d], and ``names``, the n paths relative to the folder.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder

import numpy as np  # noqa: E402

import coss  # noqa: E402
from runtime.errors import UserError, run_script  # noqa: E402


def main() -> None:
    """Load, embed, save."""
    if len(sys.argv) != 4:
        raise UserError("give a checkpoint, a folder of images and the file to write, such as features.npz")
    _, weights, folder, output = sys.argv
    network = coss.load(weights)      # frozen; it normalises images as in its own training
    features = network.embed(folder)  # float32 [n, d]
    np.savez(output, features=features, names=coss.names(folder))
    print(f"{network.report}\n{output}: {len(features):,} images, {network.width} numbers each")


if __name__ == "__main__":
    run_script(main)
