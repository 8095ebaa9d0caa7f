"""Finding the images of a folder, in the order of torchvision's ImageFolder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.images import IMAGE_EXTENSIONS
from data.sources import Names
from runtime.errors import UserError


class Tree(NamedTuple):
    """What a scan finds.

    names: posix paths relative to the folder. labels: int64 [N], or None. classes: their names. folders: every
    folder that was looked into, "." first; while none of them changes, neither does the rest.
    """

    names: Names
    labels: np.ndarray | None
    classes: list[str]
    folders: list[str]


def scan(folder: Path, spec: str) -> Tree:
    """All images of a folder: one class a sub-folder, or no classes where images lie directly in it.

    Hidden folders are left out. Raises UserError, naming --data `spec`, for a folder that cannot be read.
    """
    classes, is_flat = list_folder(folder, spec)
    if is_flat:
        names, folders = _images_below(folder, "", spec)
        return Tree(Names(names), None, [], folders)
    found, folders = {}, ["."]
    for name in classes:
        images, below = _images_below(folder, name, spec)
        folders += below
        if images:
            found[name] = images
    labels = np.repeat(np.arange(len(found)), [len(images) for images in found.values()])
    return Tree(Names(name for images in found.values() for name in images), labels, list(found), folders)


def list_folder(folder: Path, spec: str) -> tuple[list[str], bool]:
    """Sorted visible sub-folders, and whether images lie directly in the folder."""
    try:
        with os.scandir(folder) as entries:
            entries = [(entry.name, entry.is_dir()) for entry in entries]
    except OSError as error:
        raise UserError(unreadable(spec, error)) from None
    folders = sorted(name for name, is_folder in entries if is_folder and not name.startswith("."))
    return folders, any(_is_image(name) for name, is_folder in entries if not is_folder)


def _images_below(folder: Path, below: str, spec: str) -> tuple[list[str], list[str]]:
    """Posix paths relative to folder of all images under folder/below, and of all folders there."""

    def visit() -> Iterator[tuple[str, list[str]]]:
        for root, folders, files in os.walk(folder / below, followlinks=True, onerror=refuse):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield root, files

    def refuse(error: OSError) -> None:  # os.walk would leave the folder out without a word
        raise UserError(unreadable(spec, error))

    images, visited = [], []
    for root, files in sorted(visit()):
        place = Path(os.path.relpath(root, folder)).as_posix()
        prefix = "" if place == "." else place + "/"
        images.extend(prefix + name for name in sorted(files) if _is_image(name))
        visited.append(place)
    return images, visited


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def unreadable(spec: str, error: OSError) -> str:
    """The sentence about a file or folder that the system would not let us read."""
    return f"--data {spec}: {error.filename} cannot be read ({error.strerror}); make it readable or take it out"
