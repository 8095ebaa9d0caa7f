"""Optimizers by name, their parameter groups, and LARS; the settings of optimizer and schedule."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from runtime.errors import UserError
from runtime.optim import HOLD_EPOCHS, learning_rate
from runtime.settings import Setting, Used, boolean

OPTIMIZERS = ("sgd", "lars", "adamw")
DECAYED = ("auto", "all", "kernels")
RATES = {"lars": "such as 1", "adamw": "0.001 or less"}
TRUST = 0.001  # LARS's coefficient, in SwAV, MoCo v3 and solo-learn


@dataclass(frozen=True)
class Optimization:
    """Optimizer and schedule."""

    epochs: Annotated[int, Setting("passes over the images (over the anchors, with neighbours); default {default}, "
                                   "{source}", least=1, metavar="N", basic=True)] = 25
    start_epoch: Annotated[int | None, Setting(
        "count epochs from here in a fresh start or after an explicit --resume; default: where the checkpoint stopped, "
        "else 0", least=0, metavar="N", resumable=True)] = None
    lr: Annotated[float | None, Setting(
        "base learning rate", "--lr --learning-rate", above=0, metavar="LR", basic=True)] = None
    optimizer: Annotated[str, Setting(
        "sgd (default, {source}); lars, its rate adapted layer by layer (You et al., as in SwAV and solo-learn, trust "
        "coefficient 0.001; biases and norms by plain sgd), for batches of thousands and rates above 0.1; adamw, for "
        "transformers, with rates of about 0.001 or less", choices=OPTIMIZERS)] = "sgd"
    momentum: Annotated[float, Setting("momentum of sgd and lars, first beta of adamw; default {default}, {source}",
                                       least=0, below=1)] = 0.9
    weight_decay: Annotated[float, Setting("weight decay; default {default}, {source}", "--wd --weight-decay", least=0,
                                           metavar="W")] = 1e-4
    decayed: Annotated[str, Setting(
        "which parameters decay: all, or kernels, those of two or more dimensions, so not biases and scales of norms; "
        "default auto: all for sgd, {source}, and kernels for lars and adamw", choices=DECAYED)] = "auto"
    clip_grad: Annotated[float, Setting("scale the gradient down if its total norm is above X; default 0, "
                                        "never, {source}", least=0, metavar="X")] = 0.0
    warmup_epochs: Annotated[int | None, Setting(
        "increase the rate linearly from 0 to the base rate over N epochs, 0 for none; default: {default}", least=0,
        metavar="N", unset="as the original, whose warm-up of 5 epochs never increases: it holds the base rate, then "
                           "drops to the cosine", basic=True)] = None
    cos: Annotated[bool, Setting("cosine schedule over the epochs, one rate per epoch; default true, as in the paper; "
                                 "--cos false uses --schedule", parse=boolean, nargs="?", const=True,
                                 metavar="BOOL")] = True
    schedule: Annotated[Sequence[int], Setting(
        "with --cos false: epochs at which the rate is divided by 10; default {default}, the original's", nargs="*",
        least=0, metavar="EPOCH", item=int),
        Used("with --cos false", lambda args: not getattr(args, "cos", False))] = (120, 160)

    def check(self) -> None:
        """Raise :class:`UserError` if --start-epoch leaves nothing to do, or the warm-up does not end in time."""
        if self.warmup_epochs and self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup-epochs {self.warmup_epochs} is more than --epochs {self.epochs}, so that the "
                            "rate would never reach --lr; give fewer")
        if self.start_epoch is not None and self.start_epoch >= self.epochs:
            raise UserError(f"--start-epoch {self.start_epoch} leaves nothing of --epochs {self.epochs}; epochs count "
                            "from 0")
        if self.lr is None and self.optimizer != "sgd":
            raise UserError(f"--optimizer {self.optimizer} has no default learning rate; give --lr, "
                            + RATES[self.optimizer])

    def scaled(self, rate: float, batch: int, images: int) -> tuple[Optimization, str]:
        """If --lr was not given: with a rate in proportion to the ``images`` of a step, where ``rate`` is for ``batch``
        of them (Goyal et al., arXiv 1706.02677, section 2.1), and a sentence for the log."""
        if self.lr is not None:
            return self, ""
        said = f"--lr {rate * images / batch:g}: {rate:g} for {batch:,} images a step, scaled to {images:,}"
        return replace(self, lr=rate * images / batch), said

    @property
    def warmup(self) -> int | str:
        """The warm-up as config.json records it."""
        if self.warmup_epochs is None:
            return f"the base rate for {HOLD_EPOCHS} epochs, as the original"
        return self.warmup_epochs

    def rate(self, epoch: int, step: int, steps: int) -> float:
        """The learning rate at ``step`` of the ``steps`` of ``epoch``, all from 0."""
        return learning_rate(epoch, step, steps, base=self.lr, epochs=self.epochs, warmup=self.warmup_epochs,
                             cosine=self.cos, milestones=self.schedule)

    def build(self, network: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over the trainable parameters of ``network``."""
        return build_optimizer(self.optimizer, network.parameters(), self.lr, self.momentum, self.weight_decay,
                               self.decayed)


def build_optimizer(name: str, parameters: Iterable[Tensor], lr: float, momentum: float, weight_decay: float,
                    decayed: str = "auto") -> torch.optim.Optimizer:
    """The optimizer ``name`` of :data:`OPTIMIZERS` over the trainable ``parameters``, in one fused kernel.

    ``decayed``: parameters with ``weight_decay``: ``all``, or ``kernels``, those of two or more dimensions, so not
    biases and scales of norms; ``auto`` is all for sgd, as in the paper, and kernels for the others. ``momentum`` is
    AdamW's first beta.
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
            group["weight_decay"] = 0.0 if group["adapted"] else group["decay"]  # SGD must not decay it again

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
    """Replace each gradient in place by LARS's. ``scale``: the factor of the gradient scaler in them."""
    scale = gradients[0].new_ones(()) if scale is None else scale.to(gradients[0].device)
    w = torch.stack(torch._foreach_norm(weights))                                       # [number of tensors]
    g = torch.stack(torch._foreach_norm(gradients)) / scale
    rate = torch.where((w > 0) & (g > 0), trust * w / (g + decay * w), 1.0)
    torch._foreach_add_(gradients, torch._foreach_mul(weights, scale * decay))
    torch._foreach_mul_(gradients, list(rate.unbind()))
