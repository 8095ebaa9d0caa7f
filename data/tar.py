"""Images in tar files: a tree that was archived, or WebDataset shards."""

from __future__ import annotations

import io
import os
import posixpath
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data.datasets import EVALUATION_FOLDERS
from data.images import IMAGE_EXTENSIONS, BadImage, open_rgb
from data.sources import ImageSource
from runtime.errors import UserError

Member = tuple[str, int, int, int]  # name, number of the tar, first byte, bytes


class TarSource(ImageSource):
    """The images of uncompressed tar files, found once by reading all headers.

    An archived tree has the names, order and classes that `open_source` gives for the extracted folder (a leading
    folder that all share is dropped); of one that holds train/ beside val/ or test/ these are the images that `split`
    ('train' or 'test') takes there, and every other tree is taken whole. Where files KEY.cls with a class number lie
    beside the images, as in WebDataset, they are the labels, the order is that of the tars, and with several tars
    each name begins with its tar's. Raises UserError for what is no tar, is compressed or damaged, holds no image, or
    has no such parts where split is 'test'.
    """

    def __init__(self, paths: Sequence[str | os.PathLike], split: str = "train", flag: str = "--data"):
        self.paths = [Path(path) for path in paths]
        images, numbers = [], {}
        for number, path in enumerate(self.paths):
            found, labels = _members(path, number, flag)
            images += found
            numbers |= {(number, key): label for key, label in labels.items()}
        if not images:
            raise UserError(f"{flag} {self.paths[0]} holds no image: no member ends in {', '.join(IMAGE_EXTENSIONS)}")
        if numbers:
            part, (names, labels, classes) = None, self._sharded(images, numbers, flag)
        else:
            part, images, names, labels, classes = _as_tree(images, split)
        if split == "test" and not part:
            raise UserError(f"--split test: {flag} {self.paths[0]} does not hold train/ beside val/ or test/, so "
                            "nothing says which of its images are for testing; leave --split out to take all of them")
        self.places = np.array([image[1:] for image in images], dtype=np.int64)
        more = f" and {len(self.paths) - 1} more" if len(self.paths) > 1 else ""
        super().__init__(names, labels, classes, f"{self.paths[0]}{more}{f' ({part}/)' if part else ''}")

    def _sharded(self, images: list[Member], numbers: dict[tuple[int, str], int], flag: str) -> tuple:
        labels = [numbers.get((number, _key(name)), -1) for name, number, *_ in images]
        if min(labels) < 0:
            name, number, *_ = images[labels.index(-1)]
            raise UserError(f"{flag} {self.paths[number]}: {name} has no {_key(name)}.cls with a class number beside "
                            "it, though other images have; add it, or take the .cls files out")
        stems = [f"{path.stem}/" if len(self.paths) > 1 else "" for path in self.paths]
        names = [stems[number] + name for name, number, *_ in images]
        return names, np.array(labels), [str(i) for i in range(max(labels) + 1)]

    def open(self, i: int) -> Image.Image:
        return open_rgb(io.BytesIO(self.encoded(i)))

    def encoded(self, i: int) -> bytes:
        number, start, size = self.places[i]
        try:
            with self.paths[number].open("rb") as file:
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
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = posixpath.normpath(member.name)
                if name.lower().endswith(IMAGE_EXTENSIONS):
                    if not member.isreg() or member.issparse():
                        raise UserError(f"{flag} {path}: {name} is a link or a sparse file, without content of its "
                                        "own; extract the tar and pack the folder")
                    images.pop(name, None)
                    images[name] = (name, number, member.offset_data, member.size)  # the last of a name counts
                elif name.endswith(".cls") and member.isreg():
                    labels[name[: -len(".cls")]] = int(tar.extractfile(member).read())
            end = tar.offset
    except ValueError:
        raise UserError(f"{flag} {path}: {name} holds no class number; write one whole number into it, or take "
                        "the .cls files out") from None
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{flag} {path} could not be read as an uncompressed tar ({' '.join(str(error).split())}); "
                        "decompress it, or fetch it again") from None
    if min(labels.values(), default=0) < 0:
        raise UserError(f"{flag} {path} has a negative class number in a .cls file; classes count from 0")
    if end > path.stat().st_size:
        raise UserError(f"{flag} {path} ends within a file; fetch it again")
    return list(images.values()), labels


def _key(name: str) -> str:
    """WebDataset's: the path up to the first dot of the file's name."""
    folder, _, file = name.rpartition("/")
    return (folder + "/" if folder else "") + file.split(".")[0]


def _as_tree(images: list[Member], split: str) -> tuple:
    """The part that `split` takes; its images in ImageFolder's order, their names, labels and classes. No labels where
    an image lies at the top."""
    folders = [posixpath.dirname(name) for name, *_ in images]
    shared = os.path.commonpath(folders) if all(folders) else ""
    names = [name[len(shared) + 1 if shared else 0:] for name, *_ in images]
    part = _part(names, split)
    if part:
        kept = [i for i, name in enumerate(names) if name.startswith(f"{part}/")]
        images, names = [images[i] for i in kept], [names[i][len(part) + 1:] for i in kept]
    flat = any("/" not in name for name in names)
    parts = [("" if flat else name.split("/")[0], *posixpath.split(name)) for name in names]
    order = [i for i in sorted(range(len(names)), key=parts.__getitem__) if not _hidden(names[i])]
    images, names = [images[i] for i in order], [names[i] for i in order]
    if flat:
        return part, images, names, None, []
    classes = sorted({name.split("/")[0] for name in names})
    numbers = {name: i for i, name in enumerate(classes)}
    return part, images, names, np.array([numbers[name.split("/")[0]] for name in names]), classes


def _part(names: list[str], split: str) -> str | None:
    """The one of train/, val/ and its like that holds the split's images; None where the tree has no such parts, told
    from classes of these names as `open_source` does."""
    tops = {name.split("/")[0] for name in names if not _hidden(name)}
    found = [part for part in EVALUATION_FOLDERS if part in tops]
    inside = tops.issubset({"train", *found}) or all(name.count("/") > 1 for name in names if name.startswith("train/"))
    if not found or "train" not in tops or not inside or any("/" not in name for name in names):
        return None
    return "train" if split == "train" else found[0]


def _hidden(name: str) -> bool:
    """Whether the image lies in a folder whose name begins with a dot, which `open_source` leaves out too."""
    return any(part.startswith(".") for part in name.split("/")[:-1])
