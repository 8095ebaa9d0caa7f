"""Any batch on any memory, exactly: two passes over parts of it, the "gradient cache".

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
    "images of a process that pass through the networks at once, for batches greater than its memory: the student "
    "passes twice, and the gradient is that of the whole batch, for every loss. Only batch norm differs, whose "
    "statistics are then those of M images (of a view), as if the batch had been M, so a run that resumes with another "
    "M does not train quite the same; default 0, all at once", least=0, metavar="M", resumable=True,
    changes_numbers=True, basic=True)]


def parts_of(rows: int, micro_batch: MicroBatch = 0) -> int:
    """How many parts, equal to within one row, leave none with more than ``micro_batch`` of the ``rows`` (0: no limit).
    """
    return max(1, -(-rows // micro_batch)) if micro_batch else 1


def in_parts(function: Outputs, size: int) -> Outputs:
    """``function`` of a batch [b, ...] to outputs [b, ...], computed over parts of at most ``size`` rows.

    For what needs no gradient: a frozen teacher. ``size`` 0 is ``function`` itself.
    """
    if not size:
        return function

    def whole(batch: Tensor) -> tuple[Tensor, ...]:
        found = [function(part) for part in batch.tensor_split(parts_of(len(batch), size))]
        return tuple(torch.cat(pieces) for pieces in zip(*found, strict=True))

    return whole


class MicroBatches:
    """A network as it is called for a whole batch, whose memory is that of a part of it.

    Called with batches [b, ...] it gives what ``model`` gives, a tuple of outputs [b, ...], computed part by part and
    without a graph. A loss of the whole batch is made of them and its ``backward()`` called, which ends at the outputs;
    :meth:`backward` then computes the parts once more, each with its graph, and carries the gradient on into the
    parameters. That is the gradient of the whole batch, for every loss, at the price of a second forward pass.

    The first pass leaves no trace: buffers (running statistics) and random numbers (dropout) are put back, so that
    the second is the one that counts and draws the same. Statistics of batch norm are those of a part. Inside
    DistributedDataParallel gradients are exchanged once, with the last part.
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
        with torch.no_grad(), _buffers_put_back(self.model):
            found = [self.model(*part) for part in parts]
        outputs = tuple(torch.cat(pieces).requires_grad_() for pieces in zip(*found, strict=True))
        self.first = parts, outputs, random
        return outputs

    def backward(self) -> None:
        """The second pass, after the ``backward()`` of the loss; nothing where the batch went through whole."""
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
def _buffers_put_back(model: nn.Module) -> Iterator[None]:
    buffers = list(model.buffers())
    before = [buffer.clone() for buffer in buffers]
    yield
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)


def _random_state(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextmanager
def _random_numbers_again(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """The random numbers from ``state`` on once more; afterwards those that would have come without."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state[1], device)
        yield
