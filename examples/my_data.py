"""Your own data set, for images that are not files in a folder: a function that returns it.

    python train_distill.py --data examples/my_data.py:build --distill teacher.pth --sampler random --output run
    python compute_knn.py eval --data examples/my_data.py:build --weights run/student.pth

In this example the images are cut out of a larger one when they are requested. Return them as they are: augmentation,
resizing and normalisation are applied afterwards, as for images from a folder.
"""

import numpy as np
from PIL import Image


class Tiles:
    """Squares of a large picture, row by row; the class of a tile is the quarter of the picture that it comes from."""

    classes = ["upper left", "upper right", "lower left", "lower right"]  # needed only where there are labels

    def __init__(self, picture: np.ndarray, side: int = 32) -> None:
        self.picture, self.side, self.columns = picture, side, picture.shape[1] // side
        rows, columns = np.divmod(np.arange(picture.shape[0] // side * self.columns), self.columns)
        self.labels = 2 * (rows * side >= picture.shape[0] // 2) + (columns * side >= picture.shape[1] // 2)
        self.names = [f"tile {row},{column}" for row, column in zip(rows, columns, strict=True)]  # optional, distinct

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Image.Image:
        """A PIL image. It may also be a path, a uint8 array [H, W, 3], or a tuple that begins with one of these."""
        y, x = (n * self.side for n in divmod(i, self.columns))
        return Image.fromarray(self.picture[y:y + self.side, x:x + self.side])


def build(split: str) -> Tiles:
    """``split`` is "train" or "test". Each call must return the same images in the same order."""
    random = np.random.default_rng(0 if split == "train" else 1)
    colours = np.uint8([[[200, 60, 60], [60, 200, 60]], [[60, 60, 200], [120, 120, 120]]])
    quarters = colours.repeat(128, 0).repeat(128, 1)                      # [256, 256, 3]
    return Tiles(quarters + random.integers(0, 56, quarters.shape, dtype=np.uint8))
