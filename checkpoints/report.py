"""The report of what happened to each key of a checkpoint file: a line is shown, all of it is logged and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from runtime.errors import printable

WIDTH = 88  # characters on a line of the screen, behind a word such as "teacher: "


@dataclass
class Report:
    """The match between one file and one trunk; ``error`` says why the file does not fit."""

    file: str
    sha256: str = ""
    layout: str | None = None
    arch: str | None = None
    stem: str | None = None
    image_size: int | None = None
    feature: str | None = None
    container: str = ""
    branch: str | None = None
    branches: list[str] = field(default_factory=list)  # other trunks in the file, for --branch
    matched: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)  # prefix -> tensors
    reasons: dict[str, str] = field(default_factory=dict)  # prefix -> why they were dropped
    head: str | None = None
    epoch: int | None = None
    recorded_arch: str | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    notes: list[str] = field(default_factory=list)
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the file fits: it fills every tensor of the trunk and has no unexpected keys."""
        return self.error is None and self.matched > 0

    def difference(self) -> str:
        """The keys that do not fit, in words."""
        return differences(self.missing, self.unexpected, self.reshaped)

    def record(self) -> dict[str, Any]:
        """The report as a plain dict, for JSON and for checkpoints."""
        return {**asdict(self), "ok": self.ok}

    def short(self) -> str:
        """What a person wants to see of a file that fits, in lines of less than 100 characters unless a name is longer:
        its network, layout, and notes. ``str()`` has the rest."""
        stem = "" if self.stem == "imagenet" else f", stem {self.stem}"
        feature = "" if self.feature == "pool" else f", feature {self.feature}"
        branch = f", branch {self.branch}" if self.branch and self.branches else ""
        network = (f"{self.arch}{stem}, {self.image_size} px{feature} ({self.layout} layout{branch}, all "
                   f"{self.matched} tensors)")
        first = f"{self.file}: {network}"
        lines = [first] if len(first) <= WIDTH else [f"{self.file}:", network]
        return "\n    ".join(map(printable, lines + self.notes))

    def __str__(self) -> str:
        branch = f" (branch {self.branch}" + (f", beside {', '.join(self.branches)}" if self.branches else "") + ")"
        dropped = ", ".join(f"{n} under {prefix} ({self.reasons[prefix]})" for prefix, n in self.dropped.items())
        feature = "" if self.feature == "pool" else f", feature {self.feature}"
        notes = "".join(f"; {note}" for note in self.notes)
        return printable(
            f"{self.file}: {self.layout} layout{branch if self.branch else ''}, {self.arch} (stem {self.stem}, "
            f"{self.image_size} px{feature}), {self.matched} trunk tensors matched, 0 missing, 0 unexpected, dropped "
            f"{dropped or 'nothing'}; mean {colours(self.mean)}, std {colours(self.std)}; "
            f"sha256 {self.sha256[:16]}…{notes}")


def differences(missing: Sequence[str], unexpected: Sequence[str], reshaped: Sequence[str]) -> str:
    """The keys of a file that do not fit a trunk, in words; '' if all do."""
    return ", ".join(f"{len(keys)} {what} ({few(keys)})" for what, keys in (
        ("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped)) if keys)


def colours(values: Sequence[float] | None) -> str:
    """The mean or std of red, green and blue, for messages."""
    return " ".join(f"{value:g}" for value in values or ())


def few(items: Sequence[str], most: int = 3) -> str:
    """The first ``most`` of a list, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(item[:200] for item in items[:most]) + more
