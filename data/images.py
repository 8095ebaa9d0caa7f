"""Opening one image file, whatever it holds, as 8-bit RGB."""

from __future__ import annotations

import contextlib
import io
import os
import re
import warnings
from collections.abc import Callable
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.functional import pil_to_tensor

from data.jpeg_part import decode_part
from runtime.regular import open_regular

try:
    import simplejpeg  # optional, only libjpeg-turbo: the same pixels in an eighth less time than torchvision's
except ImportError:
    simplejpeg = None
try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # torchvision 0.29 announces its removal; Pillow takes a third longer
    decode_jpeg = None


MAX_PIXELS = 178_956_970  # Pillow's limit, twice its Image.MAX_IMAGE_PIXELS, above which it refuses an image


class BadImage(Exception):
    """An image that cannot be decoded; the message is a short reason on one line, without the file's name."""


def open_rgb(file: str | os.PathLike | BinaryIO) -> Image.Image:
    """Decode one image completely and return it upright, in mode RGB, 8 bits per channel.

    Greyscale, 1-bit, palette, LA, RGBA (alpha is dropped), CMYK, 16-bit, 32-bit and float images are all
    converted; of an animation the first frame is taken; EXIF rotation is applied. Raises BadImage for
    anything that Pillow cannot decode to its last byte, including a missing or truncated file.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns about odd EXIF blocks, palettes and sizes in images that it reads well (ImageNet
            # has dozens); one warning for each, in each worker, would bury what matters.
            warnings.simplefilter("ignore")
            is_path = isinstance(file, (str, os.PathLike))
            with (open_regular(file) if is_path else contextlib.nullcontext(file)) as stream, \
                    Image.open(stream) as image:
                image.load()
                _turn_upright(image)
                return _to_rgb(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, EOFError, ...
        raise BadImage(reason_of(error)) from None


def limit_pixels(most: int) -> None:
    """From now on treat images of more than ``most`` pixels as unreadable, here and in the workers of loaders."""
    Image.MAX_IMAGE_PIXELS = most / 2
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # Pillow warns from half the limit on


def most_pixels() -> int:
    """The limit that :func:`limit_pixels` has set, else Pillow's."""
    return round(Image.MAX_IMAGE_PIXELS * 2)


def read_bytes(file: str | os.PathLike) -> bytes:
    """A file's content. Raises BadImage with the reason that open_rgb would give."""
    try:
        with open_regular(file) as stream:
            return stream.read()
    except Exception as error:
        raise BadImage(reason_of(error)) from None


def decode_rgb(data: bytes) -> torch.Tensor:
    """A file's content -> uint8 [3, H, W], the pixels of open_rgb. Raises BadImage as open_rgb does.

    Upright 8-bit JPEGs of one or three channels are decoded by simplejpeg or, if that is not installed, by torchvision;
    both use the same library as Pillow without an Image in between. Pillow decodes everything else and whatever they
    refuse. It also decodes PNGs, because a damaged PNG crashes torchvision's decoder (0.29) with a segmentation fault.
    """
    if (simplejpeg or decode_jpeg) and data[:2] == b"\xff\xd8" and _is_plain_jpeg(data):
        with contextlib.suppress(RuntimeError, ValueError):
            if simplejpeg:
                return torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
            return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return pil_to_tensor(open_rgb(io.BytesIO(data)))


def decode_crops(data: bytes, crops: Callable[[int, int], np.ndarray]) -> tuple[torch.Tensor, np.ndarray]:
    """A file's content -> uint8 [3, h, w], the part of decode_rgb's pixels that contains the crops, and the crops
    within it.

    crops(height, width) of the whole image gives int64 [..., 4], (top, left, height, width). Raises BadImage as
    decode_rgb does, except for a JPEG that is damaged below its crops, which goes unnoticed.
    """
    if data[:2] == b"\xff\xd8" and _is_plain_jpeg(data):
        boxes = np.empty(0)

        def hull(height: int, width: int) -> tuple[int, int, int, int]:
            nonlocal boxes
            boxes = crops(height, width)
            tops, lefts, heights, widths = zip(*boxes.reshape(-1, 4).tolist(), strict=True)  # few: lists are faster
            return min(tops), min(lefts), max(map(sum, zip(tops, heights, strict=True))), \
                max(map(sum, zip(lefts, widths, strict=True)))

        part = decode_part(data, hull)
        if part:
            pixels, *corner = part
            return pixels, boxes - (*corner, 0, 0)
    pixels = decode_rgb(data)
    return pixels, crops(*pixels.shape[1:])


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether a JPEG has 8 bits, one or three channels, no EXIF rotation, and no more pixels than are allowed."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == 0xE1 and data[at + 4 : at + 8] == b"Exif" and not _is_upright(data[at + 10 : at + 2 + length]):
            return False
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = (int.from_bytes(data[at + i : at + i + 2], "big") for i in (5, 7))
            return data[at + 4] == 8 and data[at + 9] in (1, 3) and _is_allowed(height, width)
        at += 2 + length
    return False


def _is_upright(exif: bytes) -> bool:
    """Whether the first directory of a TIFF block gives orientation 1, or none."""
    order = {b"II": "little", b"MM": "big"}.get(exif[:2])
    if order is None:
        return False  # damaged; Pillow decides

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order)

    start = number(4, 4)
    entries = (start + 2 + 12 * i for i in range(number(start, 2)))
    return all(number(at + 8, 2) == 1 for at in entries if number(at, 2) == 0x0112)


def _is_allowed(height: int, width: int) -> bool:
    return 0 < height * width <= most_pixels()


def _turn_upright(image: Image.Image) -> None:
    with contextlib.suppress(Exception):  # a damaged EXIF block; the pixels are already decoded
        ImageOps.exif_transpose(image, in_place=True)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # convert("RGB") would clip these at 255, turning most pixels white
        image = Image.fromarray(_to_8_bits(np.asarray(image), sixteen_bits=image.mode.startswith("I;16")))
    elif image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # a palette may have transparency, which converts to RGB only by way of RGBA
    return image.convert("RGB")


def _to_8_bits(pixels: np.ndarray, sixteen_bits: bool) -> np.ndarray:
    """Any numeric [H, W] array -> uint8 [H, W].

    16-bit values are divided by 257, so that 65535 becomes 255. A 32-bit or float image does not record its
    range, so the narrowest usual range that contains its values is taken: 0..1 (float only), 0..255, 0..65535;
    if none does, its own minimum and maximum.
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


def reason_of(error: Exception) -> str:
    """Why an image could not be decoded: the error of its decoder as a short reason on one line."""
    if isinstance(error, Image.DecompressionBombError):
        size = re.search(r"\((\d+) pixels\)", str(error))
        found = f"its {int(size[1]):,} pixels are" if size else "it has"
        return f"{found} more than --max-pixels {most_pixels()} allows; raise that if you trust the image"
    if isinstance(error, MemoryError):
        return "there is not enough memory for its pixels"
    if isinstance(error, UnidentifiedImageError):
        return "not an image that Pillow can read"  # Pillow's own text has the file's name or a memory address in it
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:200]
