"""Which files are images, by one rule for folders, lists and tars."""

from __future__ import annotations

import os
from collections.abc import Iterable

from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

_ELSE = (".jfif", ".jpe", ".avif", ".heic", ".heif", ".jxl")  # images whose decoder not every Pillow has
_READ = tuple(end for end in _ELSE if end in Image.registered_extensions())
IMAGE_EXTENSIONS: tuple[str, ...] = (*IMG_EXTENSIONS, ".gif", *_READ)
UNREAD_EXTENSIONS: tuple[str, ...] = tuple(end for end in _ELSE if end not in _READ)


def is_hidden(part: str) -> bool:
    """Whether a file or folder of this name is left out, with all that is in it: .hidden, ._AppleDouble, __MACOSX."""
    return part.startswith(".") or part == "__MACOSX"


class ImageNames:
    """Tells images by their paths, and counts what is left out though it could be taken for one."""

    def __init__(self) -> None:
        self.hidden: list[str] = []
        self.unread: list[str] = []

    def takes(self, path: str) -> bool:
        """Whether a file is an image that is read; ``path`` is posix and relative to the folder that was given."""
        return path.lower().endswith(IMAGE_EXTENSIONS + UNREAD_EXTENSIONS) and not self.leaves_out(path)

    def leaves_out(self, path: str) -> bool:
        """Whether a file that is said to be an image is left out."""
        is_unread = path.lower().endswith(UNREAD_EXTENSIONS)
        if any(is_hidden(part) for part in path.split("/") if part not in (".", "..")):
            self.hidden.append(path)
            return True
        if is_unread:
            self.unread.append(path)
        return is_unread

    def notes(self) -> list[str]:
        """What is left out, in one sentence, if anything."""
        ends = sorted({os.path.splitext(path)[1].lower() for path in self.unread})  # noqa: PTH122  (posix paths)
        parts = [_counted(self.hidden, "hidden file", ""),
                 _counted(self.unread, "file", f" that this Pillow does not read ({', '.join(ends)})")]
        return [f"left out: {' and '.join(filter(None, parts))}"] if any(parts) else []


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
    return f"{loose[0]}{more} beside the folder{'s' * (len(folders) > 1)} {shown}, so that all are taken without labels"
