"""Scores of features against features, a tile at a time: inner products, cosines or Euclidean distances."""

from __future__ import annotations

import copy
import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.errors import UserError

METRICS = ("inner", "cosine", "l2")
PRODUCTS = ("float32", "tf32", "bf16")
CHUNK = 8192


class Operand(NamedTuple):
    """Rows [b, d] prepared for the product, and, for the metric l2, half their squared lengths [b]."""

    rows: Tensor
    half: Tensor | None


class Bank:
    """Features [n, d] of any float type, in memory, memory-mapped or on the device, made ready for products.

    The prepared rows (float32, or rounded; of length 1 for cosines) are held on the device if they fit into ``room``
    bytes, and computed for each tile otherwise; ``held``: the bytes that this takes. Raises :class:`UserError`
    that names the first row with an entry that is not finite.
    """

    def __init__(self, features: Tensor, metric: str, products: str, device: torch.device, room: int) -> None:
        if metric not in METRICS or products not in PRODUCTS:
            raise ValueError(f"metric {metric!r} or products {products!r} is none of {METRICS} and {PRODUCTS}")
        self.features, self.metric, self.products, self.device = features, metric, products, device
        self.width, self.exact = features.shape[1], products == "float32"
        self.held, self.ready, self.on_device = 0, None, None
        self.longest = self.most_rounded = 0.0
        as_it_is = self.exact and metric != "cosine" and features.dtype == torch.float32
        if as_it_is and features.device.type == device.type:
            self.ready = features
        fits = features.numel() * (2 if products == "bf16" else 4) <= room
        if self.ready is None and fits:
            self.ready = torch.empty(features.shape, device=device,
                                     dtype=torch.bfloat16 if products == "bf16" else torch.float32)
            self.held = self.ready.numel() * self.ready.element_size()
        if not self.exact and device.type != features.device.type and self.held + features.nbytes <= room:
            self.on_device = features.to(device)  # from which lists are scored again
            self.held += features.nbytes
        self._scan()

    def __len__(self) -> int:
        return len(self.features)

    def _scan(self) -> None:
        """One pass over the rows: check that they are finite, measure lengths and rounding, fill ``ready``."""
        for first in range(0, len(self), CHUNK):
            part = slice(first, first + CHUNK)
            plain = self._plain(part)
            lengths = plain.norm(dim=1)
            if not torch.isfinite(lengths).all():
                row = first + int((~torch.isfinite(lengths)).nonzero()[0])
                raise UserError(f"row {row} of the features is not finite; look at that image, or at the checkpoint")
            rounded = self._rounded(plain)
            self.longest = max(self.longest, float(lengths.max()))
            if not self.exact:
                self.most_rounded = max(self.most_rounded, float((rounded.float() - plain).norm(dim=1).max()))
            if self.held:
                self.ready[part] = rounded

    def take(self, index: slice | Tensor) -> Operand:
        """Rows for :meth:`score`, by a slice or int64 indices."""
        rows = self.ready[self._place(index, self.ready)] if self.ready is not None else self._rounded(
            self._plain(index))
        half = None
        if self.metric == "l2":
            plain = rows if self.exact else self._plain(index)
            half = plain.square().sum(1) / 2
        return Operand(rows, half)

    def float32(self) -> Bank:
        """The same rows for products in float32; nothing is held for it."""
        if self.exact:
            return self
        other = copy.copy(self)
        other.products, other.exact, other.ready = "float32", True, None
        return other

    def exact_scores(self, rows: Tensor, ids: Tensor) -> Tensor:
        """float32 scores [b, w] of float32 rows [b, d] of :meth:`exact_rows` with the bank's rows ``ids`` [b, w]."""
        others = self.exact_rows(ids.reshape(-1)).view(*ids.shape, -1)
        if self.metric == "l2":
            return (rows[:, None] - others).square().sum(2) / -2
        return torch.einsum("bd,bwd->bw", rows, others)

    def exact_rows(self, index: slice | Tensor) -> Tensor:
        """Rows in float32, of length 1 for cosines."""
        return self._plain(index)

    def error(self, rows: Tensor, other: Bank) -> Tensor:
        """How far, at most, a tile's scores of float32 ``rows`` [b, d] are from the true ones, [b].

        |ab - âb̂| ≤ ‖a - â‖‖b‖ + ‖â‖‖b - b̂‖, and d additions, each off by no more than 2⁻²² of the absolute sum
        (a float32 adds within 2⁻²⁴; tensor cores cut what they add, so two bits more are allowed for).
        """
        rounded = self._rounded(rows).float()
        lengths, longest = rows.norm(dim=1), other.longest + other.most_rounded
        sums = (lengths + longest).square() if self.metric == "l2" else rounded.norm(dim=1) * longest
        return ((rounded - rows).norm(dim=1) * longest + rounded.norm(dim=1) * other.most_rounded
                + self.width * 2.0**-22 * sums)

    def score(self, rows: Operand, columns: Operand, out: Tensor) -> Tensor:
        """float32 scores [b, t], higher is nearer: products, or minus half the squared distance.

        ``out`` float32 [≥ b·t] is used for them.
        """
        shape = len(rows.rows), len(columns.rows)
        scores = out[:shape[0] * shape[1]].view(shape)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest" if self.exact else "high")
        try:
            if self.products == "bf16" and _widens(self.device.type):
                torch.mm(rows.rows, columns.rows.T, out_dtype=torch.float32, out=scores)
            else:  # float32 and tf32 hold what bfloat16 holds
                torch.mm(rows.rows.float(), columns.rows.float().T, out=scores)
        finally:
            torch.set_float32_matmul_precision(before)
        if rows.half is not None:
            scores.sub_(rows.half[:, None]).sub_(columns.half[None])
        return scores

    def values(self, scores: Tensor) -> Tensor:
        """Scores as the caller knows them: squared distances for l2."""
        return (-2 * scores).clamp_(min=0) if self.metric == "l2" else scores

    def _plain(self, index: slice | Tensor) -> Tensor:
        source = self.features if self.on_device is None else self.on_device
        rows = source[self._place(index, source)].to(self.device, torch.float32)
        return F.normalize(rows, dim=1) if self.metric == "cosine" else rows

    def _rounded(self, rows: Tensor) -> Tensor:
        if self.products == "bf16":
            return rows.bfloat16()
        if self.products == "tf32":  # to 10 bits here, to the nearest even, so that the GPU has nothing to round
            bits = rows.contiguous().view(torch.int32)
            return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
        return rows

    @staticmethod
    def _place(index: slice | Tensor, source: Tensor) -> slice | Tensor:
        return index.to(source.device) if isinstance(index, Tensor) else index


@functools.cache
def _widens(device_type: str) -> bool:
    """Whether this torch multiplies bfloat16 into float32 (from 2.8 on, on a GPU)."""
    try:
        small = torch.zeros(16, 16, dtype=torch.bfloat16, device=device_type)
        torch.mm(small, small, out_dtype=torch.float32, out=torch.empty(16, 16, device=device_type))
        return True
    except (TypeError, RuntimeError, NotImplementedError):
        return False
