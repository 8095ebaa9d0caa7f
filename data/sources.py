"""Sources of images: N named images in a fixed order, in files or in memory."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from data.images import decode_crops, decode_rgb, open_rgb, read_bytes
from runtime.errors import UserError, one_line

UNMIX = "move them into a class folder, or take them out"
STAT_THREADS, STATS_AT_ONCE = 16, 4096


class Names(Sequence[str]):
    """N strings in one block of bytes.

    A list of ImageNet's 1.28 M paths takes 120 MB, and each forked worker that reads it gradually copies it, because
    reading a Python object writes its reference count. One block takes 50 MB and stays shared.
    """

    def __init__(self, names: Iterable[str]):
        encoded = [name.encode("utf-8", "surrogateescape") + b"\n" for name in names]
        self.block: bytes | memoryview = b"".join(encoded)
        self.ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)

    @classmethod
    def of_block(cls, block: bytes | memoryview, ends: np.ndarray) -> Names:
        """Names that are already in `block`, each followed by a newline; name i ends before byte ends[i], int64 [N]."""
        names = cls.__new__(cls)
        names.block, names.ends = block, ends
        return names

    def take(self, indices: np.ndarray) -> Names:
        """The names at these indices, int64 [M], in this order."""
        indices = np.asarray(indices, dtype=np.int64)
        block = np.frombuffer(self.block, dtype=np.uint8)
        starts = np.concatenate(([0], self.ends[:-1]))[: len(self)]
        parts, lengths = [b""], (self.ends - starts)[indices]
        for first in range(0, len(indices), 65536):  # in chunks: an index for each byte needs 8 times the memory
            length = lengths[first : first + 65536]
            shift = starts[indices[first : first + 65536]] - (np.cumsum(length) - length)
            parts.append(block[np.repeat(shift, length) + np.arange(length.sum())].tobytes())
        return Names.of_block(b"".join(parts), np.cumsum(lengths, dtype=np.int64))

    def __getstate__(self) -> tuple[bytes, np.ndarray]:
        return bytes(self.block), np.array(self.ends)  # a memory map cannot be pickled

    def __setstate__(self, state: tuple[bytes, np.ndarray]) -> None:
        self.block, self.ends = state

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]  # negative indices, and IndexError past the end
        start = self.ends[i - 1] if i else 0
        return bytes(self.block[start : self.ends[i] - 1]).decode("utf-8", "surrogateescape")


class ImageSource:
    """N images in a fixed order.

    names: N strings, relative posix paths if the images are files. labels: int64 [N] with values in
    [0, len(classes)), or None. classes: their names, [] without labels. title: where the images come from.
    left_out: int64 [M], the images that `without` removed, by their numbers before. notes: sentences about files that
    were skipped or found twice. mixture: a warning if images lie beside class folders, else ''.

    A subclass implements `open`, and `encoded` if its images are files; it overrides `take` if it keeps anything else
    for each image.
    """

    left_out = np.empty(0, np.int64)
    notes: Sequence[str] = ()
    mixture = ""

    def __init__(self, names: Iterable[str], labels: np.ndarray | None, classes: list[str], title: str):
        self.names = names if isinstance(names, Names) else Names(names)
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.classes = list(classes)
        self.title = title
        self._fingerprint: str | None = None
        self._identity: str | tuple[str, str] | None = None

    def __len__(self) -> int:
        return len(self.names)

    @property
    def description(self) -> str:
        labels = "without labels" if self.labels is None else f"in {len(self.classes):,} classes"
        return one_line("; ".join([f"{self.title}: {len(self):,} images {labels}", *self.notes]))

    def open(self, i: int) -> Image.Image:
        """Image i in mode RGB. Raises data.images.BadImage if it cannot be decoded."""
        raise NotImplementedError

    def encoded(self, i: int) -> bytes | None:
        """The content of image i's file; None if the images are not files. Raises BadImage."""
        return None

    def pixels(self, i: int) -> torch.Tensor:
        """Image i as uint8 [3, H, W]: the pixels of `open`, by a faster decoder if there is one. Raises BadImage."""
        data = self.encoded(i)
        return pil_to_tensor(self.open(i)) if data is None else decode_rgb(data)

    def crops(self, i: int, boxes: Callable[[int, int], np.ndarray]) -> tuple[torch.Tensor, np.ndarray]:
        """The part of image i that contains its crops, uint8 [3, h, w], and the crops within it; see decode_crops."""
        data = self.encoded(i)
        if data is not None:
            return decode_crops(data, boxes)
        pixels = self.pixels(i)
        return pixels, boxes(*pixels.shape[1:])

    def location(self, i: int) -> str:
        """Where image i can be found, for messages."""
        return self.names[i]

    def shown(self, i: int) -> str:
        """`location` on one line, for printing."""
        return one_line(self.location(i))

    def fingerprint(self) -> str:
        """SHA-256, in hex, of the names in order, each followed by a newline. Computed once."""
        if self._fingerprint is None:
            self._fingerprint = hashlib.sha256(self.names.block).hexdigest()
        return self._fingerprint

    def identity(self, times: bool = True) -> str:  # noqa: ARG002 - only files have times
        """What tells these images from others: the fingerprint, and what else tells their content.

        ``times``: files that were changed meanwhile are others, even at the same size, as for kept features, which are
        made again where in doubt. A run is known without them, so that it resumes on a copy of its data.
        """
        return self.fingerprint()

    def take(self, indices: np.ndarray) -> ImageSource:
        """A source of only these images, int64 [M], in this order; classes keep their numbers."""
        taken = copy.copy(self)
        taken.names = self.names.take(indices)
        taken.labels = None if self.labels is None else self.labels[indices]
        taken._fingerprint = taken._identity = None
        return taken

    def without(self, images: np.ndarray) -> ImageSource:
        """A source without these images, int64 [M]."""
        if not len(images):
            return self
        others = self.take(np.delete(np.arange(len(self)), images))
        others.left_out = images
        return others

    @property
    def kept(self) -> np.ndarray:
        """int64 [N]: the numbers that these images had before `without` removed others."""
        return np.delete(np.arange(len(self) + len(self.left_out)), self.left_out)

    def subset(self, fraction: float) -> ImageSource:
        """The first floor(fraction * n_c) of the n_c images of each class c, class by class.

        Without labels, the first floor(fraction * N) images. Raises UserError if fraction is outside (0, 1] or no
        image remains.
        """
        if not 0 < fraction <= 1:
            raise UserError(f"--subset {fraction:g} is not a fraction; give a number above 0 and at most 1")
        if fraction == 1:
            return self
        if self.mixture:
            raise UserError(f"--subset {fraction:g} takes a fraction of each class, but in {self.title} "
                            f"{self.mixture}; {UNMIX}")
        groups = [np.arange(len(self))] if self.labels is None else _indices_by_class(self.labels)
        # The small term undoes binary rounding: 0.29 * 100 is 28.999999999999996, where 29 is meant.
        kept = np.concatenate([group[: int(fraction * len(group) + 1e-9)] for group in groups])
        if not len(kept):
            raise UserError(f"--subset {fraction:g} leaves no image of {self.description}; give a larger fraction")
        taken = self.take(kept)
        taken.title = f"{self.title} (subset {fraction:g})"
        return taken


class FileSource(ImageSource):
    """Image files; names are relative to root, or absolute."""

    def __init__(self, root: Path, names: Iterable[str], labels: np.ndarray | None, classes: list[str], title: str):
        super().__init__(names, labels, classes, title)
        self.root = Path(root)

    def open(self, i: int) -> Image.Image:
        return open_rgb(self.location(i))

    def encoded(self, i: int) -> bytes:
        return read_bytes(self.location(i))

    def location(self, i: int) -> str:
        return str(self.root / self.names[i])

    def identity(self, times: bool = True) -> str:
        """The fingerprint, and SHA-256 over the size in bytes and, with ``times``, the time of change in ns of each
        file, looked up once."""
        if self._identity is None:
            with ThreadPoolExecutor(STAT_THREADS) as pool:  # a network disk answers many requests at a time
                states = np.concatenate([np.empty((0, 2), np.int64),
                                         *pool.map(self._states, range(0, len(self), STATS_AT_ONCE))])
            digests = [hashlib.sha256(x.tobytes()).hexdigest() for x in (states[:, 0], states)]
            self._identity = tuple(f"{self.fingerprint()} {digest}" for digest in digests)
        return self._identity[times]

    def _states(self, first: int) -> np.ndarray:
        """int64 [n, 2]: size and time of change of files from ``first`` on; -1 for one that cannot be looked at."""
        states = np.full((min(STATS_AT_ONCE, len(self) - first), 2), -1, np.int64)
        for row, name in enumerate(self.names[first : first + len(states)]):
            with contextlib.suppress(OSError, ValueError):
                found = os.stat(os.path.join(self.root, name))  # noqa: PTH116, PTH118  (twice as fast as Path's)
                states[row] = found.st_size, found.st_mtime_ns
        return states


class ArraySource(ImageSource):
    """Images held in memory: uint8 [N, H, W, 3]."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, classes: list[str], title: str):
        super().__init__((f"{title}/{i:06d}" for i in range(len(images))), labels, classes, title)
        self.images = images

    def open(self, i: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self.images[i]))

    def pixels(self, i: int) -> torch.Tensor:
        return torch.tensor(self.images[i]).permute(2, 0, 1)  # a copy, because the array may be read-only

    def take(self, indices: np.ndarray) -> ImageSource:
        taken = super().take(indices)
        taken.images = self.images[indices]
        return taken


def _indices_by_class(labels: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
