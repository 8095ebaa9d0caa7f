"""Exact gradients of batches larger than memory, by two passes over parts of them: the "gradient cache".

Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from runtime.settings import Setting

Outputs = Callable[[Tensor], tuple[Tensor, ...]]
Context = Callable[[], AbstractContextManager[Any]]


MicroBatch = Annotated[int, Setting(
    "images per process that pass through the networks at once, for batches larger than its memory: the student "
    "runs twice, and the gradient is that of the whole batch, for every loss. Only batch norm differs: its "
    "statistics are those of M images (of a view), as in a batch of M, so a run resumed with another M trains "
    "slightly differently; default 0, all at once", least=0, metavar="M", resumable=True,
    changes_numbers=True, basic=True)]


def parts_of(rows: int, micro_batch: MicroBatch = 0) -> int:
    """The number of parts, equal to within one row, with at most ``micro_batch`` of the ``rows`` each (0: no limit)."""
    return max(1, -(-rows // micro_batch)) if micro_batch else 1


def in_parts(function: Outputs, size: int) -> Outputs:
    """``function`` of a batch [b, ...] to outputs [b, ...], computed over parts of at most ``size`` rows.

    For functions without gradient, such as a frozen teacher. ``size`` 0 returns ``function`` itself.
    """
    if not size:
        return function

    def whole(batch: Tensor) -> tuple[Tensor, ...]:
        found = [function(part) for part in batch.tensor_split(parts_of(len(batch), size))]
        return tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))

    return whole


class MicroBatches:
    """Calls a network on a whole batch with the memory of a part of it.

    Called with batches [b, ...], it returns what ``model`` returns, a tuple of outputs [b, ...], computed part by part
    without a graph. The loss of the whole batch is computed from them, and its ``backward()`` ends at these outputs;
    :meth:`backward` then computes each part again, with its graph, and propagates the gradient to the parameters. The
    result is the gradient of the whole batch, for every loss, at the price of a second forward pass.

    The first pass has no side effects: buffers (running statistics) and random state (dropout) are restored, so the
    second pass updates them and draws the same numbers. Batch-norm statistics are those of a part. Inside
    DistributedDataParallel, gradients are exchanged once, with the last part.
    """

    def __init__(self, model: nn.Module, size: int, autocast: Context = nullcontext) -> None:
        self.model, self.size, self.autocast = model, size, autocast
        self.first: tuple[list[tuple[Tensor, ...]], tuple[Tensor, ...], list[Tensor]] | None = None

    def __call__(self, *batches: Tensor) -> tuple[Tensor, ...]:
        count = parts_of(max(map(len, batches)), self.size)
        if count == 1:
            return self.model(*batches)
        parts = list(zip(*(batch.tensor_split(count) for batch in batches), strict=True))
        random = _random_state(batches[0].device)
        with torch.no_grad(), buffers_put_back(self.model):
            found = [self.model(*part) for part in parts]
        outputs = tuple(torch.cat(pieces).requires_grad_() for pieces in zip(*found, strict=True))
        self.first = parts, outputs, random
        return outputs

    def backward(self) -> None:
        """The second pass, after the ``backward()`` of the loss; a no-op if the batch was not split."""
        if self.first is None:
            return
        (parts, outputs, random), self.first = self.first, None
        with _random_numbers_again(random, outputs[0].device):
            taken = [0] * len(outputs)
            for number, part in enumerate(parts, 1):
                last = number == len(parts)
                with nullcontext() if last else getattr(self.model, "no_sync", nullcontext)():
                    with self.autocast():
                        pieces = self.model(*part)
                    slices = [(piece, whole.grad[start:start + len(piece)]) for piece, whole, start in
                              zip(pieces, outputs, taken, strict=True) if whole.grad is not None]
                    torch.autograd.backward(*map(list, zip(*slices, strict=True)))
                taken = [start + len(piece) for start, piece in zip(taken, pieces, strict=True)]


@contextmanager
def buffers_put_back(*models: nn.Module) -> Iterator[None]:
    """Whatever happens to the buffers of ``models``, they are as before at the end."""
    buffers = [buffer for model in models for buffer in model.buffers()]
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextmanager
def _random_numbers_again(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """Replay the random numbers from ``state``; afterwards the current random state is restored."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield
