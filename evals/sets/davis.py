"""DAVIS 2017 in its official layout: frames of short videos, and the masks of the objects in them.

Pont-Tuset et al., "The 2017 DAVIS Challenge on Video Object Segmentation", arXiv 1704.00675.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from data.images import BadImage, decode_rgb, read_bytes, reason_of
from runtime.errors import UserError
from runtime.regular import open_regular

WHERE = "https://davischallenge.org/davis2017/code.html (TrainVal, 480p)"
VOID = 255  # a pixel that belongs to nothing in particular


class Video(NamedTuple):
    """A sequence: its name, and its frames and masks in their order."""

    name: str
    frames: list[Path]
    masks: list[Path]

    def identity(self) -> str:
        """SHA-256, in hex, over place, size and time of each of its files."""
        found = [(str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns)
                 for path in self.frames + self.masks]
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()

    def frame(self, i: int) -> Tensor:
        """Frame i, uint8 [3, H, W]. Raises :class:`UserError`."""
        try:
            return decode_rgb(read_bytes(self.frames[i]))
        except BadImage as error:
            raise UserError(f"{self.frames[i]} cannot be decoded ({error}); unpack DAVIS again",
                            every_process=False) from None

    def mask(self, i: int) -> np.ndarray:
        """The number of the object at each pixel of frame i, 0 for none: uint8 [H, W]. Raises :class:`UserError`."""
        try:
            with open_regular(self.masks[i]) as file, Image.open(file) as image:
                pixels = np.array(image)
        except Exception as error:  # noqa: BLE001 - decoders raise all kinds
            raise UserError(f"{self.masks[i]} cannot be decoded ({reason_of(error)}); unpack DAVIS again",
                            every_process=False) from None
        if pixels.ndim != 2 or pixels.dtype != np.uint8:
            raise UserError(f"{self.masks[i]} is not a mask: found {image.mode}, expected a PNG whose palette "
                            "indices number the objects; unpack DAVIS again", every_process=False)
        return np.where(pixels == VOID, 0, pixels)


def check_davis(root: str | Path, flag: str) -> None:
    """Raise :class:`UserError` where DAVIS cannot be."""
    folder = Path(root) / "ImageSets" / "2017"
    if not folder.is_dir():
        raise UserError(f"{flag} {root} holds no DAVIS 2017: {folder} was not found, expected ImageSets/2017/, "
                        f"JPEGImages/480p/ and Annotations/480p/; get it from {WHERE}, under its own terms")


def open_davis(root: str | Path, split: str = "val", flag: str = "--data") -> list[Video]:
    """The sequences of ROOT/ImageSets/2017/SPLIT.txt. Raises :class:`UserError` if something is not there."""
    check_davis(root, flag)
    root = Path(root)
    listed = root / "ImageSets" / "2017" / f"{split}.txt"
    if not listed.is_file():
        raise UserError(f"{flag} {root} has no split of that name: {listed} was not found; give --split NAME of "
                        "another file in that folder")
    names = listed.read_text(encoding="utf-8", errors="surrogateescape").split()
    if not names:
        raise UserError(f"{listed} lists no sequence; unpack DAVIS again")
    odd = next((name for name in names if "/" in name or name == ".."), None)  # results are written under these names
    if odd:
        raise UserError(f"{listed} names {odd}, expected names of folders in JPEGImages/480p/; unpack DAVIS again")
    return [_open_video(root, name) for name in names]


def _open_video(root: Path, name: str) -> Video:
    frames = sorted((root / "JPEGImages" / "480p" / name).glob("*.jpg"))
    masks = [root / "Annotations" / "480p" / name / f"{frame.stem}.png" for frame in frames]
    missing = [path for path in masks if not path.is_file()]
    if len(frames) < 3 or missing:
        what = f"{missing[0]} is missing" if missing else f"it has {len(frames)} frames"
        raise UserError(f"{root}: of the sequence {name} {what}, expected at least 3 in JPEGImages/480p/{name}/ and a "
                        f"mask of each in Annotations/480p/{name}/; get the set again from {WHERE}")
    return Video(name, frames, masks)
