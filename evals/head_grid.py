"""Linear classifiers on features in memory: a grid of settings trained side by side in one matrix product."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evals.metrics import places
from runtime.device import free_memory

CHUNK = 8192


@dataclass(frozen=True)
class Scale:
    """Features at zero mean and unit variance of the training set: a linear head can undo it, so it affects only
    the conditioning, and one grid of rates suits every network. A feature that does not vary becomes 0."""

    mean: Tensor    # [d]
    factor: Tensor  # [d]

    @classmethod
    def of(cls, features: Tensor) -> Scale:
        """From features [n, d]."""
        total, squares = torch.zeros(2, features.shape[1], dtype=torch.float64)
        for part in features.split(CHUNK):
            total += part.double().sum(0)
            squares += part.double().square().sum(0)
        mean = total / len(features)
        std = (squares / len(features) - mean.square()).clamp_min(0).sqrt()
        return cls(mean.float(), torch.where(std > 1e-6 * mean.abs().clamp_min(1e-6), 1 / std, 0.0).float())

    def __call__(self, rows: Tensor) -> Tensor:
        return (rows.float() - self.mean.to(rows.device)) * self.factor.to(rows.device)


@dataclass(frozen=True)
class Heads:
    """H linear heads over scaled features: weight [H, C, d], bias [H, C]."""

    weight: Tensor
    bias: Tensor
    scale: Scale

    def logits(self, rows: Tensor) -> Tensor:
        """[b, d] -> [b, H, C]."""
        heads, classes, width = self.weight.shape
        return (self.scale(rows) @ self.weight.reshape(-1, width).T + self.bias.view(-1)).view(-1, heads, classes)

    def accuracy(self, features: Tensor, labels: Tensor, top: Sequence[int] = (1, 5)) -> Tensor:
        """float64 [H, len(top)]: percent of features [n, d] whose label is among the first k classes."""
        hits = torch.zeros(self.weight.shape[0], len(top), dtype=torch.float64)
        for start in range(0, len(labels), CHUNK // 8):
            part = slice(start, start + CHUNK // 8)
            logits = self.logits(features[part].to(self.weight.device))                   # [b, H, C]
            where = places(logits, labels[part, None].expand(logits.shape[:2]).to(logits.device))
            hits += torch.stack([(where < k).sum(0) for k in top], dim=1).cpu()
        return 100 * hits / max(len(labels), 1)


def sgd_heads(features: Tensor, labels: Tensor, num_classes: int, grid: Sequence[tuple[float, float]], *,
              epochs: int = 100, batch_size: int = 256, momentum: float = 0.9, seed: int = 0,
              device: torch.device | str = "cpu", progress: bool = False) -> Heads:
    """One head for each (learning rate, weight decay) of ``grid``, by SGD with a cosine to 0 over all steps.

    features [n, d] of any float type, labels int64 [n]. All heads see the same batches; the gradient of the mean
    cross-entropy is written out, softmax minus one-hot, so that all heads are one product forwards and one backwards.
    """
    device = torch.device(device)
    scale, count = Scale.of(features), len(features)
    batch_size, width = min(batch_size, count), features.shape[1]
    generator = torch.Generator().manual_seed(seed)
    weight = torch.zeros(len(grid) * num_classes, width, device=device)
    bias = torch.zeros(len(weight), device=device)
    moving = torch.zeros_like(weight), torch.zeros_like(bias)
    rate, decay = torch.tensor(grid, device=device).repeat_interleave(num_classes, 0).unbind(1)   # [H * C] each
    if device.type != "cpu" and 2 * features.numel() * 4 < free_memory(device):
        features = features.to(device)
    steps = count // batch_size
    for epoch in tqdm(range(epochs), desc="heads", unit="epoch", leave=False, disable=None if progress else True):
        order = torch.randperm(count, generator=generator)
        for step in range(steps):
            rows = order[step * batch_size:(step + 1) * batch_size]
            x = scale(features[rows.to(features.device)].to(device))                              # [b, d]
            logits = (x @ weight.T + bias).view(len(rows), len(grid), num_classes)
            error = logits.softmax(-1)
            error[torch.arange(len(rows)), :, labels[rows].to(device)] -= 1
            error = error.view(len(rows), -1) / len(rows)                                         # [b, H * C]
            now = rate * 0.5 * (1 + math.cos(math.pi * (epoch * steps + step) / (epochs * steps)))
            moving[0].mul_(momentum).add_(error.T @ x).add_(weight * decay[:, None])
            moving[1].mul_(momentum).add_(error.sum(0))
            weight.sub_(moving[0] * now[:, None])
            bias.sub_(moving[1] * now)
    return Heads(weight.view(len(grid), num_classes, width), bias.view(len(grid), num_classes), scale)


def split_validation(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (training, validation) of labels int64 [n]: ``share`` of each class, rounded, drawn by ``seed``, goes to
    validation, and at least one image of each class stays in training. Both are in ascending order."""
    generator, held = np.random.default_rng(seed), []
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held.append(generator.permutation(rows)[:min(round(share * len(rows)), len(rows) - 1)])
    validation = np.sort(np.concatenate(held)) if held else np.empty(0, np.int64)
    return np.setdiff1d(np.arange(len(labels)), validation), validation
