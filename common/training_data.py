"""The images of a training and the batches they come in, for both training scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from common import cli
from common.first_step import SmallImages, small_images
from data.augment import Augmentation
from data.cache import pooled
from data.checks import check_apart
from data.datasets import open_source
from data.loader import BadImageLog, TrainingLoader, build_loader
from data.samplers import RandomSampler
from data.sources import ImageSource
from evals.monitor import KnnMonitor
from runtime.device import Process


@dataclass(frozen=True)
class TrainingData:
    """``loader`` yields batches of ``views`` of the images that ``sampler`` takes from ``source``."""

    source: ImageSource
    sampler: RandomSampler
    views: Sequence[Augmentation]
    loader: TrainingLoader
    bad_images: BadImageLog
    image_size: int  # the side of the trained network's square input, in pixels
    small: SmallImages

    @classmethod
    def open(cls, args: cli.Arguments, source: ImageSource, sampler: RandomSampler, views: Sequence[Augmentation],
             image_size: int, process: Process) -> TrainingData:
        """The loader that the command line asks for."""
        small = small_images(source, image_size)
        source = pooled(source, args.image_cache, args.cache)
        loader = build_loader(source, views, sampler, args.workers, args.seed, process.device, args.data_path,
                              args.cache)
        return cls(source, sampler, views, loader, BadImageLog(source, args.on_bad_image), image_size, small)


def open_images(args: cli.Arguments) -> ImageSource:
    """The images of --data and --subset. Raises :class:`runtime.errors.UserError` if --output lies among them."""
    check_apart(args.output, args.data)
    return open_source(args.data).subset(args.subset)


def open_monitor(args: cli.Arguments, image_size: int, process: Process) -> KnnMonitor | None:
    """What computes the k-NN score of --knn-every; None without it."""
    if not args.knn_every:
        return None
    return KnnMonitor.open(args.data, args.knn_data, image_size, args.workers, process, args.on_bad_image)
