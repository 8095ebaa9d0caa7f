"""How far a classifier's confidence can be trusted: expected calibration error and negative log likelihood."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def expected_calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Percent: the mean over bins of |accuracy - mean confidence|, weighted by the images in each.

    ``confidence`` [n] in [0, 1] is the largest probability, ``right`` bool [n] whether that class is the label. Bins
    are equally wide, (low, high], as in Guo et al., "On calibration of modern neural networks", ICML 2017, equation 3;
    empty bins are ignored.
    """
    confidence, right = confidence.double(), right.double()
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    place = torch.bucketize(confidence, edges).sub_(1).clamp_(0, bins - 1)      # [n]: (edges[b], edges[b + 1]]
    gap = torch.zeros(bins, dtype=torch.float64, device=confidence.device).index_add_(0, place, right - confidence)
    return 100 * float(gap.abs().sum()) / max(len(confidence), 1)
