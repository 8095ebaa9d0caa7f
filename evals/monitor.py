"""The k-NN score that is written during training: a slice of labelled images, scored every few epochs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import nn

from data.loader import BadImageLog, evaluation_loader
from data.sources import ImageSource
from data.splits import open_labelled
from evals.knn import knn_accuracy
from runtime.device import Process, broadcast
from runtime.errors import UserError
from runtime.features import extract
from runtime.settings import Setting, Used

BANK, QUERIES, BATCH = 10_000, 2_000, 256
K, TEMPERATURE = 10, 0.07


@dataclass(frozen=True)
class Monitoring:
    """The k-NN score during training: how often, and on which images."""

    knn_every: Annotated[int, Setting("every N epochs (and after the last) score the encoder by 10-NN on a held-out "
                                      "slice; default {default}, never", least=0, metavar="N", resumable=True)] = 0
    knn_data: Annotated[str | None, Setting(
        "labelled images for it, a folder with train/ and val/ or test/, or a name; default: --data or the folder "
        "above it, whichever holds them", metavar="ROOT", resumable=True),
        Used("with --knn-every", lambda args: bool(args.knn_every))] = None


class KnnMonitor:
    """10-NN top-1 of at most 2,000 test images among at most 10,000 training images, evenly taken from each."""

    def __init__(self, train: ImageSource, test: ImageSource, image_size: int, workers: int,
                 process: Process) -> None:
        self.train, self.test = _evenly(train, BANK), _evenly(test, QUERIES)
        self.num_classes, self.image_size = len(train.classes), image_size
        self.workers, self.process = workers, process
        self.description = f"10-NN of {len(self.test)} held-out among {len(self.train)} images"

    @classmethod
    def open(cls, data: str, knn_data: str | None, image_size: int, workers: int, process: Process) -> KnnMonitor:
        """From --knn-data, or from ``data`` or the folder above it if that holds train/ and val/ or test/."""
        candidates = [knn_data] if knn_data else [data, str(Path(data).parent)]
        for root in candidates:
            try:
                return cls(*open_labelled(root, "--knn-data"), image_size, workers, process)
            except UserError as error:
                problem = error
        if knn_data:
            raise problem
        raise UserError(f"--knn-every needs labelled images, and neither --data {data} nor the folder above it holds "
                        "train/ and val/ or test/; give --knn-data ROOT or leave --knn-every out")

    def score(self, encoder: nn.Module) -> float:
        """Top-1 in percent, the same on every rank (a collective)."""
        for buffer in encoder.buffers():  # running statistics are each rank's own; what is saved is the first's
            broadcast(buffer)
        features = [self._features(encoder, source) for source in (self.train, self.test)]
        labels = [torch.from_numpy(source.labels) for source in (self.train, self.test)]
        row, = knn_accuracy(features[0], labels[0], features[1], labels[1], self.num_classes, [(K, TEMPERATURE)],
                            device=self.process.device)
        return row["top1"]

    def _features(self, encoder: nn.Module, source: ImageSource) -> torch.Tensor:
        def loader_of(indices: range) -> object:
            return evaluation_loader(source, self.image_size, BATCH, self.workers, indices, self.process.device.type)

        check = BadImageLog(source, "error").check
        return extract(encoder, loader_of, len(source), self.process, "k-NN features", check)


def _evenly(source: ImageSource, most: int) -> ImageSource:
    if len(source) <= most:
        return source
    return source.take(np.linspace(0, len(source) - 1, most).round().astype(np.int64))
