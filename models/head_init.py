"""The start of a student's head: its outputs have the mean of the teacher's, and are spread as far around it.

Ours, not of any of the papers. Pooled features follow a ReLU and share a large common part, which a random head lacks:
losses of cosines then spend their first steps on it. The gradient of a cosine falls with the length of the output, so
these steps, along what all images have in common, make the outputs longer until none of the later ones can turn them.
docs/RESULTS.md has the measurements.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGES, AT_ONCE = 256, 64  # of the data, and in a forward pass; the same whatever a step's batch is


def last_linear(head: nn.Module) -> nn.Linear | None:
    """The linear layer that a head ends in; None if it ends in anything else, such as batch norm, or has no layer."""
    last = [head, *head.modules()][-1]
    return last if isinstance(last, nn.Linear) else None


@torch.no_grad()
def match_teacher(layer: nn.Linear, outputs: Tensor, targets: Tensor) -> None:
    """Scale and shift a linear layer so that its ``outputs`` become like ``targets``; both float [n, d].

    With mean m and spread r = sqrt(mean_i |x_i - m|^2) of each: W <- k W and b <- k b + m_t - k m_s, k = r_t / r_s. If
    all outputs, or all targets, are equal, only the mean is set.
    """
    s, t = outputs.double(), targets.double()
    m_s, m_t = s.mean(0), t.mean(0)
    r_s, r_t = ((x - m).square().sum(1).mean().sqrt() for x, m in ((s, m_s), (t, m_t)))
    k = torch.where((r_s > 0) & (r_t > 0), r_t / r_s.clamp_min(torch.finfo(s.dtype).tiny), 1.0)
    layer.weight.mul_(k)
    if layer.bias is not None:
        layer.bias.mul_(k).add_(m_t - k * m_s)
