"""The metrics of the transfer benchmarks: top-1, mean per class, VOC 2007's 11-point mean average precision."""

from __future__ import annotations

import numpy as np


def top1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Percent of the images whose predicted class, int64 [n], is their label, int64 [n]."""
    return 100.0 * float(np.mean(predicted == labels))


def mean_per_class(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the classes that occur among the labels of each one's percent right; arguments as in :func:`top1`."""
    right = np.bincount(labels, weights=predicted == labels)
    count = np.bincount(labels)
    return 100.0 * float(np.mean(right[count > 0] / count[count > 0]))


def average_precision_11(scores: np.ndarray, labels: np.ndarray) -> float:
    """VOC 2007's average precision in percent: the mean over recalls 0, 0.1 … 1 of the best precision there or beyond.

    ``scores`` [n] rank the images, ``labels`` [n] are 1 (there), -1 (not there) or 0 (only 'difficult' objects, which
    count neither way). Equal scores are one threshold, so the order of the images does not matter. NaN where no
    label is 1. Everingham et al., "The PASCAL VOC Challenge", IJCV 2010, section 4.2.
    """
    counted = labels != 0
    scores, positive = scores[counted], labels[counted] == 1
    if not positive.any():
        return float("nan")
    order = np.argsort(-scores, kind="stable")
    scores, positive = scores[order], positive[order]
    last = np.append(scores[1:] != scores[:-1], True)  # the last image of each threshold
    hits = np.cumsum(positive)[last]
    precision = hits / (np.flatnonzero(last) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]  # at this threshold or a lower one
    # In integers: 3 of 10 reach recall 0.3, which 0.1 * 3 as a float exceeds.
    first = [int(np.argmax(10 * hits >= tenth * hits[-1])) for tenth in range(11)]
    return 100.0 * float(np.mean(best[first]))


def mean_average_precision_11(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean of :func:`average_precision_11` over the columns of [n, C] that have an image to find."""
    each = [average_precision_11(scores[:, c], labels[:, c]) for c in range(labels.shape[1])]
    return float(np.nanmean(each))
