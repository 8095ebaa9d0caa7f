"""Whether a network has learnt anything: compares its features of a few images with those of an untrained copy."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from search.exact import top_k

K, TEMPERATURE = 10, 0.07
ALIKE = 0.95  # mean cosine of two images from which their features hardly differ
GAIN = 5.0  # percentage points over fresh weights; a network that gains less is of no practical use over them
SURE = 3.0  # standard errors


def effective_rank(features: Tensor) -> float:
    """exp of the entropy of the normalised singular values of centred features [n, d]; between 1 and min(n, d).

    Roy and Vetterli, "The effective rank", EUSIPCO 2007, definition 1.
    """
    return entropy_rank(torch.linalg.svdvals((features - features.mean(0)).double()))


def entropy_rank(values: Tensor) -> float:
    """exp of the entropy of singular values [m] brought to a sum of one."""
    shares = values / values.sum().clamp_min(1e-300)
    return float(torch.special.entr(shares).sum().exp())


def leave_one_out(features: Tensor, labels: Tensor) -> Tensor:
    """Whether the weighted 10-NN vote among all other images [n, d] gives an image's own label, bool [n]."""
    rows = F.normalize(features, dim=1)
    cosine, ids = top_k(rows, rows, K, self_offset=0)
    votes = torch.zeros(len(rows), int(labels.max()) + 1).scatter_add_(
        1, labels[ids], ((cosine - cosine[:, :1]) / TEMPERATURE).exp())
    return votes.argmax(1) == labels


def same_image(first: Tensor, second: Tensor) -> Tensor:
    """Whether an image's second view [n, d] is the nearest of all second views to its first view [n, d], bool [n].

    Which crop belongs to which image is what contrastive pretraining learns; it needs no label.
    """
    _, ids = top_k(F.normalize(first, dim=1), F.normalize(second, dim=1), 1)
    return ids[:, 0] == torch.arange(len(first))


def mean_cosine(features: Tensor) -> float:
    """The mean cosine of the features [n, d] of two different images."""
    rows = F.normalize(features.double(), dim=1)
    return float((rows.sum(0).square().sum() - len(rows)) / (len(rows) * (len(rows) - 1)))


def gain(trained: Tensor, fresh: Tensor) -> tuple[float, float]:
    """How many percentage points more of the images ``trained`` [n] gets right than ``fresh`` [n], and the standard
    error.

    Both look at the same images, so only those count that one of them gets right and the other does not: b and c of n.
    The difference is (b - c) / n, its variance (b + c - (b - c)^2 / n) / n^2, with half an image more in each of the
    four cells, so that few images without any difference do not look like certainty (Agresti and Min, "Simple improved
    confidence intervals for comparing matched proportions", Statistics in Medicine 24, 2005).
    """
    n, b, c = len(trained) + 2, int((trained & ~fresh).sum()) + 0.5, int((fresh & ~trained).sum()) + 0.5
    return 100 * (b - c) / n, 100 * math.sqrt(b + c - (b - c) ** 2 / n) / n


def verdict(trained: Tensor, fresh: Tensor, cosine: float) -> str:
    """What the images that a network [n] and its copy with ``fresh`` weights [n] get right say of it, in words.

    With :func:`gain` and three standard errors: it has learnt if the gain is surely above 0; it is no better than fresh
    weights if the gain is surely below ``GAIN``; between, the images are too few to tell.

    If it is not better, the :func:`mean_cosine` tells networks that have seen few steps from others: it is 0.69 to 0.99
    with fresh weights, 0.98 to 1.00 after 6 to 37 steps of CoSS, and 0.34 to 0.81 in trained networks on images like
    theirs (64 pixels; the demo set and CIFAR-10).
    """
    points, error = gain(trained, fresh)
    if points > SURE * error:
        return "it has learnt"
    alike = f"the features of different images hardly differ (mean cosine {cosine:.3f})" if cosine > ALIKE else ""
    if points + SURE * error >= GAIN:
        return (f"{len(trained):,} images are too few to tell: {points:.1f} ± {SURE * error:.1f} points better than "
                "fresh weights; give more (--images)" + f"; but {alike}, as after too brief a training" * bool(alike))
    return "no better than fresh weights: " + (f"untrained or trained too briefly, since {alike}" if alike else
                                               "trained too briefly, damaged, or made for other images")
