"""How each method spends the image passes of scripts/compare_methods.sh, and its rate and warm-up."""

from __future__ import annotations

import sys
from argparse import ArgumentTypeError
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from losses import LOSSES, needs_of  # noqa: E402
from runtime.errors import UserError  # noqa: E402
from runtime.numbers import number  # noqa: E402


@dataclass(frozen=True)
class Budget:
    """The settings that all students share."""

    passes: int
    epochs: int
    batch: int
    nearest_k: int
    total_k: int

    def rounded(self) -> Budget:
        """The passes, rounded so that each method (1, 1.5 or 2 per image) has a whole number of steps per epoch."""
        unit = 6 * self.epochs * self.batch
        return replace(self, passes=max(1, self.passes // unit) * unit)


@dataclass(frozen=True)
class Plan:
    """How one method spends the budget."""

    loss: str
    sampler: str
    anchors: int      # -b
    nearest_k: int
    total_k: int
    epoch_steps: int
    head_bn: bool
    flags: tuple[str, ...]  # of the loss itself, for trainings as short as these


class Entry(NamedTuple):
    """What METHODS names: LOSS[@SAMPLER][:FLAG=VALUE,FLAG=VALUE...], as in ``coss@random`` and ``coss:l_1=0``."""

    loss: str
    sampler: str
    flags: dict[str, str]

    @classmethod
    def of(cls, text: str) -> Entry:
        """Raises :class:`UserError` for a sampler other than random or cf, and for a flag without a value."""
        named, *settings = text.split(":", 1)
        loss, _, sampler = named.partition("@")
        if sampler not in ("", "random", "cf"):
            raise UserError(f"METHODS names {text}; only random or cf may follow the @")
        pairs = [word.partition("=") for word in ",".join(settings).split(",") if word]
        if not all(name and value for name, _, value in pairs):
            raise UserError(f"METHODS names {text}; after the colon it takes flags of train_distill.py with their "
                            "values, as in coss:l_1=0.5,nearest-k=7")
        return cls(loss, sampler, {name: value for name, _, value in pairs})


def plan_of(text: str, budget: Budget) -> Plan:
    """``text``: an :class:`Entry`."""
    entry = Entry.of(text)
    loss, sampler, needs = entry.loss, entry.sampler, needs_of(entry.loss)
    flags = dict(entry.flags)
    wanted = _number(text, flags.pop("nearest-k", str(budget.nearest_k)))
    neighbours = any(LOSSES[name].neighbour_batches for name in loss.split("+"))
    sampler = "cf" if needs.pairs else sampler or ("cf" if neighbours and wanted else "random")
    near, of = (0, 0) if sampler == "random" else (1, 5) if needs.pairs else (wanted, max(wanted, budget.total_k))
    if budget.batch % (1 + near):
        raise UserError(f"BATCH={budget.batch} does not fit anchors with {near} neighbours; give a multiple of "
                        f"{1 + near}")
    steps = budget.passes / (budget.batch * needs.passes * budget.epochs)
    if not steps.is_integer():
        raise UserError(f"{text} takes {needs.passes:g} passes an image, which does not divide PASSES={budget.passes}")
    if any(LOSSES[name].follows_rows for name in loss.split("+")):
        flags = {"head-init": "random", **flags}  # as in its paper; the default is another
    contrasts = needs.momentum and any(head != "none" for head, _ in needs.heads)  # with its own copy: disco and moco
    return Plan(loss, sampler, budget.batch // (1 + near), near, of, int(steps), contrasts,
                (*(word for name in loss.split("+") for word in LOSSES[name].recipe.short),
                 *(word for name, value in flags.items() for word in (f"--{name}", value))))


def _number(text: str, value: str) -> int:
    try:
        return number(int, 0)(value)
    except ArgumentTypeError as error:
        raise UserError(f"METHODS names {text}: nearest-k {error}") from None


class Tuned(NamedTuple):
    """The tuned settings of a method."""

    rate: float
    warmup: int  # periods
    file: Path | None = None  # that says so

    def __str__(self) -> str:
        return f"{self.rate:g} {self.warmup}"


def read_tuned(entries: Iterable[str], files: Sequence[Path]) -> dict[str, Tuned]:
    """Rate and warm-up of each entry: its line, its line without flags, or its loss's, of the first file with one."""
    found: dict[str, Tuned] = {}
    for path in reversed([path for path in files if path.is_file()]):
        text = path.read_text(encoding="utf-8")
        lines = [line.partition("#")[0].split() for line in text.splitlines()]
        known = {words[0]: _tuned(path, *words[1:])._replace(file=path) for words in lines if words}
        for entry in entries:
            names = (entry, entry.partition(":")[0], Entry.of(entry).loss)
            found |= next(({entry: known[name]} for name in names if name in known), {})
    missing = [entry for entry in entries if entry not in found]
    if missing:
        raise UserError(f"no learning rate for {', '.join(missing)} in {' or '.join(map(str, files))}; find one with "
                        "bash scripts/compare_methods.sh --search, or write a line NAME RATE WARM-UP there")
    return found


def _tuned(path: Path, *words: str) -> Tuned:
    try:
        rate, warmup = words
        return Tuned(float(rate), int(warmup))
    except ValueError:
        raise UserError(f"{path} holds a line with {' '.join(words)!r} behind a name, expected RATE and WARM-UP "
                        "(periods), as in: coss 0.004 4") from None
