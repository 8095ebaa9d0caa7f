"""Rate and warm-up of each method of scripts/compare_methods.sh: one rule for all, on held-out training images.

Round 1 tries three rates, neighbours a factor of FACTOR apart, with three warm-ups each. Then the neighbours of the
best in this grid, until all of them have been tried (at most ``TRIALS`` in all), so that the best is never at an edge.
``ROUNDS``: each later round gives fewer trials more passes, and the last gives them all of PASSES and two seeds.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import statistics
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from compare_plan import Budget, Tuned, plan_of, read_tuned
from compare_work import Children, Comparison, ended, read_metrics
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.datasets import open_source  # noqa: E402
from runtime.errors import UserError  # noqa: E402

SEED = 1000                           # the first; none of the table's
HELD_OUT = 0.2                        # of each class's training images
WARMUPS = (0.0, 0.1, 0.4, 0.7, 1.0)   # shares of the periods; round 1 begins with those between the ends
TRIALS = 16                           # at most, for each method in round 1


class Trial(NamedTuple):
    """A place in the grid: the previous rate times FACTOR ** ``step``, and a number of the warm-ups."""

    step: int
    warmup: int

    def neighbours(self, warmups: int) -> list[Trial]:
        """The next rates, and the next of so many warm-ups."""
        beside = [Trial(self.step, place) for place in (self.warmup - 1, self.warmup + 1) if 0 <= place < warmups]
        return [Trial(self.step - 1, self.warmup), Trial(self.step + 1, self.warmup), *beside]


@dataclass(frozen=True)
class Round:
    """How the trials of a round are trained, and how many of them continue."""

    share: float  # of PASSES
    seeds: int
    kept: int


ROUNDS = (Round(1 / 4, 1, 3), Round(1 / 2, 1, 2), Round(1, 2, 1))


def seeds_of(number: int) -> range:
    """The seeds of a round."""
    return range(SEED, SEED + ROUNDS[number].seeds)


class Search:
    """Trials in a folder, a training for each entry, round, trial and seed. ``middle``: where each entry begins."""

    def __init__(self, args: argparse.Namespace, folder: Path, middle: Mapping[str, Tuned],
                 children: Children) -> None:
        self.args, self.folder, self.middle = args, folder, middle
        self.budget = Budget(args.passes, args.epochs, args.batch, args.nearest_k, args.total_k).rounded()
        self.c, self.data = Comparison(args, folder, self.budget, children), folder / "images"
        self.warmups = sorted({round(share * args.epochs) for share in WARMUPS})

    def tuned(self, entry: str, trial: Trial) -> Tuned:
        """The rate and warm-up of a trial."""
        rate = self.middle[entry].rate * self.args.factor**trial.step
        return Tuned(float(f"{rate:.3g}"), self.warmups[trial.warmup])

    def run_of(self, number: int, entry: str, trial: Trial, seed: int) -> Path:
        """The run's folder."""
        found = self.tuned(entry, trial)
        return self.folder / f"round{number + 1}" / f"{entry}-{found.rate:g}-{found.warmup}-{seed}"

    def score(self, number: int, entry: str, trial: Trial, seed: int) -> float | None:
        """10-NN top-1 at the end; 0 if the training diverged; None if it has not finished."""
        run = self.run_of(number, entry, trial, seed)
        return 0.0 if ended(run) else next((line["top1"] for line in read_metrics(run, "knn")), None)

    def scores(self, number: int, entry: str, trial: Trial) -> list[float]:
        """Of each seed of a round that is done."""
        return [self.score(number, entry, trial, seed) for seed in seeds_of(number)]

    def train(self, number: int, trials: Mapping[str, Collection[Trial]]) -> None:
        """Train those of a round's trials that have not been."""
        budget = replace(self.budget, passes=round(self.budget.passes * ROUNDS[number].share)).rounded()
        work = [lambda slot, e=entry, t=trial, s=seed: self.c.train(
                    self.run_of(number, e, t, s), e, s, self.tuned(e, t), str(self.data), slot,
                    steps=plan_of(e, budget).epoch_steps, every=self.budget.epochs)
                for entry, group in trials.items() for trial in group for seed in seeds_of(number)
                if self.score(number, entry, trial, seed) is None]
        seconds = budget.passes / self.c.measure(self.args.methods[0], self.data)
        if work and not self.c.pool(f"round {number + 1}", work, seconds):
            raise UserError(f"MINUTES={self.args.minutes:g} have passed; start it again to resume")

    def best(self, number: int, trials: Mapping[str, Sequence[Trial]]) -> dict[str, list[Trial]]:
        """The trials that continue after a round, the best first."""
        return {entry: sorted(group, key=lambda trial, e=entry: -statistics.mean(self.scores(number, e, trial)))
                [:ROUNDS[number].kept] for entry, group in trials.items()}

    def first_round(self) -> dict[str, list[Trial]]:
        """The trials of round 1, all neighbours of the best among them."""
        more = {entry: self.grid() for entry in self.middle}
        tried: dict[str, list[Trial]] = {entry: [] for entry in self.middle}
        while any(more.values()):
            self.train(0, more)
            tried = {entry: trials + more[entry] for entry, trials in tried.items()}
            more = {entry: [trial for trial in best[0].neighbours(len(self.warmups)) if trial not in tried[entry]]
                    [:TRIALS - len(tried[entry])] for entry, best in self.best(0, tried).items()}
        return tried

    def grid(self) -> list[Trial]:
        """The first trials of round 1."""
        inner = range(len(self.warmups))[1:-1] or range(len(self.warmups))
        return [Trial(step, place) for step in (0, -1, 1) for place in inner]

    def cost(self) -> str:
        """An estimate of its time, printed before it starts."""
        speed = self.c.measure(self.args.methods[0], self.data)
        later = sum(before.kept * this.seeds * this.share for before, this in itertools.pairwise(ROUNDS))
        hours = [len(self.middle) * (count * ROUNDS[0].share + later) * self.budget.passes / speed / self.c.jobs / 3600
                 for count in (len(self.grid()), TRIALS)]
        return (f"searching rate and warm-up of {len(self.middle)} methods, {self.c.jobs} trainings side by side at "
                f"{speed:.0f} passes a second each: {hours[0]:.1f} to {hours[1]:.1f} hours; started again, it resumes")


def search(args: argparse.Namespace, children: Children) -> None:
    """Rate and warm-up for each method: rates.txt in the output."""
    result = Path(args.output) / "rates.txt"
    one = Search(args, result.parent / "search", read_tuned(args.methods, [result, Path(args.rates)]), children)
    one.c.same_settings()
    hold_out(args.data, one.data)
    one.c.mine(one.data)
    print(one.cost())
    trials = one.first_round()
    survivors = one.best(0, trials)
    for number in range(1, len(ROUNDS)):
        trials = survivors
        one.train(number, trials)
        survivors = one.best(number, trials)
    lines = [f"# NAME RATE WARM-UP of {args.epochs} periods, by scripts/compare_methods.sh --search for "
             f"{one.budget.passes:,} image passes on {args.data}.", "# Last round, rate warm-up: 10-NN accuracy "
             "in % on a held-out fifth of the training images, seed by seed; 0: the numbers ended"]
    for entry, (chosen, *_) in survivors.items():
        told = [f"{one.tuned(entry, trial)}: " + " ".join(f"{x:.1f}" for x in one.scores(number, entry, trial))
                for trial in trials[entry]]
        lines.append(f"{entry} {one.tuned(entry, chosen)} # {', '.join(told)}")
    lines += others(result, survivors)
    text = "\n".join(lines) + "\n"
    result.write_text(text, encoding="utf-8")
    print(f"{text}{result}")


def others(path: Path, entries: Collection[str]) -> list[str]:
    """The lines of an earlier search in the same folder for other methods than ``entries``."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return [line for line in lines if (words := line.split()) and words[0] not in {"#", *entries}]


def hold_out(data: str, folder: Path) -> None:
    """``folder``/{train,val}: the training images of ``data``, a fifth of each class in val/, as links or PNG files."""
    if folder.exists():
        return
    source, part = open_source(data, labelled=True), folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    for number, name in enumerate(source.classes):
        rows = (source.labels == number).nonzero()[0]
        for place, i in enumerate(rows.tolist()):
            file = Path(source.location(i))
            split = "val" if place >= round((1 - HELD_OUT) * len(rows)) else "train"
            link = part / split / name / f"{place:07d}{file.suffix if file.is_file() else '.png'}"
            link.parent.mkdir(parents=True, exist_ok=True)
            if file.is_file():
                link.symlink_to(file.resolve())
            else:
                to_pil_image(source.pixels(i)).save(link)
    part.rename(folder)
