"""Whether a network has learnt anything: compares its features of a few images with those of an untrained copy."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from search.exact import top_k

K, TEMPERATURE = 10, 0.07


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred features [n, d]; between 1 and min(n, d).

    Roy and Vetterli, "The effective rank", EUSIPCO 2007, definition 1.
    """
    return entropy_rank(torch.linalg.svdvals((features - features.mean(0)).double()))


def entropy_rank(values: Tensor) -> float:
    """exp of the entropy of singular values [m] brought to a sum of one."""
    shares = values / values.sum().clamp_min(1e-300)
    return float(torch.special.entr(shares).sum().exp())


def leave_one_out(features: Tensor, labels: Tensor) -> float:
    """Percent of images [n, d] whose weighted 10-NN vote among all the others gives their own label."""
    rows = F.normalize(features, dim=1)
    cosine, ids = top_k(rows, rows, K, self_offset=0)
    votes = torch.zeros(len(rows), int(labels.max()) + 1).scatter_add_(
        1, labels[ids], ((cosine - cosine[:, :1]) / TEMPERATURE).exp())
    return 100 * float((votes.argmax(1) == labels).double().mean())


def same_image(first: Tensor, second: Tensor) -> float:
    """Percent of images whose second view [n, d] is the nearest of all second views to their first view [n, d].

    Which crop belongs to which image is what contrastive pretraining learns; it needs no label.
    """
    _, ids = top_k(F.normalize(first, dim=1), F.normalize(second, dim=1), 1)
    return 100 * float((ids[:, 0] == torch.arange(len(first))).double().mean())


def verdict(trained: float, fresh: float, count: int) -> str:
    """Whether ``trained`` percent of ``count`` images is more than ``fresh`` percent, by three standard errors."""
    share = min(max((trained + fresh) / 200, 1 / count), 1 - 1 / count)
    if (trained - fresh) / 100 > 3 * math.sqrt(2 * share * (1 - share) / count):
        return "it has learnt"
    return "no better than fresh weights: untrained, damaged, or made for other images"
