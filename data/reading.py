"""The settings of how images are found, read and made into views."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated

from data.datasets import check_there
from data.images import MAX_PIXELS
from data.loader import CACHES, DATA_PATHS
from runtime.numbers import from_environment
from runtime.settings import Setting


def default_workers() -> int:
    """This process's share of the machine's cores, at least 1 and at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // from_environment("LOCAL_WORLD_SIZE", 1, 1)))


Workers = Annotated[int, Setting(
    "processes per rank that open and augment images; default: the rank's share of the cores, at most 8",
    "-j --workers --num_workers", least=0, most=512, metavar="N", resumable=True, basic=True)]


MaxPixels = Annotated[int, Setting(
    "treat images of more than N pixels as unreadable, since a small file can demand all memory; default {default}, "
    "Pillow's limit; raise it for large images that you trust", least=1000, most=10**12, metavar="N", resumable=True,
    changes_numbers=True)]


@dataclass(frozen=True)
class Images:
    """Which images are used."""

    data: Annotated[str, Setting(
        "images: an ImageFolder tree, any folder of images, a packed file (of pack_dataset.py), a .txt file of paths, "
        "a name (demo, digits, cifar10, cifar100, stl10; kept in $COSS_DATASETS, else ./datasets), or FILE.py:NAME of "
        "your own. If a folder holds train/ and val/ or test/ (or packed files with these names), train/ is used; "
        "paths in a .txt are relative to its folder. Labels are not used", metavar="DIR",
        resumable=True, basic=True, check=check_there)]
    subset: Annotated[float, Setting("use the first X (0-1] of each class's images; default {default}, the "
                                     "paper's 1% and 10% rows use 0.01 and 0.1", metavar="X", basic=True)] = 1.0
    max_pixels: MaxPixels = MAX_PIXELS


@dataclass(frozen=True)
class Reading:
    """How images are read."""

    image_size: Annotated[int | None, Setting(
        "side of the networks' square input, in pixels; default: what the checkpoint records or its position "
        "embeddings need, else 224 as in the paper", "--image-size --image_size", least=8, most=8192, metavar="S",
        basic=True)] = None
    workers: Workers = 0
    on_bad_image: Annotated[str, Setting(
        "what to do about an unreadable image: error (default) stops; skip counts it and continues with another image "
        "in its place, or in evaluations without it", choices=("error", "skip"), resumable=True,
        changes_numbers=True)] = "error"


@dataclass(frozen=True)
class Views:
    """How the augmented views for training are made."""

    data_path: Annotated[str, Setting(
        "how views are made: fast (default) crops and resizes with torch and changes colours in batches on the device; "
        "pil does every step with Pillow, as the original does; both use the same random crops and colours, and pixels "
        "differ by less than 1.5 of 255 on average", choices=DATA_PATHS, resumable=True,
        changes_numbers=True)] = "fast"
    cache: Annotated[str, Setting(
        "host or device: decode all images once, keep them in the memory of the host or device, and make views in "
        "batches on the device without workers; for small images of one size (CIFAR); default none", choices=CACHES,
        resumable=True)] = "none"
    image_cache: Annotated[float, Setting(
        "size, in 10^9 bytes per rank, of a cache of decoded images in shared memory, which its workers share; the "
        "first images that are read stay in it, and the log gives the hit rate; default 0, no cache", least=0,
        metavar="GB", resumable=True)] = 0.0
