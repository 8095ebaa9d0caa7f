#!/usr/bin/env python
"""Embed the images of a folder with a student, a teacher or any other checkpoint that train_distill.py can read.

    python examples/embed_images.py runs/demo/student/student.pth photos/ features.npz

The file holds ``features``, float32 [n, d], and ``names``, the n paths; numpy.load opens it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the project's folder

import numpy as np  # noqa: E402
import torch  # noqa: E402

from checkpoints.frozen import load_frozen  # noqa: E402
from data.datasets import open_source  # noqa: E402
from data.loader import evaluation_loader  # noqa: E402
from runtime.errors import UserError, run_script  # noqa: E402


def main() -> None:
    """Load, embed, save."""
    if len(sys.argv) != 4:
        raise UserError("give a checkpoint, a folder of images and the file to write, such as features.npz")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder, report = load_frozen(sys.argv[1], flag="checkpoint")  # frozen; normalises as its training did
    encoder, images, features = encoder.to(device), open_source(sys.argv[2], flag="folder"), []
    for batch in evaluation_loader(images, encoder.backbone.spec.image_size, batch_size=64, workers=0):
        for index, reason in batch.bad:
            raise UserError(f"{images.location(index)} is unreadable ({reason}); replace or remove it")
        features.append(encoder(batch.views[0].to(device)).cpu())  # uint8 [b, 3, S, S] -> float32 [b, d]
    np.savez(sys.argv[3], features=torch.cat(features).numpy(), names=[images.location(i) for i in range(len(images))])
    print(f"{report}\n{sys.argv[3]}: {len(images):,} images, {features[0].shape[1]} numbers each")


if __name__ == "__main__":
    run_script(main)
