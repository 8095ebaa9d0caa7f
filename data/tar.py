"""Images in tar files: an archived folder, or WebDataset shards."""

from __future__ import annotations

import io
import os
import posixpath
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.image_files import ELSE, READ, ImageNames, image_extensions, is_hidden, mixture_of
from data.images import BadImage, open_rgb
from data.sources import ImageSource
from data.split_folders import are_splits, names_of
from runtime.errors import UserError
from runtime.regular import open_regular

NO_CONTENT = -1  # of a link or a sparse file
MOST_DIGITS, MOST_CLASSES = 32, 10_000_000

Member = tuple[str, int, int, int]  # name, number of the tar, first byte, bytes


class TarSource(ImageSource):
    """The images of uncompressed tar files, found by reading all headers once.

    An archived folder has the names, order and classes that `open_source` gives for the extracted folder; a leading
    folder that contains everything is dropped. If it holds train/ beside val/ or test/, `split` ('train' or 'test')
    selects one of them; otherwise all images are taken. If files KEY.cls with a class number lie beside the images, as
    in WebDataset, they give the labels, the images keep the order of the tars, and with several tars each name begins
    with the name of its tar. Raises UserError if a file is not a tar, is compressed or damaged, contains no image, or
    has no test images although split is 'test'.
    """

    def __init__(self, paths: Sequence[str | os.PathLike], split: str = "train", flag: str = "--data"):
        self.paths = [Path(path) for path in paths]
        images, numbers, files = [], {}, ImageNames()
        for number, path in enumerate(self.paths):
            found, labels = _members(path, number, flag)
            images += found
            numbers |= {(number, key): label for key, label in labels.items()}
        shared = _shared_folder(images)
        images = [image for image in images if not files.leaves_out(image[0][len(shared):])]
        for name, number, start, _ in images:
            if start == NO_CONTENT:
                raise UserError(f"{flag} {self.paths[number]}: {name} is a link or a sparse file, whose content cannot "
                                "be read here; extract the tar and pack the folder")
        if not images:
            raise UserError(f"{flag} {self.paths[0]} contains no images: no member ends in "
                            f"{', '.join(image_extensions())}"
                            + "".join(f" ({note})" for note in files.notes()))
        if numbers:
            part, (names, labels, classes) = None, self._sharded(images, numbers, flag)
        else:
            part, images, names, labels, classes, self.mixture = _as_tree(images, split)
        self.notes = files.notes() + [self.mixture] * bool(self.mixture)
        if split == "test" and not part:
            raise UserError(f"--split test: {flag} {self.paths[0]} does not hold train/ beside val/ or test/, so "
                            "it is unknown which images are test images; omit --split to take all of them")
        self.places = np.array([image[1:] for image in images], dtype=np.int64)
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        super().__init__(names, labels, classes, f"{self.paths[0]}{more}{f' ({part}/)' if part else ''}")

    def _sharded(self, images: list[Member], numbers: dict[tuple[int, str], int], flag: str) -> tuple:
        labels = [numbers.get((number, _key(name)), -1) for name, number, *_ in images]
        if min(labels) < 0:
            name, number, *_ = images[labels.index(-1)]
            raise UserError(f"{flag} {self.paths[number]}: {name} has no {_key(name)}.cls with a class number beside "
                            "it, though other images do; add it, or remove the .cls files")
        stems = [f"{path.stem}/" if len(self.paths) > 1 else "" for path in self.paths]
        names = [stems[number] + name for name, number, *_ in images]
        return names, np.array(labels), [str(i) for i in range(max(labels) + 1)]

    def open(self, i: int) -> Image.Image:
        return open_rgb(io.BytesIO(self.encoded(i)))

    def encoded(self, i: int) -> bytes:
        number, start, size = self.places[i]
        try:
            with open_regular(self.paths[number]) as file:
                file.seek(start)
                return file.read(size)
        except OSError as error:
            raise BadImage(error.strerror or str(error)) from None

    def location(self, i: int) -> str:
        return f"{self.paths[self.places[i][0]]}: {self.names[i]}"

    def take(self, indices: np.ndarray) -> ImageSource:
        taken = super().take(indices)
        taken.places = self.places[indices]
        return taken


def _members(path: Path, number: int, flag: str) -> tuple[list[Member], dict[str, int]]:
    """Images, in the tar's order, and the class number of each KEY.cls."""
    images, labels = {}, {}
    try:
        with open_regular(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name).lstrip("/")  # as tar extracts it
                if name.lower().endswith(READ + ELSE):
                    images.pop(name, None)  # of several members with one name the last counts
                    start = member.offset_data if member.isreg() and not member.issparse() else NO_CONTENT
                    images[name] = (name, number, start, member.size)
                elif name.endswith(".cls") and member.isreg() and not is_hidden(posixpath.basename(name)):
                    content = tar.extractfile(member).read(MOST_DIGITS + 1)
                    if not re.fullmatch(rb"\s*\d+\s*", content) or len(content) > MOST_DIGITS or (
                            int(content) >= MOST_CLASSES):
                        raise UserError(f"{flag} {path}: {name} holds {content[:20]!r}, expected a class number from 0 "
                                        f"to {MOST_CLASSES - 1:,}; correct it, or remove the .cls files")
                    labels[name[: -len(".cls")]] = int(content)
            end = tar.offset
    except UserError:
        raise
    except Exception as error:  # a damaged header raises many kinds of errors, such as ValueError or UnicodeError
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{flag} {path} could not be read as an uncompressed tar ({reason}); decompress it, or "
                        "download it again") from None
    if end > path.stat().st_size:
        raise UserError(f"{flag} {path} is cut short: it ends in the middle of a file; download it again")
    return list(images.values()), labels


def _key(name: str) -> str:
    """The key of WebDataset: the path up to the first dot in the file's name."""
    folder, _, file = name.rpartition("/")
    return (folder + "/" if folder else "") + file.split(".")[0]


def _shared_folder(images: list[Member]) -> str:
    """The innermost folder that contains all images, with its slash; '' if there is none."""
    folders = [posixpath.dirname(name) for name, *_ in images]
    return posixpath.commonpath(folders) + "/" if folders and all(folders) and posixpath.commonpath(folders) else ""


def _as_tree(images: list[Member], split: str) -> tuple:
    """The part that `split` selects: (its folder, images in ImageFolder's order, names, labels, classes, mixture).

    If an image lies at the top, labels is None and classes is empty. mixture: the warning if
    others then lie in folders, else ''.
    """
    shared = _shared_folder(images)
    names = [name[len(shared):] for name, *_ in images]
    part = _part(names, split)
    if part:
        kept = [i for i, name in enumerate(names) if name.startswith(f"{part}/")]
        images, names = [images[i] for i in kept], [names[i][len(part) + 1:] for i in kept]
    flat = any("/" not in name for name in names)
    parts = [("" if flat else name.split("/")[0], *posixpath.split(name)) for name in names]
    order = sorted(range(len(names)), key=parts.__getitem__)
    images, names = [images[i] for i in order], [names[i] for i in order]
    if flat:
        loose = [name for name in names if "/" not in name]
        return part, images, names, None, [], mixture_of(loose, {name.split("/")[0] for name in names} - {*loose})
    classes = sorted({name.split("/")[0] for name in names})
    numbers = {name: i for i, name in enumerate(classes)}
    return part, images, names, np.array([numbers[name.split("/")[0]] for name in names]), classes, ""


def _part(names: list[str], split: str) -> str | None:
    """The folder (train/, val/, ...) that holds the split's images; None if the tree has no such folders. They are told
    from classes of the same names as `open_source` does."""
    tops = {name.split("/")[0] for name in names}
    train, test = (next((part for part in names_of(x) if part in tops), None) for x in ("train", "test"))
    flat = any("/" not in name for name in names)
    if flat or not (train and test) or not are_splits(
            tops, lambda: any(name.count("/") == 1 for name in names if name.startswith("train/"))):
        return None
    return train if split == "train" else test
