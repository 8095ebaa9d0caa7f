"""Process-wide settings for speed and precision on a device, and checks of what it supports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn

from runtime.device import Process
from runtime.errors import UserError
from runtime.settings import Setting

AMP = ("auto", "off", "fp16", "bf16")
TF32 = ("conv", "all", "off")


@dataclass(frozen=True)
class Hardware:
    """Precision, and how a GPU is used."""

    amp: Annotated[str, Setting(
        "mixed precision: auto (default) is fp16 with a gradient scaler on a GPU, as in the original, and off on a "
        "CPU, where bf16 may be faster but some networks learn less in it; config.json records the choice as "
        "precision", choices=AMP, resumable=True, changes_numbers=True, basic=True)] = "auto"
    tf32: Annotated[str, Setting(
        "what of float32 runs on a GPU's TF32 units, 10 bits of mantissa: conv, convolutions (default, and PyTorch's "
        "own); all, matrix products too, those of the loss included, which low temperatures do not survive; off, "
        "nothing. Matters where --amp is off", choices=TF32, resumable=True)] = "conv"
    compile: Annotated[bool, Setting("compile the networks by torch.compile: minutes at the start, faster steps "
                                     "afterwards; default off", resumable=True)] = False
    sync_bn: Annotated[bool, Setting(
        "compute the trained network's batch-norm statistics over all GPUs' batches, so that their number does not "
        "change them; default off, as in the original")] = False

    def prepare(self, process: Process) -> None:
        """Set --tf32, and refuse --compile and --sync-bn if they cannot work, before anything is read."""
        use_hardware(self.tf32)
        if self.sync_bn and process.world_size > 1 and process.device.type == "cpu":
            raise UserError("--sync-bn needs GPUs, as PyTorch has none for CPUs; leave it out, or start one process")
        if self.compile:
            check_compiler(process.device)

    def synchronised(self, network: nn.Module, process: Process) -> nn.Module:
        """``network`` with synchronised batch norm if --sync-bn is set and there are several processes."""
        if self.sync_bn and process.world_size > 1:
            return nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return network


def use_hardware(tf32: str = "conv") -> None:
    """Let cuDNN benchmark its convolutions for each new shape, and choose which float32 operations use TF32 on a GPU.

    ``conv``: convolutions, which is PyTorch's default; ``all``: matrix products too; ``off``: nothing.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = tf32 != "off"
    # The same API as the exact search: torch cannot report the precision if both ways of setting it were used.
    torch.set_float32_matmul_precision("high" if tf32 == "all" else "highest")


def check_compiler(device: torch.device) -> None:
    """Compile a line of PyTorch on ``device``, so that a missing compiler is reported before anything starts."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
    except Exception as error:  # whatever Dynamo, Inductor, Triton or a C++ compiler raises
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise UserError(f"--compile does not work here ({reason[:200]}); install a C++ compiler (g++), or leave it out"
                        ) from None
