"""Numbers from the command line or the environment, with the limits that their declarations give."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable

from runtime.errors import UserError

WHOLE, REAL = 2**31 - 1, 3.4e38  # what a C int and a float32 hold, so that nothing further inside overflows
SHOWN = 40  # letters of a wrong number


def number(kind: type, least: float = -math.inf, most: float = math.inf, *, above: float | None = None,
           below: float | None = None) -> Callable[[str], float]:
    """A type for argparse: an ``int`` or a finite ``float`` within [least, most], greater than ``above`` and less than
    ``below``.

    The default limits are those of a C int and of a float32.
    """
    widest = WHOLE if kind is int else REAL
    limits = [f"above {above:g}" if above is not None else "", f"at least {least:g}" if least > -math.inf else "",
              f"at most {most:g}" if most < math.inf else "", f"below {below:g}" if below is not None else ""]
    wanted = " ".join(["a whole number" if kind is int else "a number", " and ".join(x for x in limits if x)]).strip()

    def parse(text: str) -> float:
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        try:
            value = kind(text)
        except ValueError:  # no number, or too many digits
            value = math.nan
        if (not max(least, -widest) <= value <= min(most, widest) or (above is not None and value <= above)
                or (below is not None and value >= below)):
            unsaid = (value > widest and most > widest) or (value < -widest and least < -widest)
            size = f", and its size at most {widest:g}" if unsaid else ""
            raise argparse.ArgumentTypeError(f"{shown!r} is not {wanted}{size}")
        return value

    return parse


def amount(size: float) -> str:
    """Bytes as people say them: ``312 bytes``, ``4.1 MB``, ``2,000.0 GB``."""
    for least, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= least:
            return f"{size / least:,.1f} {unit}"
    return f"{size:.0f} bytes"


def from_environment(name: str, default: int, least: int = 0, most: int = WHOLE) -> int:
    """The whole number that the environment variable ``name`` holds, or ``default`` where it is not set or empty."""
    text = os.environ.get(name)
    if not text:
        return default
    try:
        return int(number(int, least, most)(text))
    except argparse.ArgumentTypeError as error:
        raise UserError(f"the environment variable {name}: {error}; torchrun sets it, so unset it (env -u {name}) or "
                        "start the processes by torchrun") from None
