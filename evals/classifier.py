"""A trunk with a linear classifier, and the check that a frozen trunk has not changed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100  # torch's ignore_index: the cross-entropy skips such rows


def linear_head(width: int, num_classes: int) -> nn.Linear:
    """The classifier of MoCo's protocol: weights N(0, 0.01), bias 0."""
    head = nn.Linear(width, num_classes)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.zeros_(head.bias)
    return head


class Classifier(nn.Module):
    """uint8 images [b, 3, S, S] to logits [b, C]; all of it trains. State dict keys are ``backbone.*`` and ``head.*``,
    which every script here reads as a checkpoint."""

    def __init__(self, encoder: nn.Module, num_classes: int) -> None:
        """``encoder`` has ``backbone`` with ``.spec`` and ``normalise``."""
        super().__init__()
        self.backbone, self.normalise = encoder.backbone, encoder.normalise
        self.head = linear_head(self.backbone.spec.feature_dim, num_classes)
        self.requires_grad_(True)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(self.normalise(images)))


def classification_parts(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """``loss``, the mean cross-entropy, and ``top1`` in percent, of logits [b, C]; rows labelled IGNORED are left out.
    """
    logits = logits.float()
    right = (logits.argmax(1) == labels)[labels != IGNORED]
    return {"loss": F.cross_entropy(logits, labels, ignore_index=IGNORED), "top1": 100 * right.float().mean()}


def labels_of(labels: Tensor) -> Callable[[Tensor, list[tuple[int, str]]], Tensor]:
    """A function from a batch's indices int64 [b] and its unreadable images to its labels. Another image replaces an
    unreadable one, so its label is IGNORED."""
    def of(indices: Tensor, bad: list[tuple[int, str]]) -> Tensor:
        found = labels[indices.cpu()]
        for index, _ in bad:
            found[indices.cpu() == index] = IGNORED
        return found
    return of


def fingerprint(module: nn.Module) -> str:
    """SHA-256 over the names and bits of all parameters and buffers, those outside the state dict included."""
    digest = hashlib.sha256()
    for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()], key=lambda pair: pair[0]):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()
