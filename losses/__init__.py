"""The objectives by name. A loss is a module that is called with keyword arguments and returns a dict."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from losses.coss import CoSS
from runtime.errors import UserError

LOSSES: dict[str, type[nn.Module]] = {"coss": CoSS}


def build_loss(name: str, **options: Any) -> nn.Module:
    """The loss called ``name``; of ``options`` it takes those that its constructor names."""
    if name not in LOSSES:
        raise UserError(f"--loss {name} is unknown; choose from {', '.join(sorted(LOSSES))}")
    wanted = inspect.signature(LOSSES[name]).parameters
    return LOSSES[name](**{key: value for key, value in options.items() if key in wanted})
