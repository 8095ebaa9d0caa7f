"""A tree of images, the packed file of it, and what a test of packed files asks."""

import numpy as np
import pytest
from PIL import Image

from data.datasets import open_source
from data.packing import pack
from data.packing_part import Recipe
from data.sources import ArraySource
from runtime.errors import UserError

SIZES = [(40, 30), (20, 60), (16, 16), (33, 50), (90, 31), (24, 24), (48, 64)]
JPEG, RAW = Recipe("jpeg", 24, 90), Recipe("raw", 24)


def picture(number):
    width, height = SIZES[number % len(SIZES)]
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 2, y * 2, (x + y + 20 * number) % 256], -1).astype(np.uint8))


@pytest.fixture
def tree(tmp_path):
    """Two classes, 10 images of several sizes, JPEG and PNG, with names that sort otherwise than numbers."""
    for number in range(10):
        path = tmp_path / "tree" / ("b" if number % 2 else "a") / f"{number}é.{'png' if number == 4 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    return tmp_path / "tree"


def refusal(call, *args, **options):
    with pytest.raises(UserError) as caught:
        call(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def packed(tree, tmp_path):
    pack(open_source(str(tree)), tmp_path / "train.pack", Recipe(), 0)
    return tmp_path / "train.pack"


class Counting(ArraySource):
    """Counts what it is asked for, and calls `stop` at one image."""

    stop_at, asked = None, ()

    def open(self, i):
        if i == self.stop_at:
            self.stop()
        self.asked += (i,)
        return super().open(i)


def counting():
    images = np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    return Counting(images, np.arange(20) % 2, ["a", "b"], "made")
