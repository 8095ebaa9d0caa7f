"""Few-shot classification of frozen features in episodes of a few classes with a few labelled images each.

An episode draws ``ways`` classes, ``shots`` labelled images of each and ``queries`` others to test. Heads: the nearest
class mean by Euclidean distance (Snell, Swersky and Zemel, "Prototypical networks for few-shot learning", NeurIPS 2017;
Ericsson et al., CVPR 2021, use it with 5 ways, 15 queries and 600 episodes), and logistic regression on features of
length 1 (Tian et al., "Rethinking few-shot image classification", ECCV 2020).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evals.transfer import logistic_regression
from runtime.errors import UserError

HEADS = ("centroid", "logistic")
NUMBERS_AT_ONCE = 2**26  # of the features of one batch of episodes


@dataclass(frozen=True)
class FewShot:
    """Percent right, mean over the episodes, and half the width of its 95 % interval."""

    head: str
    ways: int
    shots: int
    queries: int
    episodes: int
    accuracy: float
    interval: float


def episodes(labels: np.ndarray, ways: int, each: int, count: int, seed: int, label: str = "few-shot") -> np.ndarray:
    """Images of ``count`` episodes, int64 [count, ways, each]: ``ways`` classes, ``each`` different images of each.

    Drawn without replacement among the classes of ``labels`` [n] that have ``each`` images. The same seed draws the
    same episodes. Raises :class:`UserError` if fewer than ``ways`` classes have so many.
    """
    groups = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    groups = [group for group in groups if len(group) >= each]
    if len(groups) < ways:
        raise UserError(f"{label}: {ways} classes an episode need {each} images each, and {len(groups)} classes have "
                        "so many; give fewer --ways, --shots or --queries")
    random = np.random.default_rng(seed)
    chosen = np.empty((count, ways, each), dtype=np.int64)
    for episode in chosen:
        for row, group in zip(episode, random.choice(len(groups), ways, replace=False), strict=True):
            row[:] = random.choice(groups[group], each, replace=False)
    return chosen


def few_shot(features: Tensor, labels: np.ndarray, head: str = "centroid", ways: int = 5, shots: int = 5,
             queries: int = 15, count: int = 600, seed: int = 0, device: torch.device | str = "cpu",
             label: str = "few-shot", progress: bool = False) -> FewShot:
    """Accuracy over ``count`` episodes of features [n, d] with labels int64 [n]; see the module for the rest."""
    images = torch.from_numpy(episodes(labels, ways, shots + queries, count, seed))
    right = []
    with tqdm(total=count, desc=label, unit="episode", leave=False, disable=None if progress else True) as bar:
        for batch in _batches(images, features.shape[1]):
            rows = features[batch.flatten()].float().view(*batch.shape, -1).to(device)  # [e, ways, shots + queries, d]
            support, query = rows[:, :, :shots], rows[:, :, shots:]
            right.append((nearest_centroid if head == "centroid" else _logistic)(support, query))
            bar.update(len(batch))
    shares = 100 * torch.cat(right).double().cpu()
    interval = 1.96 * float(shares.std()) / math.sqrt(count) if count > 1 else float("nan")
    return FewShot(head, ways, shots, queries, count, float(shares.mean()), interval)


def nearest_centroid(support: Tensor, query: Tensor) -> Tensor:
    """Accuracy [e] of queries [e, ways, q, d] by the nearest class mean of the support [e, ways, shots, d]."""
    ways, count = query.shape[1:3]
    distance = torch.cdist(query.flatten(1, 2), support.mean(2),
                           compute_mode="donot_use_mm_for_euclid_dist")          # [e, ways * q, ways]
    truth = torch.arange(ways, device=query.device).repeat_interleave(count)
    return (distance.argmin(2) == truth).double().mean(1)


def _logistic(support: Tensor, query: Tensor) -> Tensor:
    """The same by logistic regression, penalty 1, on features of length 1."""
    model = logistic_regression()
    support, query = (F.normalize(rows, dim=3).cpu().numpy() for rows in (support, query))
    ways, shots, width = support.shape[1:]
    truth = [np.repeat(np.arange(ways), count) for count in (shots, query.shape[2])]
    return torch.tensor([float(np.mean(model(max_iter=1000).fit(few.reshape(-1, width), truth[0]).predict(
        asked.reshape(-1, width)) == truth[1])) for few, asked in zip(support, query, strict=True)])


def _batches(images: Tensor, width: int) -> Iterator[Tensor]:
    return iter(images.split(max(1, NUMBERS_AT_ONCE // (images[0].numel() * width))))
