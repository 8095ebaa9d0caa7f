"""The k-NN score during training: a subset of labelled images, scored every few epochs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import nn

from data.datasets import check_there
from data.loader import BadImageLog, evaluation_loader
from data.sources import ImageSource
from data.splits import open_labelled
from evals.knn import knn_accuracy
from runtime.device import Process, broadcast
from runtime.errors import UserError
from runtime.settings import Setting, Used
from search.features import extract, left_out

BANK, QUERIES, BATCH = 10_000, 2_000, 256
K, TEMPERATURE = 10, 0.07


@dataclass(frozen=True)
class Monitoring:
    """The k-NN score during training: how often, and on which images."""

    knn_every: Annotated[int, Setting("every N epochs (and after the last) score the encoder by 10-NN on a held-out "
                                      "slice; default {default}, never", least=0, metavar="N", resumable=True,
                                      basic=True)] = 0
    knn_data: Annotated[str | None, Setting(
        "labelled images for it, a folder with train/ and val/ or test/, or a name; default: --data or the folder "
        "above it, whichever holds them", metavar="ROOT", resumable=True, basic=True,
        check=check_there),
        Used("with --knn-every", lambda args: bool(args.knn_every))] = None


class KnnMonitor:
    """10-NN top-1 of at most 2,000 test images among at most 10,000 training images, evenly taken from each."""

    def __init__(self, train: ImageSource, test: ImageSource, image_size: int, workers: int,
                 process: Process, on_bad_image: str = "error") -> None:
        """``on_bad_image``: ``skip`` leaves out unreadable images. Raises :class:`UserError` for too few images."""
        if len(train) < K:
            raise UserError(f"--knn-every takes the {K} nearest of the training images, and {train.title} holds "
                            f"{len(train)}; give --knn-data with more, or leave --knn-every out")
        self.on_bad_image = on_bad_image
        self.train, self.test = _evenly(train, BANK), _evenly(test, QUERIES)
        self.num_classes, self.image_size = len(train.classes), image_size
        self.workers, self.process = workers, process
        self.description = f"10-NN of {len(self.test)} held-out among {len(self.train)} images"

    @classmethod
    def open(cls, data: str, knn_data: str | None, image_size: int, workers: int, process: Process,
             on_bad_image: str = "error") -> KnnMonitor:
        """From --knn-data, or from ``data`` or the folder above it if that holds train/ and val/ or test/."""
        candidates = [knn_data] if knn_data else [data, str(Path(data).parent)]
        for root in candidates:
            try:
                train, test = open_labelled(root, "--knn-data")
            except UserError as error:
                problem = error
            else:
                return cls(train, test, image_size, workers, process, on_bad_image)
        if knn_data:
            raise problem
        raise UserError(f"--knn-every needs labelled images, and neither --data {data} nor the folder above it holds "
                        "train/ and val/ or test/; give --knn-data ROOT or leave --knn-every out")

    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of its images, by readable names."""
        return {f"the fingerprint of --knn-data's {role} images": source.fingerprint()
                for role, source in (("training", self.train), ("test", self.test))}

    @staticmethod
    def is_due(done: int, every: int, epochs: int) -> bool:
        """Whether to score after ``done`` of ``epochs``: after each ``every``, and after the last."""
        return done % every == 0 or done == epochs

    def score(self, encoder: nn.Module) -> float:
        """Top-1 in percent, the same on every rank (a collective)."""
        for buffer in encoder.buffers():  # running statistics differ between ranks; rank 0's are saved
            broadcast(buffer)
        (bank, bank_labels), (queries, labels) = (self._features(encoder, x) for x in (self.train, self.test))
        if len(bank) < K or not len(queries):
            raise UserError(f"--knn-every: of {self.train.title} {len(bank)} images are readable and of "
                            f"{self.test.title} {len(queries)}, but at least {K} and 1 are needed; repair them, or "
                            "leave --knn-every out")
        row, = knn_accuracy(bank, bank_labels, queries, labels, self.num_classes, [(K, TEMPERATURE)],
                            device=torch.device("cpu") if self.process.device.type == "mps" else self.process.device)
        return row["top1"]

    def _features(self, encoder: nn.Module, source: ImageSource) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [n, d] and labels [n] of the readable images."""
        def loader_of(indices: range) -> object:
            return evaluation_loader(source, self.image_size, BATCH, self.workers, indices, self.process.device.type)

        skip, check = self.on_bad_image == "skip", BadImageLog(source, self.on_bad_image).check
        features = extract(encoder, loader_of, len(source), self.process, "k-NN features", check, leave_out=skip)
        opened = np.delete(np.arange(len(source)), left_out(features) if skip else [])
        return features[opened], torch.from_numpy(source.labels[opened])


def _evenly(source: ImageSource, most: int) -> ImageSource:
    if len(source) <= most:
        return source
    return source.take(np.linspace(0, len(source) - 1, most).round().astype(np.int64))
