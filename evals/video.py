"""Tracks objects through a video by features alone: propagates the masks of the first frame and scores them.

The protocol of Jabri et al. ("Space-Time Correspondence as a Contrastive Random Walk", NeurIPS 2020) with the numbers
of Caron et al. (DINO, ICCV 2021), and the measures of DAVIS (Perazzi et al., CVPR 2016; the 2017 challenge).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

BOUND = 0.008  # of the image's diagonal: how far apart boundaries may lie that still match
MULTIPLE = 64  # the sides that a network sees are multiples of it, in pixels
SCORES = {"cpu": 4 << 20, "cuda": 64 << 20}  # at a time


@dataclass(frozen=True)
class Propagation:
    """How labels are propagated. Defaults are DINO's: each place takes the labels of the ``top_k`` places nearest to it
    by exp(cosine / ``temperature``), of those within ``radius`` places in the first frame and the ``context`` last."""

    top_k: int = 5
    context: int = 7
    radius: int = 12
    temperature: float = 0.1

    def step(self, target: Tensor, features: Tensor, labels: Tensor) -> Tensor:
        """Labels [C, h, w] of a frame with features [d, h, w] from frames with [f, d, h, w] and labels [f, C, h, w].

        Features have length 1. Products are made a few rows of places at a time.
        """
        frames, depth, h, w = features.shape
        columns = torch.arange(w, device=target.device)
        near = (columns[:, None] - columns[None]).abs() <= self.radius                   # [w of query, w of source]
        rows_at_once = max(1, SCORES[target.device.type] // (w * frames * min(h, 2 * self.radius + 1) * w))
        parts = []
        for first in range(0, h, rows_at_once):
            last = min(first + rows_at_once, h)
            low, high = max(0, first - self.radius), min(h, last + self.radius)
            there = features[:, :, low:high].permute(1, 0, 2, 3).flatten(1)              # [d, f r w]
            scores = target[:, first:last].flatten(1).T @ there / self.temperature       # [q, f r w]
            lines = torch.arange(low, high, device=target.device)
            close = (torch.arange(first, last, device=target.device)[:, None] - lines[None]).abs() <= self.radius
            allowed = close[:, None, None, :, None] & near[None, :, None, None, :]       # [rows, w, 1, r, w]
            allowed = allowed.expand(-1, -1, frames, -1, -1).reshape(scores.shape)
            best, ids = scores.masked_fill_(~allowed, -torch.inf).topk(min(self.top_k, scores.shape[1]), dim=1)
            taken = labels[:, :, low:high].permute(1, 0, 2, 3).flatten(1)[:, ids]        # [C, q, k]
            parts.append((taken * best.softmax(dim=1)).sum(2))
        return torch.cat(parts, dim=1).unflatten(1, (h, w))


def follow(frames: Iterable[Tensor], mask: np.ndarray, encode: Callable[[Tensor], Tensor], how: Propagation,
           short_side: int = 480, device: torch.device | str = "cpu") -> Iterator[np.ndarray]:
    """The mask of each frame but the first, uint8 [H, W], 0 for no object.

    ``frames``: uint8 [3, H, W], of one size. ``mask``: uint8 [H, W], the objects of the first. ``encode``: float images
    [1, 3, h', w'] in [0, 255] to features [1, d, h, w]. As in DINO's evaluation, a network sees frames of
    ``short_side`` pixels, the other side cut to a multiple of 64, and labels, soft at the features' size, are enlarged,
    each object's brought to [0, 1], and the largest taken.
    """
    past: deque[tuple[Tensor, Tensor]] = deque(maxlen=how.context)
    first = size = None
    for frame in frames:
        if size is None:
            size = seen_size(*frame.shape[1:], short_side)
        seen = F.interpolate(frame[None].to(device, torch.float32), size=size, mode="bilinear", align_corners=False)
        features = F.normalize(encode(seen)[0].float(), dim=0)                           # [d, h, w]
        if first is None:
            first = features, one_hot(mask, features.shape[1:], device)
            continue
        context = [first, *past]
        labels = how.step(features, *(torch.stack(x) for x in zip(*context, strict=True)))
        past.append((features, labels))
        yield as_mask(labels, size, frame.shape[1:])


def seen_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width that a network sees: the shorter ``short_side``, the longer in proportion, down to a multiple
    of 64 but no less than the shorter."""
    longer = max(short_side, int(short_side * max(height, width) / min(height, width)) // MULTIPLE * MULTIPLE)
    return (short_side, longer) if width >= height else (longer, short_side)


def one_hot(mask: np.ndarray, size: tuple[int, int], device: torch.device | str) -> Tensor:
    """Float [1 + objects, h, w] of a mask [H, W], by nearest pixels."""
    small = torch.from_numpy(np.array(Image.fromarray(mask).resize((size[1], size[0]), Image.Resampling.NEAREST)))
    return (small == torch.arange(int(mask.max()) + 1)[:, None, None]).float().to(device)


def as_mask(labels: Tensor, seen: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """uint8 ``size`` of soft labels [C, h, w]."""
    large = F.interpolate(labels[None], size=seen, mode="bilinear", align_corners=False)[0]
    low, high = large.amin((1, 2), keepdim=True), large.amax((1, 2), keepdim=True)
    spread = (high - low).clamp_min(torch.finfo(large.dtype).tiny)
    large = torch.where(high > 0, (large - low) / spread, large)
    winner = Image.fromarray(large.argmax(0).byte().cpu().numpy())
    return np.array(winner.resize((size[1], size[0]), Image.Resampling.NEAREST))


def region(masks: Tensor, truth: Tensor) -> Tensor:
    """J: intersection over union, float64 [...], of bool masks [..., H, W]; 1 where both are empty."""
    both, either = ((masks & truth).sum((-2, -1)), (masks | truth).sum((-2, -1)))
    return torch.where(either > 0, both.double() / either, 1.0)


def boundary(masks: Tensor, truth: Tensor, bound: float = BOUND) -> Tensor:
    """F: harmonic mean of the boundaries' precision and recall, float64 [n], of bool masks [n, H, W].

    A boundary pixel counts as found if one of the other mask's lies within a disk whose radius is ``bound`` of the
    diagonal, rounded up. An empty boundary has precision (or recall) 1 if the other is empty or not, as in the toolkit.
    """
    radius = int(np.ceil(bound * np.linalg.norm(masks.shape[-2:])))
    ours, theirs = outline(masks), outline(truth)
    count, total = ours.sum((1, 2)).double(), theirs.sum((1, 2)).double()
    precision = torch.where(count > 0, (ours & dilate(theirs, radius)).sum((1, 2)) / count, 1.0)
    recall = torch.where(total > 0, (theirs & dilate(ours, radius)).sum((1, 2)) / total, 1.0)
    sums = precision + recall
    return torch.where(sums > 0, 2 * precision * recall / sums, 0.0)


def outline(masks: Tensor) -> Tensor:
    """Pixels of bool masks [n, H, W] that differ from the one to the right, below, or below to the right."""
    edge = torch.zeros_like(masks)
    edge[:, :, :-1] |= masks[:, :, :-1] ^ masks[:, :, 1:]
    edge[:, :-1] |= masks[:, :-1] ^ masks[:, 1:]
    edge[:, :-1, :-1] |= masks[:, :-1, :-1] ^ masks[:, 1:, 1:]
    return edge


def dilate(masks: Tensor, radius: int) -> Tensor:
    """Pixels within ``radius`` of one that is set, in bool masks [n, H, W]."""
    x = torch.arange(-radius, radius + 1, device=masks.device)
    disk = (x[:, None].square() + x[None].square() <= radius ** 2).float()
    return F.conv2d(masks[:, None].float(), disk[None, None], padding=radius)[:, 0] > 0.5


def statistics(values: np.ndarray) -> dict[str, float]:
    """Mean, recall (share of frames above one half) and decay (first quarter less last) of an object's frames [f]."""
    ends = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(int)
    first, last = values[:ends[1] + 1], values[ends[3]:]
    return {"mean": float(values.mean()), "recall": float((values > 0.5).mean()),
            "decay": float(first.mean() - last.mean())}


def measure(masks: Iterable[np.ndarray], truth: Iterable[np.ndarray], objects: int, device: torch.device | str = "cpu",
            ) -> dict[str, list[list[float]]]:
    """``J`` and ``F`` of each object in each frame: lists [objects][frames] of masks uint8 [H, W] and true ones."""
    found: dict[str, list[Tensor]] = {"J": [], "F": []}
    numbers = torch.arange(1, objects + 1, device=device)[:, None, None]
    for ours, theirs in zip(masks, truth, strict=True):
        pair = [torch.from_numpy(x).to(device)[None] == numbers for x in (ours, theirs)]
        found["J"].append(region(*pair).cpu())
        found["F"].append(boundary(*pair).cpu())
    return {name: torch.stack(values, dim=1).tolist() for name, values in found.items()}


def summary(objects: Sequence[dict[str, list[float]]]) -> dict[str, float]:
    """In percent the mean of J and F, and mean, recall and decay of each, averaged over objects.

    ``objects``: ``J`` and ``F`` of the frames of each object that are measured; DAVIS leaves out a video's first and
    last frame.
    """
    found = {}
    for name in ("J", "F"):
        rows = [statistics(np.array(one[name])) for one in objects]
        found |= {f"{name} {what}": 100 * float(np.mean([row[what] for row in rows])) for what in rows[0]}
    return {"J&F mean": (found["J mean"] + found["F mean"]) / 2, **found}
