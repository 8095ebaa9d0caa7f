"""From a source and a sampler to uint8 batches, the same whatever the number of workers and ranks."""

from __future__ import annotations

import hashlib
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, default_collate

from data.augment import eval_transform
from data.datasets import ImageSource
from data.images import BadImage
from data.samplers import RandomSampler
from runtime.errors import UserError

REPLACEMENT_ATTEMPTS = 8


class Batch(NamedTuple):
    """One step's images.

    views: for each view uint8 [B, 3, H, W]. indices: int64 [B], the images asked for. bad: (index, reason) of
    each image that could not be opened; where such an index is in `indices`, its pixels are another image's.
    views is () where even the replacements could not be opened, which BadImageLog.check refuses.
    """

    views: tuple[torch.Tensor, ...]
    indices: torch.Tensor
    bad: list[tuple[int, str]]


Item = tuple[tuple[torch.Tensor, ...], int, list[tuple[int, str]]]


class ViewDataset(Dataset):
    """Opens image `index` once and gives one view of it for each transform.

    The key is (index, stamp), or a plain index, which is its own stamp. A view's randomness comes from (seed,
    stamp, number of the view) alone; the caller's random state is left as it was. An image that cannot be
    opened is replaced by another, drawn from (seed, stamp, attempt), and reported: nothing is raised here,
    because what a worker raises reaches the user as a traceback in a traceback.
    """

    def __init__(self, source: ImageSource, transforms: Sequence[Callable[[Image.Image], torch.Tensor]], seed: int):
        self.source, self.transforms, self.seed = source, tuple(transforms), seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int] | int) -> Item:
        index, stamp = key if isinstance(key, tuple) else (int(key), int(key))
        image, bad = self._open(index, stamp)
        if image is None:
            return (), index, bad
        with torch.random.fork_rng(devices=[]):
            views = tuple(self._view(image, stamp, number) for number in range(len(self.transforms)))
        return views, index, bad

    def _view(self, image: Image.Image, stamp: int, number: int) -> torch.Tensor:
        # Not torch.manual_seed, which would also seed CUDA: in the main process it is the model's.
        torch.default_generator.manual_seed(_hash(self.seed, stamp, "view", number))
        return self.transforms[number](image)

    def _open(self, index: int, stamp: int) -> tuple[Image.Image | None, list[tuple[int, str]]]:
        bad = []
        for attempt in range(1 + REPLACEMENT_ATTEMPTS):
            try:
                return self.source.open(index), bad
            except BadImage as error:
                bad.append((index, str(error)))
                index = _hash(self.seed, stamp, "replacement", attempt) % len(self.source)
        return None, bad


def collate(items: list[Item]) -> Batch:
    """Items of a ViewDataset -> Batch."""
    views, indices, bad = zip(*items, strict=True)
    whole = all(views)
    return Batch(
        views=tuple(default_collate(list(view)) for view in zip(*views, strict=True)) if whole else (),
        indices=torch.tensor(indices, dtype=torch.int64),
        bad=[entry for entries in bad for entry in entries],
    )


def build_loader(
    source: ImageSource,
    transforms: Sequence[Callable[[Image.Image], torch.Tensor]],
    sampler: RandomSampler,
    workers: int,
    seed: int,
    device_type: str,
) -> DataLoader:
    """Training batches: one Batch a step of the sampler, with one view for each transform.

    Workers live on between epochs; call sampler.set_epoch before each. device_type 'cuda' pins the batches.
    """
    dataset = ViewDataset(source, transforms, seed)
    options = _loader_options(workers, device_type, persistent=True)
    return DataLoader(dataset, batch_sampler=sampler, **options)


def evaluation_loader(
    source: ImageSource,
    image_size: int,
    batch_size: int,
    workers: int,
    indices: Sequence[int] | None = None,
    device_type: str = "cpu",
    transform: Callable[[Image.Image], torch.Tensor] | None = None,
    seed: int = 0,
) -> DataLoader:
    """Batches of one view in the order of indices; the last one may be smaller.

    indices None: all images, in order. transform None: eval_transform; another's randomness is seed's.
    """
    dataset = ViewDataset(source, [transform or eval_transform(image_size)], seed)
    order = range(len(source)) if indices is None else indices
    options = _loader_options(workers, device_type, persistent=False)
    return DataLoader(dataset, batch_size=batch_size, sampler=order, **options)


class BadImageLog:
    """What to do about images that cannot be opened.

    policy 'error' stops at the first; 'skip' goes on with another image in its place, and counts.
    """

    def __init__(self, source: ImageSource, policy: str):
        if policy not in ("error", "skip"):
            raise UserError(f"--on-bad-image {policy} is unknown; choose error or skip")
        self.source, self.policy = source, policy
        self.counts: Counter[int] = Counter()
        self.reasons: dict[int, str] = {}

    def check(self, batch: Batch) -> None:
        """Look at a batch before using it. Raises UserError that names the file and the reason."""
        for index, reason in batch.bad:
            self.counts[index] += 1
            self.reasons[index] = reason
        if batch.bad and self.policy == "error":
            raise UserError(
                f"{self._describe(batch.bad[0][0])} could not be opened; replace or remove the file, "
                "or use other images in place of such ones by --on-bad-image skip",
                every_process=False,
            )
        if not batch.views:
            raise UserError(
                f"{self._describe(batch.bad[0][0])} and other images drawn in its place could not be opened, "
                f"{len(self.counts):,} in all; check that the disk of --data can be read",
                every_process=False,
            )

    def summary(self) -> str:
        """One line, with the first five by name."""
        if not self.counts:
            return "every image could be opened"
        shown = ", ".join(self._describe(index) for index in list(self.counts)[:5])
        more = ", ..." if len(self.counts) > 5 else ""
        return (
            f"images that could not be opened: {len(self.counts):,}, replaced by others "
            f"{self.counts.total():,} times: {shown}{more}"
        )

    def _describe(self, index: int) -> str:
        return f"{self.source.location(index)} ({self.reasons[index]})"


def _loader_options(workers: int, device_type: str, persistent: bool) -> dict:
    options = {
        "collate_fn": collate,
        "num_workers": workers,
        "pin_memory": device_type == "cuda",
        "generator": torch.Generator(),  # else each epoch's start takes a number from the global random state
    }
    if workers:
        options |= {"persistent_workers": persistent, "prefetch_factor": 2, "worker_init_fn": _start_worker}
    return options


def _start_worker(worker: int) -> None:
    # Ctrl-C is the main process's to answer: it ends the workers. (Their one thread each is torch's doing.)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _hash(*parts: object) -> int:
    """63 bits that depend on every part."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
