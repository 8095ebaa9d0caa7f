"""Whether a network has learnt anything: compares its features of a few images with those of an untrained copy."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from search.exact import top_k

K, TEMPERATURE = 10, 0.07
ALIKE = 0.95  # mean cosine of two images from which their features hardly differ


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


def mean_cosine(features: Tensor) -> float:
    """The mean cosine of the features [n, d] of two different images."""
    rows = F.normalize(features.double(), dim=1)
    return float((rows.sum(0).square().sum() - len(rows)) / (len(rows) * (len(rows) - 1)))


def verdict(trained: float, fresh: float, count: int, cosine: float) -> str:
    """Whether ``trained`` percent of ``count`` images is more than ``fresh`` percent, by three standard errors.

    If not, the :func:`mean_cosine` tells networks that have seen few steps from others: it is 0.69 to 0.99 with fresh
    weights, 0.98 to 1.00 after 6 to 37 steps of CoSS, and 0.34 to 0.81 in trained networks on images like theirs (64
    pixels; the demo set and CIFAR-10).
    """
    share = min(max((trained + fresh) / 200, 1 / count), 1 - 1 / count)
    if (trained - fresh) / 100 > 3 * math.sqrt(2 * share * (1 - share) / count):
        return "it has learnt"
    if cosine > ALIKE:
        return ("no better than fresh weights: untrained or trained too briefly, since the features of different "
                f"images hardly differ (mean cosine {cosine:.3f})")
    return "no better than fresh weights: trained too briefly, damaged, or made for other images"
