"""Features of a whole data set in the order of its indices, whatever the number of processes and workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from runtime.device import Process, agree, all_gather, barrier, gather_objects
from runtime.errors import UserError
from runtime.state import save_json, write_atomic

Loader = Iterable[tuple[tuple[Tensor, ...], Tensor, Any]]  # views, indices, bad images


def extract(encoder: nn.Module, loader_of: Callable[[Sequence[int]], Loader], count: int, process: Process,
            label: str, check: Callable[[Any], None]) -> Tensor:
    """Features [count, d] float32 on the CPU, row i belonging to image i, on every rank.

    ``loader_of(indices)`` gives batches ``(views, indices, bad)`` of those images; each rank takes a contiguous
    share. ``check`` is called with each batch before it is used. The encoder is run in evaluation mode and put
    back as it was. Raises :class:`UserError` that names the first image whose features are not finite.
    """
    share = -(-count // process.world_size)
    mine = range(min(process.rank * share, count), min((process.rank + 1) * share, count))
    was_training = encoder.training
    encoder.eval()
    parts: list[Tensor] = []
    with torch.inference_mode(), tqdm(total=len(mine), desc=label, unit="img", leave=False,
                                      disable=None if process.is_main else True) as bar:
        problem = None
        try:
            for batch in loader_of(mine):
                check(batch)
                images = batch[0][0].to(process.device, non_blocking=True)
                parts.append(encoder(images).float().cpu())
                bar.update(len(images))
        except UserError as error:
            problem = str(error)
    agree(problem)  # a broken image on one rank ends them all, before the others wait for it
    encoder.train(was_training)
    features = _gather(parts, share, count, process)
    broken = torch.nonzero(~torch.isfinite(features).all(dim=1)).flatten()
    if len(broken):
        raise UserError(f"{label}: the features of {len(broken)} images are not finite, image {int(broken[0])} first; "
                        "look at that image, or at the checkpoint")
    return features


def cached(folder: Path | None, identity: Mapping[str, Any], process: Process,
           compute: Callable[[], Tensor]) -> Tensor:
    """``compute()`` [n, d], or the same from ``folder`` if features of exactly this ``identity`` lie there."""
    if folder is None:
        return compute()
    text = json.dumps(dict(identity), sort_keys=True)
    path = folder / f"features-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npy"
    # Every rank must take the same way, also where the folder is not shared between machines.
    if all(gather_objects(path.exists() and path.with_suffix(".json").exists())):
        return torch.from_numpy(np.load(path, allow_pickle=False))
    features = compute()
    if process.is_main:
        write_atomic(path, lambda file: np.save(file, features.numpy(), allow_pickle=False))
        save_json(dict(identity), path.with_suffix(".json"))
    barrier()
    return features


def _gather(parts: list[Tensor], share: int, count: int, process: Process) -> Tensor:
    """Every rank's rows, padded to one length for the collective and cut again."""
    if process.world_size == 1:
        return torch.cat(parts)
    width = torch.tensor([parts[0].shape[1] if parts else 0], device=process.device)
    width = int(all_gather(width).max())
    rows = torch.zeros(share, width)
    if parts:
        mine = torch.cat(parts)
        rows[:len(mine)] = mine
    return all_gather(rows.to(process.device)).cpu()[:count]
