"""What is set once for a whole process so that its card computes as fast as it can, and whether it can compile."""

from __future__ import annotations

import torch

from runtime.errors import UserError

TF32 = ("conv", "all", "off")


def use_hardware(tf32: str = "conv") -> None:
    """Let cuDNN try out its convolutions for each new shape, and say what of float32 runs on a card's TF32 units.

    ``conv``: convolutions, which is PyTorch's default; ``all``: matrix products too; ``off``: nothing.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = tf32 != "off"
    torch.backends.cuda.matmul.allow_tf32 = tf32 == "all"


def check_compiler(device: torch.device) -> None:
    """Compile a line of PyTorch on ``device``, so that a missing compiler is one sentence before anything starts."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=device))
    except Exception as error:  # whatever Dynamo, Inductor, Triton or a C++ compiler raises
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        raise UserError(f"--compile does not work here ({reason[:200]}); install a C++ compiler (g++), or leave it out"
                        ) from None
