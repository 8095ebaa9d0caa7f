"""The API of ``import coss``, in a module of its own so that the import itself is cheap."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from checkpoints.frozen import load_frozen
from data.augment import eval_transform
from data.datasets import open_source
from data.loader import evaluation_loader
from runtime.errors import UserError


class Network(nn.Module):
    """A frozen network with its preprocessing: images uint8 [b, 3, S, S] in, pooled features float32 [b, d] out.

    ``transform``: a PIL image in mode RGB -> uint8 [3, S, S], as for k-NN; the network normalises colours itself.
    ``str(report)`` says what was read and how.
    """

    def __init__(self, encoder: nn.Module, report: Any) -> None:
        super().__init__()
        self.encoder, self.report = encoder, report
        self.image_size, self.width = encoder.backbone.spec.image_size, encoder.backbone.spec.feature_dim
        self.transform = eval_transform(self.image_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""
        return self.encoder.normalise.shift.device

    @torch.inference_mode()
    def embed(self, images: str | Path | Image.Image | Iterable[Image.Image], batch_size: int = 64, workers: int = 0,
              ) -> np.ndarray:
        """float32 [n, d] for a folder, a list of paths (.txt), a packed file or the name of a data set, in the order of
        :func:`names`; or for one PIL image or several, in order. Raises :class:`UserError` for an unreadable image."""
        if isinstance(images, str | Path):
            source = open_source(str(images), flag="images")
            batches = (self._checked(source, batch) for batch in evaluation_loader(source, self.image_size, batch_size,
                                                                                   workers))
        else:
            pixels = [self.transform(image.convert("RGB"))
                      for image in ([images] if isinstance(images, Image.Image) else images)]
            batches = (torch.stack(pixels[first:first + batch_size]) for first in range(0, len(pixels), batch_size))
        rows = [self(batch.to(self.device)).float().cpu() for batch in batches]
        return torch.cat(rows).numpy() if rows else np.empty((0, self.width), np.float32)

    @staticmethod
    def _checked(source: Any, batch: Any) -> Tensor:
        for index, reason in batch.bad:
            raise UserError(f"{source.location(index)} is unreadable ({reason}); replace or remove it")
        return batch.views[0]


def load(weights: str | Path, arch: str | None = None, image_size: int | None = None, device: str | None = None,
         **reading: Any) -> Network:
    """Load a checkpoint as a :class:`Network`; architecture, stem and normalisation are read from it. ``device``: by
    default a GPU if there is one. ``reading``: the values of --branch, --mean, --std, --stem ... as keywords of
    checkpoints.frozen.load_frozen. Raises :class:`UserError` on any mismatch."""
    encoder, report = load_frozen(weights, arch, image_size=image_size, flag="weights", **reading)
    return Network(encoder.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), report)


def embed(weights: str | Path | Network, images: Any, **options: Any) -> np.ndarray:
    """:meth:`Network.embed` for a checkpoint file or a loaded network. float32 [n, d]."""
    network = weights if isinstance(weights, Network) else load(weights)
    return network.embed(images, **options)


def names(images: str | Path) -> list[str]:
    """The names of a folder's images, in the order of the rows of :meth:`Network.embed`."""
    return list(open_source(str(images), flag="images").names)


def distill(**settings: Any) -> None:
    """train_distill.py with its flags as keywords: ``distill(data="photos/", distill="moco.pth", output="run")``.

    Underscores stand for hyphens, True for a flag without a value, a list for several values; False and None leave a
    flag out. One process; for several start train_distill.py, or coss-distill, by torchrun. Raises :class:`UserError`.
    """
    import train_distill
    train_distill.main(words(settings))


def words(settings: dict[str, Any]) -> list[str]:
    """Keywords as a command line."""
    found: list[str] = []
    for name, value in settings.items():
        if value is None or value is False:
            continue
        several = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        found += [f"--{name.replace('_', '-')}", *([] if value is True else map(str, several))]
    return found
