"""Which files count as images: one rule for folders, lists and tars."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable

from PIL import Image

READ = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")  # torchvision's, and GIF
ELSE = (".jfif", ".jpe", ".avif", ".heic", ".heif", ".jxl")  # formats that only some builds of Pillow decode


@functools.cache
def image_extensions() -> tuple[str, ...]:
    """The extensions of images that are read."""
    return (*READ, *(end for end in ELSE if end in Image.registered_extensions()))


@functools.cache
def unread_extensions() -> tuple[str, ...]:
    """The extensions of images that this Pillow does not decode."""
    return tuple(end for end in ELSE if end not in image_extensions())


def is_hidden(part: str) -> bool:
    """Whether a file or folder of this name is skipped, with all that it contains: .hidden, ._AppleDouble, __MACOSX."""
    return part.startswith(".") or part == "__MACOSX"


class ImageNames:
    """Decides by its path whether a file is an image, and counts the files that look like images but are skipped."""

    def __init__(self) -> None:
        self.hidden: list[str] = []
        self.unread: list[str] = []

    def takes(self, path: str) -> bool:
        """Whether a file is an image to read; ``path`` is posix and relative to the folder that was given."""
        return path.lower().endswith(READ + ELSE) and not self.leaves_out(path)

    def leaves_out(self, path: str) -> bool:
        """Whether a file that is known to be an image is skipped, because it is hidden or Pillow cannot read it."""
        is_unread = path.lower().endswith(unread_extensions())
        if any(is_hidden(part) for part in path.split("/") if part not in (".", "..")):
            self.hidden.append(path)
            return True
        if is_unread:
            self.unread.append(path)
        return is_unread

    def notes(self) -> list[str]:
        """One sentence about the files that were skipped; none if no file was."""
        ends = sorted({os.path.splitext(path)[1].lower() for path in self.unread})  # noqa: PTH122  (posix paths)
        parts = [_counted(self.hidden, "hidden file", ""),
                 _counted(self.unread, "file", f" that this Pillow cannot read ({', '.join(ends)})")]
        return [f"skipped: {' and '.join(filter(None, parts))}"] if any(parts) else []


def _counted(paths: list[str], what: str, which: str) -> str:
    more = "s" * (len(paths) > 1)
    return f"{len(paths):,} {what}{more}{which}, {min(paths)}{' first' * bool(more)}" if paths else ""


def mixture_of(loose: Iterable[str], folders: Iterable[str]) -> str:
    """The warning if images lie beside folders with images, otherwise ''."""
    loose, folders = sorted(loose), sorted(folders)
    if not loose or not folders:
        return ""
    more = f" and {len(loose) - 1:,} more images lie" if len(loose) > 1 else " lies"
    shown = ", ".join(f"{name}/" for name in folders[:3]) + ", ..." * (len(folders) > 3)
    return f"{loose[0]}{more} beside the folder{'s' * (len(folders) > 1)} {shown}, so no image has a label"
