"""Features in two dimensions: where `evaluate.py map` places each image."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from runtime.errors import UserError
from runtime.packages import need_package

MODULES = {"umap": ("umap", "umap-learn"), "tsne": ("sklearn.manifold", "scikit-learn")}  # and their packages
METHODS = ("pca", *MODULES)


def plane(features: Tensor, method: str = "pca", seed: int = 0) -> tuple[np.ndarray, float | None]:
    """float64 [n, 2], centred and with a root mean square length of 1; and, for ``pca``, the share of the variance that
    both axes hold.

    Features [n, d] are L2-normalised first, so that distances follow the cosine, as for k-NN. ``pca``: the two
    principal axes, each pointing where its largest entry is positive. ``umap`` and ``tsne`` are umap-learn's and
    scikit-learn's (McInnes et al., arXiv 1802.03426; van der Maaten and Hinton, JMLR 9, 2008), with their own settings
    and this ``seed``. Raises :class:`UserError` if the library is missing, or for fewer than 3 images.
    """
    if len(features) < 3:
        raise UserError(f"a map of {len(features)} images shows nothing; give at least 3")
    rows = torch.nn.functional.normalize(features.double(), dim=1).numpy()
    explained = None
    if method == "pca":
        points, explained = _pca(rows)
    elif method == "umap":
        points = library(method).UMAP(metric="cosine", random_state=seed,
                                      n_neighbors=min(15, len(rows) - 1)).fit_transform(rows)
    else:
        points = library(method).TSNE(random_state=seed, init="pca",
                                      perplexity=min(30.0, (len(rows) - 1) / 3)).fit_transform(rows)
    points = points - points.mean(0)
    return points / max(float(np.sqrt((points**2).sum(1).mean())), 1e-12), explained


def library(method: str) -> ModuleType | None:
    """The module that ``method`` needs; raises :class:`UserError` if it is missing."""
    if method not in MODULES:
        return None
    module, package = MODULES[method]
    return need_package(package, f"--method {method}", module=module, otherwise="use pca")


def _pca(rows: np.ndarray) -> tuple[np.ndarray, float]:
    centred = rows - rows.mean(0)
    values, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, :-3:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(0), range(axes.shape[1])])
    points = centred @ axes
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    return points, float(values[-2:].sum() / max(values.sum(), 1e-300))


def turned(points: np.ndarray, onto: np.ndarray) -> tuple[np.ndarray, float]:
    """``points`` [n, 2] rotated and reflected to lie nearest to ``onto``, both of :func:`plane` (orthogonal Procrustes,
    Schönemann 1966); and their agreement, the share of ``onto``'s variance that the rotated points explain
    if they may also be scaled, in [0, 1]."""
    left, sizes, right = np.linalg.svd(points.T @ onto / len(points))
    return points @ (left @ right), float(sizes.sum() ** 2)


def spread_out(points: np.ndarray, count: int) -> list[int]:
    """At most ``count`` of the points [n, 2], far from one another: the one nearest the centre, then repeatedly the one
    farthest from those chosen."""
    chosen = [int((points**2).sum(1).argmin())]
    nearest = ((points - points[chosen[0]]) ** 2).sum(1)
    while len(chosen) < min(count, len(points)) and nearest.max() > 0:
        chosen.append(int(nearest.argmax()))
        nearest = np.minimum(nearest, ((points - points[chosen[-1]]) ** 2).sum(1))
    return chosen
