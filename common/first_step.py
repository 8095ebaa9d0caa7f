"""What the training scripts say before their first step: whether it fits into memory, and whether image size and queue
suit the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from data.augment import Augmentation, draw_views
from data.checks import typical_side
from data.loader import waiting_batches
from data.sources import ImageSource
from losses.queue import Queue
from runtime.device import Process
from runtime.memory import check_memory, optimizer_state, peak_of, weight_bytes
from runtime.optim import Updater

ENLARGED = 2  # times, from which it is said
STEP = 32  # pixels, the stride of most networks


@dataclass(frozen=True)
class MeasuredStep:
    """The forward passes of a step, to be measured.

    ``passes(views)`` makes them, over the ``networks``, with views uint8 [b, 3, S, S] as the loader makes them of
    ``views``. A batch has ``rows`` images and is split into ``parts``. Batch norm and the loss need ``least`` images.
    """

    passes: Callable[[Sequence[Tensor]], Any]
    networks: Sequence[nn.Module]
    views: Sequence[Augmentation]
    rows: int
    parts: int = 1
    least: int = 2


def check_step(step: MeasuredStep, updater: Updater, workers: int, process: Process, advice: str) -> list[str]:
    """Warnings where a step takes nearly all free memory. Raises :class:`runtime.errors.UserError`, which ends with
    ``advice``, if it takes more. ``workers``: the loader's.
    """
    sizes = [size for size, _ in draw_views(step.views, 0, np.zeros(1, np.int64))]
    together = -(-step.rows // step.parts)

    def pass_of(count: int) -> Any:
        empty = [torch.zeros(count, 3, size, size, dtype=torch.uint8, device=process.device) for size in sizes]
        with updater.autocast():
            return step.passes(empty)

    peak = peak_of(pass_of, together, step.networks, process.device, step.least)
    # Gradients that are there before a part's backward pass: those of earlier parts, or the buckets of several ranks.
    kept = weight_bytes(updater.optimizer) * (step.parts > 1 or process.world_size > 1)
    one = {f"{together:,} images of {sizes[0]} pixels and the gradients": peak + kept,
           "the optimizer": optimizer_state(updater.optimizer)}
    batch = sum(step.rows * 3 * size * size for size in sizes)
    loader = {"the loader's batches": batch * waiting_batches(workers)}
    if process.device.type == "cpu":
        return [check_memory({**one, **loader}, process.device, advice)]
    return [check_memory(one, process.device, advice), check_memory(loader, torch.device("cpu"), advice)]


class SmallImages(NamedTuple):
    """``found``: that the images are far smaller than the networks see them; ``flags``: what to give. '' if not so."""

    found: str
    flags: str

    def note(self, also: str = "") -> str:
        """A sentence for the log, or ''. ``also``: its end."""
        return self.flags and f"{self.found}; {self.flags} takes far less time and memory{also}"

    def advice(self) -> str:
        """The first alternative of an advice where memory is short, or ''."""
        return self.flags and f"give {self.flags}, since {self.found}, or "


def small_images(source: ImageSource, image_size: int) -> SmallImages:
    """Whether the images are far smaller than ``image_size``."""
    side = typical_side(source)
    if not side or side * ENLARGED > image_size:
        return SmallImages("", "")
    fits = -(-side // STEP) * STEP
    return SmallImages(f"the images of --data are about {side} pixels wide and high and are enlarged to {image_size}",
                       f"--image-size {fits}" + " --stem cifar" * (fits <= 2 * STEP))


def long_queue(loss: nn.Module, images: int, flag: str) -> str:
    """A sentence if a queue of ``loss`` is longer than the data."""
    longest = max((len(x) for x in loss.modules() if isinstance(x, Queue)), default=0)
    if longest <= images:
        return ""
    fewer = 1 << max(0, (images // 2).bit_length() - 1)
    return (f"{flag} {longest:,} is more than the {images:,} images of --data, so that an image is compared with its "
            f"own earlier outputs as if they were other images; {flag} {fewer} would not do so")
