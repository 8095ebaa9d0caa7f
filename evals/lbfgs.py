"""Logistic regressions that differ in their weight decay, solved side by side by L-BFGS on all rows at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from evals.head_grid import Heads, Scale
from runtime.device import free_memory

MEMORY, HALVINGS, ARMIJO, NOISE = 10, 20, 1e-4, 1e-7
LOGITS = 1 << 25  # numbers of one product on the CPU and on a GPU

Objective = Callable[[Tensor], tuple[Tensor, Tensor]]  # [H, P] -> values float64 [H], gradients [H, P]


def lbfgs_heads(features: Tensor, labels: Tensor, num_classes: int, decays: Sequence[float], *, iterations: int = 200,
                tolerance: float = 1e-5, device: torch.device | str = "cpu", progress: bool = False) -> Heads:
    """One head for each of ``decays``, the minimum of  mean cross-entropy + decay / 2 * |weight|^2  on scaled features.

    The bias is free. features [n, d] of any float type, labels int64 [n]. scikit-learn's LogisticRegression(C) is
    decay = 1 / (n C). A head is done when no entry of its gradient exceeds ``tolerance``.
    """
    device, scale = torch.device(device), Scale.of(features)
    heads, width = len(decays), features.shape[1]
    if device.type != "cpu" and 2 * features.numel() * 4 < free_memory(device):
        features = features.to(device)
    decay = torch.tensor(decays, device=device, dtype=torch.float32)
    rows = max(1, LOGITS // (heads * num_classes))

    def objective(theta: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = theta[:, :num_classes * width].reshape(-1, width), theta[:, num_classes * width:]
        value = 0.5 * decay.double() * weight.view(heads, -1).double().square().sum(1)
        slope = torch.zeros_like(weight), torch.zeros_like(bias)
        for start in range(0, len(labels), rows):
            x = scale(features[start:start + rows].to(device))                                    # [b, d]
            truth = labels[start:start + rows].to(device)
            logits = (x @ weight.T).view(len(x), heads, num_classes) + bias                       # [b, H, C]
            normaliser = logits.logsumexp(-1, keepdim=True)
            true = logits.gather(-1, truth[:, None, None].expand(-1, heads, 1))
            value += (normaliser - true).double().sum(0)[:, 0] / len(labels)
            error = logits.sub_(normaliser).exp_()
            error.scatter_add_(-1, truth[:, None, None].expand(-1, heads, 1), -torch.ones_like(true))
            slope[0].addmm_(error.view(len(x), -1).T, x, alpha=1 / len(labels))
            slope[1].add_(error.sum(0), alpha=1 / len(labels))
        gradient = torch.cat([slope[0].view(heads, -1) + decay[:, None] * weight.view(heads, -1), slope[1]], dim=1)
        return value, gradient

    theta = torch.zeros(heads, num_classes * (width + 1), device=device)
    theta = minimise(objective, theta, iterations, tolerance, progress)
    weight, bias = theta[:, :num_classes * width], theta[:, num_classes * width:]
    return Heads(weight.reshape(heads, num_classes, width), bias.contiguous(), scale)


def minimise(objective: Objective, theta: Tensor, iterations: int, tolerance: float, progress: bool = False) -> Tensor:
    """Minimises each row of ``theta`` [H, P] by its own convex objective (Nocedal and Wright, Numerical
    Optimization, algorithm 7.5 with backtracking); a row has its own memory and step length."""
    value, gradient = objective(theta)
    steps: list[Tensor] = []
    changes: list[Tensor] = []
    active = torch.ones(len(theta), dtype=torch.bool, device=theta.device)
    for _ in tqdm(range(iterations), desc="L-BFGS", leave=False, disable=None if progress else True):
        active &= gradient.abs().amax(1) > tolerance
        if not active.any():
            break
        direction = -_apply_inverse(gradient, steps, changes)
        slope = (direction * gradient).sum(1)
        direction = torch.where((slope < 0)[:, None], direction, -gradient)
        slope = (direction * gradient).sum(1).double()
        length = active.to(theta.dtype)
        if not steps:
            length = length / gradient.norm(dim=1).clamp_min(1)
        for _ in range(HALVINGS):
            new_value, new_gradient = objective(theta + length[:, None] * direction)
            good = new_value <= value + ARMIJO * length * slope + NOISE * (1 + value.abs())
            if good.all():
                break
            length = torch.where(good, length, length / 2)
        active &= good  # a row whose steps no longer help has reached the precision limit
        kept = good[:, None]
        step = torch.where(kept, length[:, None] * direction, 0)
        steps.append(step)
        changes.append(torch.where(kept, new_gradient - gradient, 0))
        steps, changes = steps[-MEMORY:], changes[-MEMORY:]
        theta = theta + step
        value, gradient = torch.where(good, new_value, value), torch.where(kept, new_gradient, gradient)
    return theta


def _apply_inverse(gradient: Tensor, steps: list[Tensor], changes: list[Tensor]) -> Tensor:
    """The product of each row's approximate inverse Hessian with its gradient; pairs without curvature are left out."""
    q, pairs = gradient.clone(), []
    gain = torch.ones(len(gradient), 1, device=gradient.device)
    for s, y in zip(steps, changes, strict=True):
        curvature, square = (s * y).sum(1, keepdim=True), y.square().sum(1, keepdim=True)
        usable = curvature > 1e-10 * square
        pairs.append((s, y, torch.where(usable, 1 / curvature.clamp_min(1e-30), 0)))
        gain = torch.where(usable, curvature / square.clamp_min(1e-30), gain)
    factors = []
    for s, y, inverse in reversed(pairs):
        factor = inverse * (s * q).sum(1, keepdim=True)
        q = q - factor * y
        factors.append(factor)
    q = gain * q
    for (s, y, inverse), factor in zip(pairs, reversed(factors), strict=True):
        q = q + (factor - inverse * (y * q).sum(1, keepdim=True)) * s
    return q
