"""Optimizers by name, their parameter groups, and LARS."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

OPTIMIZERS = ("sgd", "lars", "adamw")
DECAYED = ("auto", "all", "kernels")
TRUST = 0.001  # LARS's coefficient, in SwAV, MoCo v3 and solo-learn


def build_optimizer(name: str, parameters: Iterable[Tensor], lr: float, momentum: float, weight_decay: float,
                    decayed: str = "auto") -> torch.optim.Optimizer:
    """The optimizer ``name`` of :data:`OPTIMIZERS` over those ``parameters`` that train, in one fused kernel.

    ``decayed``: what ``weight_decay`` is for: ``all``, or ``kernels``, the parameters of two and more dimensions, so
    not biases and the scales of norms; ``auto`` is all for sgd, the paper's, and kernels for the others. ``momentum``
    is AdamW's first beta.
    """
    parameters = [p for p in parameters if p.requires_grad]
    kernels_only = decayed == "kernels" or (decayed == "auto" and name != "sgd")
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if kernels_only or name == "lars":
        kernels, rest = [p for p in parameters if p.ndim > 1], [p for p in parameters if p.ndim <= 1]
        groups = [{"params": kernels, "adapted": True}, {"params": rest, "adapted": False,
                                                         "weight_decay": 0.0 if kernels_only else weight_decay}]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr, betas=(momentum, 0.999), weight_decay=weight_decay, fused=True)
    kind = {"sgd": torch.optim.SGD, "lars": LARS}[name]
    return kind(groups, lr, momentum, weight_decay=weight_decay, fused=True)


class LARS(torch.optim.SGD):
    """Layer-wise adaptive rate scaling: You, Gitman and Ginsburg, arXiv 1708.03888, equation 6 and algorithm 1.

        g <- trust * |w| / (|g| + decay |w|) * (g + decay w);   v <- momentum v + g;   w <- w - rate v

    as SwAV (apex's LARC) and solo-learn have it; MoCo v3 divides by |g + decay w| instead. It is for the groups with
    ``adapted``, the kernels; a group without (biases and norms) is plain SGD's. Where |w| or |g| is zero the factor
    is 1. The norms stay on the device.
    """

    def __init__(self, params: Any, lr: float, momentum: float = 0.9, weight_decay: float = 0.0, trust: float = TRUST,
                 fused: bool | None = None) -> None:
        super().__init__(params, lr, momentum, weight_decay=weight_decay, fused=fused)
        for group in self.param_groups:
            group.setdefault("adapted", True)
            group["trust"], group["decay"] = trust, group["weight_decay"]
            group["weight_decay"] = 0.0 if group["adapted"] else group["decay"]  # SGD must not decay once more

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if group["adapted"] and weights:
                adapt(weights, [p.grad for p in weights], group["trust"], group["decay"],
                      getattr(self, "grad_scale", None))
        return super().step(closure)


def adapt(weights: Sequence[Tensor], gradients: Sequence[Tensor], trust: float, decay: float,
          scale: Tensor | None = None) -> None:
    """Replace each gradient in place by LARS's. ``scale``: what a gradient scaler has multiplied them by."""
    scale = gradients[0].new_ones(()) if scale is None else scale.to(gradients[0].device)
    w = torch.stack(torch._foreach_norm(weights))                                       # [number of tensors]
    g = torch.stack(torch._foreach_norm(gradients)) / scale
    rate = torch.where((w > 0) & (g > 0), trust * w / (g + decay * w), 1.0)
    torch._foreach_add_(gradients, torch._foreach_mul(weights, scale * decay))
    torch._foreach_mul_(gradients, list(rate.unbind()))
