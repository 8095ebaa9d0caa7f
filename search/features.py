"""Features of a data set in the order of its indices, for any number of processes and workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from runtime.agreement import together
from runtime.device import Process, all_gather, gather_objects
from runtime.errors import Damaged, NotFinite, UserError
from runtime.npy import CHECKSUMS, Checksums, check_rows, map_array, read_checksums, whole_json
from runtime.state import save_json
from search.rowfile import RowFile, one_writer, open_rows

Loader = Iterable[tuple[tuple[Tensor, ...], Tensor, Any]]  # views, indices, bad images
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.int16}  # numpy has no bfloat16: its bits
WRITTEN = 32 << 20  # bytes between two writes
LEFT_OUT = -float("inf")  # each number of a row that is left out; no network gives such rows


@dataclass(frozen=True)
class Keep:
    """Where features are cached: a file for each ``identity`` (their images, network and settings, as JSON values) and
    ``dtype`` (a key of STORED), in a ``folder`` that all ranks share. ``width``: numbers per image."""

    folder: Path
    identity: Mapping[str, Any]
    width: int
    dtype: str = "float32"

    @property
    def record(self) -> dict[str, Any]:
        """The record that is stored beside the file."""
        return {**self.identity, "dtype": self.dtype} if self.dtype != "float32" else dict(self.identity)

    @property
    def path(self) -> Path:
        """The .npy file."""
        text = json.dumps(self.record, sort_keys=True)
        return Path(self.folder) / f"features-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npy"


def extract(encoder: nn.Module, loader_of: Callable[[Sequence[int]], Loader], count: int, process: Process,
            label: str, check: Callable[[Any], None], keep: Keep | None = None, leave_out: bool = False) -> Tensor:
    """Features [count, d] on the CPU, row i belonging to image i, on every rank.

    ``loader_of(indices)`` yields batches ``(views, indices, bad)`` of those images in order; each rank takes a
    contiguous share. ``check`` is called with each batch before it is used. The encoder runs in evaluation mode, and
    its mode is restored. Without ``keep``, features are float32 in the memory of every rank. With it, each rank writes
    its share to one file as it proceeds, an interrupted run resumes there, and the result is that file, memory-mapped,
    of ``keep.dtype``; no rank holds more than a few batches, and if several jobs want the file, one writes it.
    ``leave_out``: the row of an image in ``bad``, as (index, reason), holds LEFT_OUT instead of its replacement's
    features; :func:`left_out` finds these rows, also in cached features. Raises :class:`UserError` that names an image
    whose features are not finite.
    """
    if keep is None:
        return _make(encoder, loader_of, count, process, label, check, None, leave_out)
    if not _is_kept(keep, count, process):
        with one_writer(keep.path, process):
            if not _is_kept(keep, count, process):  # unless the job that we waited for wrote it
                _make(encoder, loader_of, count, process, label, check, keep, leave_out)
    return open_rows(keep.path, keep.dtype)


def _make(encoder: nn.Module, loader_of: Callable[[Sequence[int]], Loader], count: int, process: Process, label: str,
          check: Callable[[Any], None], keep: Keep | None, leave_out: bool) -> Tensor | None:
    """The features, or None if they are cached."""
    share = -(-count // process.world_size)
    mine = range(min(process.rank * share, count), min((process.rank + 1) * share, count))
    # Opened by all ranks together, so before anything that may fail on one of them.
    file = None if keep is None else RowFile(keep.path, keep.record, count, keep.width, STORED[keep.dtype], process)
    ranges = [mine] if file is None else file.missing(mine)
    was_training, parts = encoder.training, []
    encoder.eval()
    bar = tqdm(total=len(mine), initial=len(mine) - sum(map(len, ranges)), desc=label, unit="img", leave=False,
               disable=None if process.is_main else True)
    with together(process), torch.inference_mode(), bar:
        for todo in ranges:
            rows = _encode(encoder, loader_of(todo), process, check, bar, leave_out)
            if file is None:
                parts.extend(rows)
            else:
                _write(file, todo, rows, keep.dtype, label, leave_out)
    encoder.train(was_training)
    if file is not None:
        file.finish(lambda rows, checksums: _publish(rows, keep, checksums))
        return None
    features = _gather(parts, share, count, process)
    broken = _broken(features, leave_out)
    if len(broken):
        raise NotFinite(f"{label}: the features of {len(broken)} images are not finite, image {int(broken[0])} first",
                        "look at that image, or at the checkpoint")
    return features


def left_out(features: Tensor) -> np.ndarray:
    """int64 [m]: the images whose rows of features [N, d] were left out."""
    return torch.nonzero(features[:, 0] == LEFT_OUT).flatten().numpy()


def _encode(encoder: nn.Module, loader: Loader, process: Process, check: Callable[[Any], None], bar: tqdm,
            leave_out: bool) -> Iterator[Tensor]:
    for batch in loader:
        check(batch)
        images = batch[0][0].to(process.device, non_blocking=process.device.type == "cuda")
        rows = encoder(images).float().cpu()
        if leave_out and batch[2]:
            bad = torch.isin(batch[1], torch.tensor([index for index, _ in batch[2]]))
            rows = rows.masked_fill(bad[:, None], LEFT_OUT)
        yield rows
        bar.update(len(images))


def _broken(rows: Tensor, leave_out: bool) -> Tensor:
    """int64 [m]: the rows of [n, d] that are not finite, except those left out on purpose."""
    broken = ~torch.isfinite(rows).all(dim=1)
    if leave_out and broken.any():
        broken &= (rows != LEFT_OUT).any(dim=1)
    return torch.nonzero(broken).flatten()


def _write(file: RowFile, todo: range, batches: Iterator[Tensor], dtype: str, label: str, leave_out: bool) -> None:
    """Features of the images ``todo``, in their order, a few batches at a time."""
    waiting: list[Tensor] = []
    first = todo.start

    def flush() -> int:
        rows = torch.cat(waiting)
        waiting.clear()
        stored = rows.to(getattr(torch, dtype))
        broken = _broken(stored, leave_out)
        if len(broken):
            fits = torch.isfinite(rows[broken[0]]).all()
            raise UserError(f"{label}: the features of image {first + int(broken[0])} "
                            + (f"do not fit into {dtype}; keep them in float32 or bfloat16" if fits else
                               "are not finite; look at that image, or at the checkpoint"), every_process=False)
        file.write(first, (stored.view(torch.int16) if dtype == "bfloat16" else stored).numpy())
        return first + len(rows)

    for batch in batches:
        waiting.append(batch)
        if sum(part.numel() for part in waiting) * 4 >= WRITTEN:
            first = flush()
    if waiting:
        first = flush()
    if first != todo.stop:
        raise RuntimeError(f"{todo.stop - first} of {len(todo)} images did not come out of the loader")


def _is_kept(keep: Keep, count: int, process: Process) -> bool:
    """Whether the file exists and is complete and unchanged. Each rank checks its part, and all return the same."""
    problem = _changed(keep, count, process)
    problems = gather_objects(problem)
    if problem and keep.path.exists():
        print(f"{keep.path} is damaged ({problem}); its features are computed again", flush=True)
    return not any(x is not None for x in problems)


def _changed(keep: Keep, count: int, process: Process) -> str | None:
    """What is wrong with the file; '' if it or its record is missing, None if nothing is."""
    sidecar = keep.path.with_suffix(".json")
    if not (keep.path.is_file() and sidecar.is_file()):
        return ""
    try:
        record = whole_json(sidecar)
        blocks = read_checksums(record.pop(CHECKSUMS, None))
        if record != json.loads(json.dumps(keep.record)):
            raise Damaged(f"{sidecar.name} describes other features")
        rows = map_array(keep.path)
        if (rows.shape, rows.dtype) != ((count, keep.width), STORED[keep.dtype]) or not rows.flags.c_contiguous:
            raise Damaged(f"it holds {rows.dtype} {list(rows.shape)}")
        check_rows(rows, blocks, process.rank, process.world_size)
    except (OSError, Damaged) as error:
        return str(error)
    return None


def _publish(rows: Path, keep: Keep, checksums: Checksums) -> None:
    keep.path.with_suffix(".json").unlink(missing_ok=True)  # new numbers never stand beside an old record
    rows.replace(keep.path)
    save_json({**keep.record, CHECKSUMS: checksums}, keep.path.with_suffix(".json"))


def _gather(parts: list[Tensor], share: int, count: int, process: Process) -> Tensor:
    """Every rank's rows, padded to one length for the collective and trimmed afterwards."""
    if process.world_size == 1:
        return torch.cat(parts)
    width = torch.tensor([parts[0].shape[1] if parts else 0], device=process.device)
    width = int(all_gather(width).max())
    rows = torch.zeros(share, width)
    if parts:
        mine = torch.cat(parts)
        rows[:len(mine)] = mine
    return all_gather(rows.to(process.device)).cpu()[:count]
