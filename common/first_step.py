"""What the training scripts say before their first step: whether it fits into memory, and whether image size and queue
suit the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.augment import Augmentation, draw_views
from data.checks import typical_side
from data.loader import waiting_batches
from data.sources import ImageSource
from losses.queue import Queue
from runtime.device import Process
from runtime.memory import bytes_per_row, check_memory, fits, peak_of, training_state
from runtime.optim import Updater

ENLARGED = 2  # times, from which it is said
STEP = 32  # pixels, the stride of most networks


def check_step(forward: Callable[[Sequence[Tensor]], Any], networks: Sequence[nn.Module], views: Sequence[Augmentation],
               rows: int, together: int, updater: Updater, workers: int, process: Process, advice: str,
               least: int = 2) -> list[str]:
    """Warnings where a step takes nearly all free memory. Raises :class:`runtime.errors.UserError`, which ends with
    ``advice``, if it takes more.

    ``forward(views)``: the forward passes of a step, over the ``networks``, with views uint8 [b, 3, S, S] as the loader
    makes them of ``views``. ``rows``: images of a batch, of which ``together`` pass at once. ``workers``: the loader's.
    ``least``: images that batch norm and the loss need.
    """
    sizes = [size for size, _ in draw_views(views, 0, np.zeros(1, np.int64))]

    def pass_of(count: int) -> Any:
        empty = [torch.zeros(count, 3, size, size, dtype=torch.uint8, device=process.device) for size in sizes]
        with updater.autocast():
            return forward(empty)

    batch = sum(rows * 3 * size * size for size in sizes)

    def needed(per_image: float) -> list[tuple[dict[str, float], torch.device]]:
        step = {f"{together:,} images of {sizes[0]} pixels": per_image * together,
                "gradients and the optimizer": training_state(updater.optimizer, process.world_size)}
        loader = {"the loader's batches": batch * waiting_batches(workers)}
        if process.device.type == "cpu":
            return [({**step, **loader}, process.device)]
        return [(step, process.device), (loader, torch.device("cpu"))]

    # Most steps fit even if all that a few images take grew with their number; the others are measured again.
    most = peak_of(pass_of, least, networks, process.device) / least
    if all(fits(*part) for part in needed(most)):
        return []
    per_image = bytes_per_row(pass_of, networks, process.device, least)
    return [check_memory(*part, advice) for part in needed(per_image)]


def small_images(source: ImageSource, image_size: int) -> tuple[str, str]:
    """('the images of --data are ...', '--image-size N') if they are far smaller than ``image_size``; else ('', '')."""
    side = typical_side(source)
    if not side or side * ENLARGED > image_size:
        return "", ""
    fits = -(-side // STEP) * STEP
    return (f"the images of --data are about {side} pixels wide and high and are enlarged to {image_size}",
            f"--image-size {fits}" + " --stem cifar" * (fits <= 2 * STEP))


def long_queue(loss: nn.Module, images: int, flag: str) -> str:
    """A sentence if a queue of ``loss`` is longer than the data."""
    longest = max((len(x) for x in loss.modules() if isinstance(x, Queue)), default=0)
    if longest <= images:
        return ""
    fewer = 1 << max(0, (images // 2).bit_length() - 1)
    return (f"{flag} {longest:,} is more than the {images:,} images of --data, so that an image is compared with its "
            f"own earlier outputs as if they were other images; {flag} {fewer} would not do so")
