"""Opening one image file, whatever it holds, as 8-bit RGB."""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS

IMAGE_EXTENSIONS: tuple[str, ...] = (*IMG_EXTENSIONS, ".gif")


class BadImage(Exception):
    """An image that cannot be decoded; the message is a short reason on one line, without the file's name."""


def open_rgb(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """Decode one image completely and return it upright, in mode RGB, 8 bits a channel.

    Greyscale, 1-bit, palette, LA, RGBA (alpha is dropped), CMYK, 16-bit, 32-bit and float images are all
    converted; of an animation the first frame is taken; EXIF rotation is applied. Raises BadImage for
    anything that Pillow cannot decode to its last byte, a missing or truncated file included.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns about odd EXIF blocks, palettes and sizes in images that it reads well (ImageNet
            # has dozens); one warning for each, in each worker, would bury what matters.
            warnings.simplefilter("ignore")
            with Image.open(file) as image:
                image.load()
                _turn_upright(image)
                return _to_rgb(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        raise BadImage(_reason(error)) from None


def _turn_upright(image: Image.Image) -> None:
    with contextlib.suppress(Exception):  # a damaged EXIF block; the pixels are decoded by now
        ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # convert("RGB") would clip these at 255, turning most pixels white
        image = Image.fromarray(_to_8_bits(np.asarray(image), sixteen_bits=image.mode.startswith("I;16")))
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette may carry transparency, which only RGBA can hold on the way
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray, sixteen_bits: bool) -> np.ndarray:
    """Any numeric [H, W] array -> uint8 [H, W].

    16-bit values are divided by 257, so that 65535 becomes 255. A 32-bit or float image does not say its
    range, so the narrowest usual one that holds its values is taken: 0..1 (float only), 0..255, 0..65535;
    failing all of these, its own minimum and maximum.
    """
    values = np.nan_to_num(pixels.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = float(values.min()), float(values.max())
    if sixteen_bits:
        scale = 65535.0
    elif low < 0 or high > 65535:
        values, scale = values - low, max(high - low, 1e-12)
    elif pixels.dtype.kind == "f" and high <= 1:
        scale = 1.0
    else:
        scale = 255.0 if high <= 255 else 65535.0
    return np.rint(values * (255.0 / scale)).astype(np.uint8)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"  # its own text holds the file's name or a memory address
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:200]
