"""Loaders: from a source and a sampler to uint8 batches, which do not depend on the number of workers and ranks."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils.signal_handling import _set_SIGCHLD_handler

from data.augment import Augmentation, Transform, Views, draw_views, eval_transform
from data.batches import BadImageLog, Batch, as_key, named_deaths, open_or_replace
from data.cache import CachedSource
from data.colour import apply_colour
from data.images import limit_pixels, most_pixels
from data.parcels import Parcel, allocate, packed
from data.resident import ResidentLoader
from data.samplers import Key, RandomSampler
from data.sources import ImageSource
from data.views import fast_crop, pil_view
from runtime.errors import UserError

__all__ = ["BadImageLog", "Batch", "DATA_PATHS", "CACHES", "ViewDataset", "build_loader", "evaluation_loader"]

DATA_PATHS = ("fast", "pil")
CACHES = ("none", "host", "device")
PREFETCHED = 2  # batches that each worker makes ahead


class ViewDataset(Dataset):
    """Whole batches of views. Each image of a batch is opened once, for all its views and repetitions.

    A view's parameters depend only on (seed, stamp, number of the view). path 'pil' makes views with Pillow, 'fast'
    with torch. With colour_later, colour changes of fast views are left to the device, and Batch.colour holds their
    parameters. An unreadable image is replaced by another, drawn from (seed, stamp, attempt), and reported in
    Batch.bad. It is not raised here, because an exception in a worker would reach the user as a traceback within a
    traceback.
    """

    def __init__(self, source: ImageSource, augmentations: Sequence[Augmentation], seed: int, path: str = "pil",
                 colour_later: bool = False):
        if path not in DATA_PATHS:
            raise UserError(f"--data-path {path} is unknown; choose one of {', '.join(DATA_PATHS)}")
        self.source, self.augmentations, self.seed = source, tuple(augmentations), seed
        self.path, self.colour_later = path, colour_later

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, keys: Sequence[Key | int]) -> Batch:
        indices, stamps = np.array([as_key(key) for key in keys], np.int64).reshape(-1, 2).T
        sizes, drawn = zip(*draw_views(self.augmentations, self.seed, stamps), strict=True)
        views = [_empty_view(len(keys), size, self.colour_later) for size in sizes]
        bad: list[tuple[int, str]] = []
        decoded, whole = 0, True
        for opened, rows in self._opened(indices, stamps, drawn, bad):
            decoded += 1
            if opened is None:
                whole = False
                continue
            image, boxes = opened
            for view, parameters, of_view in zip(views, drawn, boxes, strict=True):
                for row, box in zip(rows, of_view[: len(rows)], strict=True):
                    if self.path == "fast":
                        fast_crop(image, box, parameters.flip[row], view[row])
                    else:
                        view[row] = pil_view(image, box, parameters.flip[row], parameters.colour[row], view.shape[-1])
        colour = tuple(torch.from_numpy(parameters.colour) for parameters in drawn) if self.path == "fast" else ()
        if colour and not self.colour_later and whole:
            for view, parameters in zip(views, colour, strict=True):
                view.copy_(apply_colour(view, parameters))
        return Batch(tuple(views) if whole else (), torch.from_numpy(indices.copy()), bad,
                     colour if self.colour_later else (), decoded)

    def _opened(self, indices: np.ndarray, stamps: np.ndarray, drawn: Sequence[Views], bad: list,
                ) -> Iterator[tuple[tuple | None, list[int]]]:
        """The result of _open for each image of the batch, and the rows that show it. The rows of an unreadable image
        come one by one, so that each gets its own replacement."""
        rows_of: dict[int, list[int]] = {}
        for row, index in enumerate(indices.tolist()):
            rows_of.setdefault(index, []).append(row)
        for index, rows in rows_of.items():
            waiting = [rows]
            for some in waiting:
                opened, found = open_or_replace(partial(self._open, drawn, some), index, int(stamps[some[0]]),
                                                self.seed, len(self.source))
                bad += found
                if found and some is rows:  # each row gets its own replacement
                    waiting += [[row] for row in rows[1:]]
                yield opened, some[:1] if found else some

    def _open(self, drawn: Sequence[Views], rows: list[int], index: int) -> tuple[object, np.ndarray]:
        """An image, or the part that these rows show, and their crops in it: int64 [views, rows, 4]."""
        def crops(height: int, width: int) -> np.ndarray:
            return np.stack([parameters.boxes(height, width, rows) for parameters in drawn])

        if self.path == "fast":
            return self.source.crops(index, crops)
        image = self.source.open(index)
        return image, crops(image.height, image.width)


class EvaluationDataset(Dataset):
    """Whole batches with one view of each image, by a transform without random numbers."""

    def __init__(self, source: ImageSource, transform: Transform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        views: list[torch.Tensor] = []
        bad: list[tuple[int, str]] = []
        for index in map(int, indices):
            view, found = open_or_replace(lambda i: self.transform(self.source.open(i)), index, index, 0,
                                          len(self.source))
            bad += found
            if view is not None:
                views.append(view)
        whole = len(views) == len(indices)
        return Batch((torch.stack(views),) if whole else (), torch.tensor(indices, dtype=torch.int64), bad, (),
                     len(views))


def build_loader(source: ImageSource, augmentations: Sequence[Augmentation], sampler: RandomSampler, workers: int,
                 seed: int, device: torch.device | str, path: str = "fast", cache: str = "none",
                 ) -> TrainingLoader | ResidentLoader:
    """Training batches on the device: one Batch per step of the sampler, with the views of data.augment.draw_views.

    path: 'fast' or 'pil', how views are made. cache: 'none', or 'host' or 'device' to keep all images there
    (data.resident), which needs no workers. Workers persist between epochs; call sampler.set_epoch before each epoch.
    """
    device = torch.device(device)
    if cache != "none":
        if path != "fast":
            raise UserError(f"--cache {cache} makes whole batches of views at once, which --data-path {path} cannot; "
                            "omit one of the two flags")
        return ResidentLoader(source, augmentations, sampler, seed, device, cache, workers)
    dataset = ViewDataset(source, augmentations, seed, path, path == "fast" and device.type != "cpu")
    loader = WorkerLoader(dataset, batch_sampler=sampler, **loader_options(workers, device.type, persistent=True))
    return TrainingLoader(loader, device)


def evaluation_loader(
    source: ImageSource,
    image_size: int,
    batch_size: int,
    workers: int,
    indices: Sequence[int] | None = None,
    device_type: str = "cpu",
    augmentation: Augmentation | None = None,
    seed: int = 0,
    transform: Transform | None = None,
) -> DataLoader:
    """Batches with one view of each image, in the order of indices; the last batch may be smaller.

    indices None: all images, in order. augmentation None: the view is ``transform`` of the image, by default
    eval_transform; otherwise it is a random view, which depends on ``seed``.
    """
    dataset = (EvaluationDataset(source, transform or eval_transform(image_size)) if augmentation is None else
               ViewDataset(source, [augmentation], seed))
    order = range(len(source)) if indices is None else indices
    options = loader_options(workers, device_type, persistent=False)
    return WorkerLoader(dataset, batch_size=batch_size, sampler=order, **options)


class WorkerLoader(DataLoader):
    """A DataLoader that reports in one sentence which worker died and why."""

    def __iter__(self) -> Iterator[Batch]:
        # When a worker dies, torch raises from a signal handler, in the middle of whatever is running. The loader also
        # checks its workers every few seconds while it waits; that is early enough, and can be handled here. torch sets
        # its handler once per process, so do that before there is a worker that could die.
        before = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
        _set_SIGCHLD_handler()
        if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before)
        iterator = super().__iter__()
        while True:
            with named_deaths(getattr(iterator, "_workers", ())):
                batch = next(iterator, None)
                if isinstance(batch, Parcel):
                    batch = batch.open()
            if batch is None:
                return
            yield batch


class TrainingLoader:
    """Batches whose views are on the device with their colours changed. On a GPU, copy and colour changes of the next
    batch overlap with the computation of the current one."""

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, self.device = loader, device
        self.images = self.decoded = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._prefetched() if self.device.type == "cuda" else map(self._finished, self.loader):
            self.images += len(batch.indices)
            self.decoded += batch.decoded
            yield batch

    def repeats(self) -> str:
        """How much decoding was saved since the last call, in words; '' for nothing."""
        images, decoded = self.images, self.decoded
        self.images = self.decoded = 0
        source = self.loader.dataset.source
        said = [f"{1 - decoded / images:.1%} of the images were repetitions within a process's batch, not opened again"
                ] if decoded < images else []
        return "; ".join(said + ([source.summary()] if isinstance(source, CachedSource) else []))

    def advice(self) -> str:
        """What to do if the training step waits for data."""
        faster = " or give --data-path fast" if self.loader.dataset.path == "pil" else ""
        return (f"raise --workers (now {self.loader.num_workers}){faster}, or keep small images in memory with "
                "--cache device")

    def _finished(self, batch: Batch) -> Batch:
        pinned = self.device.type == "cuda"
        views = tuple(view.to(self.device, non_blocking=pinned).contiguous() for view in batch.views)
        if batch.colour:
            views = tuple(apply_colour(*pair) for pair in zip(views, batch.colour, strict=bool(views)))
        return batch._replace(views=views, colour=())

    def _prefetched(self) -> Iterator[Batch]:
        """Batches for a GPU, prepared one step ahead on a separate stream."""
        stream, waiting = torch.cuda.Stream(self.device), None
        for batch in self.loader:
            with torch.cuda.stream(stream):
                ready = self._finished(batch), stream.record_event(), batch  # the pinned batch lives until it is copied
            if waiting:
                yield self._for_current_stream(*waiting[:2])
            waiting = ready
        if waiting:
            yield self._for_current_stream(*waiting[:2])

    def _for_current_stream(self, batch: Batch, event: torch.cuda.Event) -> Batch:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(event)
        for view in batch.views:
            view.record_stream(current)  # else its memory may be reused while the model still reads it
        return batch


def _empty_view(count: int, size: int, channels_last: bool) -> torch.Tensor:
    """uint8 [count, 3, size, size], see :func:`data.parcels.allocate`.

    channels_last: in the layout that resizing writes; a GPU then separates the channels faster than the CPU would.
    """
    flat = allocate(count * 3 * size * size)
    return flat.view(count, size, size, 3).permute(0, 3, 1, 2) if channels_last else flat.view(count, 3, size, size)


def waiting_batches(workers: int) -> int:
    """How many batches a training loader holds at most: those that its ``workers`` have made, and the current one."""
    return PREFETCHED * workers + 1


def loader_options(workers: int, device_type: str, persistent: bool) -> dict:
    """Keyword arguments of a DataLoader whose data set returns whole batches."""
    options = {
        "collate_fn": packed,
        "num_workers": workers,
        "pin_memory": device_type == "cuda",
        "generator": torch.Generator(),  # else the start of each epoch draws from the global random state
    }
    if workers:
        options |= {"persistent_workers": persistent, "prefetch_factor": PREFETCHED,
                    "worker_init_fn": partial(_start_worker, most_pixels())}
    return options


def _start_worker(most: int, worker: int) -> None:
    limit_pixels(most)  # a spawned worker starts with Pillow's limit
    # A terminal or torchrun signals the whole process group. Only the main process handles that: it finishes its step,
    # for which it may need the workers, and then ends them. (torch itself limits each worker to one thread.)
    os.setpgrp()
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
