"""Decoding only the part of a JPEG that a crop needs, by libjpeg-turbo 3 through its C interface, TurboJPEG.

Rows below the part are not decoded at all; rows above it and columns beside it skip the inverse transform and the
colour conversion. No Python library offers this without overhead that cancels the gain, so ctypes calls the functions.
The library comes with the wheel `turbojpeg`, or as the system's libturbojpeg.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import importlib.util
from collections.abc import Callable, Iterator

import torch

# Constants of turbojpeg.h, libjpeg-turbo 3.
DECOMPRESS, RGB = 1, 0
STOP_ON_WARNING, SUBSAMPLING, WIDTH, HEIGHT = 0, 4, 5, 6
BLOCK_WIDTH = (8, 16, 16, 8, 8, 32, 8)  # pixels, for 4:4:4, 4:2:2, 4:2:0, grey, 4:4:0, 4:1:1, 4:4:1
MARGIN = 2  # pixels: subsampled colour is interpolated between neighbours, each of which may span two pixels


class _Region(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("x", "y", "width", "height")]


@functools.cache
def library() -> ctypes.CDLL | None:
    """libturbojpeg of version 3 or later, or None."""
    handle, number, data = ctypes.c_void_p, ctypes.c_int, (ctypes.c_char_p, ctypes.c_size_t)
    for place in _places():
        try:
            found = ctypes.CDLL(place)
            found.tj3Init.restype, found.tj3Init.argtypes = handle, [number]
            found.tj3Set.argtypes, found.tj3Get.argtypes = [handle, number, number], [handle, number]
            found.tj3DecompressHeader.argtypes = [handle, *data]
            found.tj3SetCroppingRegion.argtypes = [handle, _Region]
            found.tj3Decompress8.argtypes = [handle, *data, handle, number, number]
            found.tj3Destroy.restype, found.tj3Destroy.argtypes = None, [handle]
        except (OSError, AttributeError):  # no library, or version 2
            continue
        return found
    return None


def _places() -> Iterator[str]:
    wheel = importlib.util.find_spec("turbojpeg")  # an extension module that is linked to the library
    if wheel and wheel.origin and not wheel.origin.endswith(".py"):
        yield wheel.origin
    if system := ctypes.util.find_library("turbojpeg"):
        yield system


def decode_part(data: bytes, choose: Callable[[int, int], tuple[int, int, int, int]],
                ) -> tuple[torch.Tensor, int, int] | None:
    """A plain JPEG's content -> uint8 [3, h, w], and the row and column of the image at which these pixels begin.

    choose(height, width) gives the needed part as (top, left, bottom, right); the result may be somewhat larger. Its
    pixels equal those of decoding the whole image. Returns None if the library is missing or reports any error or
    warning; the caller then decodes the whole image.
    """
    turbo = library()
    if turbo is None or not data.endswith(b"\xff\xd9"):  # truncation below the part would go unnoticed
        return None
    handle = turbo.tj3Init(DECOMPRESS)
    try:
        turbo.tj3Set(handle, STOP_ON_WARNING, 1)
        if turbo.tj3DecompressHeader(handle, data, len(data)):
            return None
        height, width, sampling = (turbo.tj3Get(handle, name) for name in (HEIGHT, WIDTH, SUBSAMPLING))
        if not 0 <= sampling < len(BLOCK_WIDTH):
            return None
        top, left, bottom, right = choose(height, width)
        top, bottom, right = max(0, top - MARGIN), min(height, bottom + MARGIN), min(width, right + MARGIN)
        left = max(0, left - MARGIN) // BLOCK_WIDTH[sampling] * BLOCK_WIDTH[sampling]
        pixels = torch.empty(bottom - top, right - left, 3, dtype=torch.uint8)
        region = _Region(left, top, right - left, bottom - top)
        if turbo.tj3SetCroppingRegion(handle, region) or turbo.tj3Decompress8(
                handle, data, len(data), pixels.data_ptr(), 0, RGB):
            return None
    finally:
        turbo.tj3Destroy(handle)
    return pixels.permute(2, 0, 1), top, left
