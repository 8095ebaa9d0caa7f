"""Revisited Oxford and Paris: the images, the cropped queries, and the ground truth.

Radenovic et al., "Revisiting Oxford and Paris: Large-Scale Image Retrieval Benchmarking", CVPR 2018. The layout is that
of the authors' download script: FOLDER/roxford5k/gnd_roxford5k.pkl and FOLDER/roxford5k/jpg/*.jpg.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile

from data.images import BadImage, reason_of
from data.sources import FileSource
from runtime.errors import UserError
from runtime.inert import plain_pickle
from runtime.regular import open_regular

IMAGES_FROM = {"roxford5k": "https://www.robots.ox.ac.uk/~vgg/data/oxbuildings/",
               "rparis6k": "https://www.robots.ox.ac.uk/~vgg/data/parisbuildings/"}
TRUTH_FROM = "http://cmp.felk.cvut.cz/revisitop/"
GROUPS = ("easy", "hard", "junk")


class Landmarks(NamedTuple):
    """A benchmark: cropped queries, the database, and for each query the numbers of its easy, hard and junk images."""

    queries: WholeImages
    database: WholeImages
    truth: list[dict[str, np.ndarray]]


class WholeImages(FileSource):
    """Images with their aspect ratio, shrunk so that the longer side has at most ``size`` pixels.

    ``boxes`` float [N, 4], left, top, right, bottom: each image is first cropped to its box, and then shrunk by the
    factor of the uncropped image, as in the authors' evaluations. Files are read as there: without EXIF rotation, which
    the boxes do not consider, and truncated files as far as they go. ``open`` raises data.images.BadImage.
    """

    def __init__(self, root: Path, names: Sequence[str], title: str, size: int, boxes: np.ndarray | None = None):
        super().__init__(root, names, None, [], title)
        self.size, self.boxes = size, boxes

    def open(self, i: int) -> Image.Image:
        try:
            with _truncated_files(), open_regular(self.location(i)) as file, Image.open(file) as image:
                image = image.convert("RGB")
        except Exception as error:  # decoders raise all kinds
            raise BadImage(reason_of(error)) from None
        longer = max(image.size)
        if self.boxes is not None:
            image = image.crop(tuple(self.boxes[i].tolist()))
        limit = max(1, self.size * max(image.size) // longer)
        image.thumbnail((limit, limit), Image.Resampling.LANCZOS)
        return image

    def encoded(self, i: int) -> None:
        """None, since the pixels differ from the file's."""

    def fingerprint(self) -> str:
        """Of the names, the size and the boxes."""
        digest = hashlib.sha256(f"{super().fingerprint()} {self.size}".encode())
        digest.update(b"" if self.boxes is None else self.boxes.tobytes())
        return digest.hexdigest()

    def take(self, indices: np.ndarray) -> WholeImages:
        taken = super().take(indices)
        taken.boxes = None if self.boxes is None else self.boxes[indices]
        return taken


def open_landmarks(root: str | Path, name: str, size: int, flag: str = "--root") -> Landmarks:
    """The benchmark ``name``, a key of IMAGES_FROM, in the folder ``root``; ``size`` is the longer side in pixels.

    Raises :class:`UserError` if it is not there, lacks an image, or its ground truth is not what it should be.
    """
    folder = Path(root) / name
    path, images = folder / f"gnd_{name}.pkl", folder / "jpg"
    if not path.is_file() or not images.is_dir():
        raise UserError(
            f"{flag} {root} holds no {name}: {path if images.is_dir() else images} was not found, expected "
            f"{name}/gnd_{name}.pkl and {name}/jpg/*.jpg; get the images from {IMAGES_FROM[name]}, under their own "
            f"terms, and the ground truth from {TRUTH_FROM}")
    database, queries, truth, boxes = _read_truth(path)
    found = _places(images, {*database, *queries})
    missing = [x for x in (*database, *queries) if x not in found]
    if missing:
        raise UserError(f"{images} lacks {len(missing):,} of {len(database) + len(queries):,} images, {missing[0]}.jpg "
                        f"first; unpack the archives of {IMAGES_FROM[name]} there again")
    return Landmarks(WholeImages(images, [found[x] for x in queries], f"{folder} (queries)", size, boxes),
                     WholeImages(images, [found[x] for x in database], str(folder), size), truth)


def _read_truth(path: Path) -> tuple[list[str], list[str], list[dict[str, np.ndarray]], np.ndarray]:
    """Names of the database's images and of the queries, the queries' groups, and their boxes float64 [q, 4]."""
    try:
        with path.open("rb") as file:
            content = plain_pickle(file)
    except Exception as error:  # noqa: BLE001 - a damaged pickle can fail in any way
        raise UserError(f"{path} is not a plain pickle ({' '.join(str(error).split())[:100] or type(error).__name__}) "
                        f"and was not read further; get it again from {TRUTH_FROM}") from None
    try:
        database, queries = ([str(x) for x in content[key]] for key in ("imlist", "qimlist"))
        rows: list[Mapping[str, Any]] = list(content["gnd"])
        boxes = np.array([[float(x) for x in row["bbx"]] for row in rows], dtype=np.float64).reshape(-1, 4)
        truth = [{group: np.asarray(row[group], dtype=np.int64).reshape(-1) for group in GROUPS} for row in rows]
        numbers = np.concatenate([row[group] for row in truth for group in GROUPS])
        sound = (len(rows) == len(queries) == len(boxes) and len(numbers) and numbers.min() >= 0
                 and numbers.max() < len(database) and (boxes[:, 2:] > boxes[:, :2]).all()
                 and not any(Path(x).name != x for x in (*database, *queries)))
    except (KeyError, TypeError, ValueError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{path} is not the ground truth of the revisited benchmarks: expected imlist, qimlist and "
                        f"gnd, for each query bbx, easy, hard and junk; get it from {TRUTH_FROM}")
    return database, queries, truth, boxes


def _places(images: Path, wanted: set[str]) -> dict[str, str]:
    """The path of each image below the folder, by its name without .jpg; Paris has one folder per building."""
    found = {}
    for folder, _, files in sorted(os.walk(images, followlinks=True)):
        for file in files:
            name, extension = os.path.splitext(file)  # noqa: PTH122
            if extension.lower() == ".jpg" and name in wanted:
                found.setdefault(name, Path(os.path.relpath(Path(folder) / file, images)).as_posix())
    return found


@contextmanager
def _truncated_files() -> Iterator[None]:
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
