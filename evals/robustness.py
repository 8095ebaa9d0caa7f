"""A linear head on out-of-distribution images: accuracy among the present classes, calibration, corruption errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from evals.calibration import expected_calibration_error

CHUNK = 4096
SEVERITIES = (1, 2, 3, 4, 5)
# AlexNet's top-1 error in percent on each corruption of ImageNet-C, mean over the severities, which normalises CE:
# Hendrycks and Dietterich, "Benchmarking neural network robustness to common corruptions and perturbations", ICLR 2019,
# with the decimals that the authors give (github.com/hendrycks/robustness).
ALEXNET = {
    "gaussian_noise": 88.6428, "shot_noise": 89.4468, "impulse_noise": 92.2640,
    "defocus_blur": 81.9880, "glass_blur": 82.6268, "motion_blur": 78.5948, "zoom_blur": 79.8360,
    "snow": 86.6816, "frost": 82.6572, "fog": 81.9324, "brightness": 56.4592,
    "contrast": 85.3204, "elastic_transform": 64.6056, "pixelate": 71.7840, "jpeg_compression": 60.6500,
}  # fmt: skip


def head_scores(logits: Callable[[Tensor], Tensor], features: Tensor, labels: np.ndarray, columns: np.ndarray,
                device: torch.device | str = "cpu") -> dict[str, float]:
    """Scores of a head on features [n, d] with labels int64 [n] that are all among the classes ``columns``, int64 [c].

    ``logits`` maps [b, d] on ``device`` to [b, C]. ``top1`` and ``top5`` in percent, ``ece`` in percent (15 bins) and
    ``nll`` in nats are those of a softmax over ``columns`` alone, as ImageNet-R and -A are scored (Hendrycks et al.,
    ICCV and CVPR 2021); ``top1_all`` is the top-1 among all C classes. Among equal largest
    logits the first class is predicted.
    """
    place = np.full(int(columns.max()) + 1, -1, dtype=np.int64)
    place[columns] = np.arange(len(columns))
    truth, local = torch.from_numpy(labels), torch.from_numpy(place[labels])
    chosen = torch.from_numpy(columns).to(device)
    parts: list[Tensor] = []
    for rows, label, here in zip(features.split(CHUNK), truth.split(CHUNK), local.split(CHUNK), strict=True):
        everywhere = logits(rows.to(device)).float()                            # [b, C]
        log_p = everywhere[:, chosen].double().log_softmax(1)                   # [b, c]
        label, here = label.to(device), here.to(device)
        right = log_p.argmax(1) == here
        first = log_p.topk(min(5, len(columns)), dim=1).indices
        right5 = (first == here[:, None]).any(1)
        right_all = everywhere.argmax(1) == label
        nll = -log_p.gather(1, here[:, None])[:, 0]
        parts.append(torch.stack([right, right5, right_all, nll, log_p.amax(1).exp()]).double().cpu())
    right, right5, right_all, nll, confidence = torch.cat(parts, 1)
    return {"top1": 100 * float(right.mean()), "top5": 100 * float(right5.mean()),
            "top1_all": 100 * float(right_all.mean()), "ece": expected_calibration_error(confidence, right),
            "nll": float(nll.mean())}


def corruption_errors(errors: Mapping[str, Mapping[int, float]]) -> tuple[dict[str, float], float | None]:
    """Each corruption's CE in percent, and their mean over AlexNet's fifteen, the mCE.

    ``errors``: top-1 error in percent by corruption and severity. CE is the sum of the errors over the severities,
    divided by AlexNet's. A corruption that lacks one of the five, or that AlexNet's table lacks (the four extra ones),
    has no CE; mCE is None unless all fifteen have one.
    """
    ce = {name: 100 * sum(by_severity[s] for s in SEVERITIES) / len(SEVERITIES) / ALEXNET[name]
          for name, by_severity in errors.items() if name in ALEXNET and set(SEVERITIES) <= set(by_severity)}
    whole = set(ALEXNET) <= set(ce)
    return ce, sum(ce[name] for name in ALEXNET) / len(ALEXNET) if whole else None
