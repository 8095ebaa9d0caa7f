"""A moving average of a network's weights over training, to be saved beside it."""

from __future__ import annotations

import copy
from typing import Annotated

import torch
from torch import nn

from runtime.settings import Setting


class MovingAverage(nn.Module):
    """average <- decay * average + (1 - decay) * network, of parameters and running statistics; it begins as a copy."""

    def __init__(self, network: nn.Module, ema: Annotated[float, Setting(
            "keep a moving average of the student with this decay (0.999, 0.9999) and write it to student_ema.pth; "
            "default {default}, none", least=0, below=1, metavar="X")]) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.decay = ema

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """After an update of ``network``."""
        pairs = list(zip(self.network.state_dict().values(), network.state_dict().values(), strict=True))
        moving = [(slow, fast) for slow, fast in pairs if slow.is_floating_point()]
        torch._foreach_lerp_(*map(list, zip(*moving, strict=True)), 1 - self.decay)
        for slow, fast in pairs:
            if not slow.is_floating_point():  # counts of batches
                slow.copy_(fast)
