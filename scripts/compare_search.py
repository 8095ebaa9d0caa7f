"""A learning rate for each method of scripts/compare_methods.sh: equally many candidates, held-out training images."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from compare_plan import Budget, read_rates
from compare_work import Comparison, ended, read_metrics
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.datasets import open_source  # noqa: E402
from runtime.errors import UserError  # noqa: E402

SEED = 1000     # none of the table's
HELD_OUT = 0.2  # of each class's training images


def search(args: argparse.Namespace) -> None:
    """A learning rate for each method, by 10-NN on training images that were held out: rates.txt in the output."""
    folder = Path(args.output) / "search"
    budget = Budget(args.search_passes, args.epochs, args.batch, args.nearest_k, args.total_k).rounded()
    c, data = Comparison(args, folder, budget), folder / "images"
    middle = read_rates(args.methods, [folder.parent / "rates.txt", Path(args.rates)])
    rates = {entry: [float(f"{middle[entry] * factor:.3g}") for factor in args.factors] for entry in args.methods}
    c.same_settings()
    hold_out(args.data, data)
    c.mine(data)
    work = [lambda slot, e=entry, r=rate: candidate(c, data, e, r, slot) for entry in args.methods
            for rate in rates[entry] if candidate_score(folder / f"{entry}-{rate:g}") is None]
    if work:
        seconds = budget.passes / c.measure(args.methods[0], data)
        print(f"{len(work)} candidates of {budget.passes:,} image passes, {c.jobs} side by side: more than "
              f"{len(work) / c.jobs * seconds / 60:.0f} minutes")
        if not c.pool("candidates", work, seconds):
            raise UserError(f"MINUTES={args.minutes:g} have passed; start it again to resume")
    lines = [f"# The best of {len(args.factors)} rates each, by 10-NN accuracy (behind the colons) on a fifth of the "
             f"training images of {args.data}", f"# that was held out; {budget.passes:,} image passes, one seed"]
    for entry in args.methods:
        scores = {rate: candidate_score(folder / f"{entry}-{rate:g}") for rate in rates[entry]}
        best = max(scores, key=scores.__getitem__)
        lines.append(f"{entry} {best:g} # " + ", ".join(f"{rate:g}: {score:.1f}" for rate, score in scores.items()))
    text = "\n".join(lines) + "\n"
    (folder.parent / "rates.txt").write_text(text, encoding="utf-8")
    print(f"{text}{folder.parent / 'rates.txt'}")


def candidate(c: Comparison, data: Path, entry: str, rate: float, slot: int) -> None:
    """Train one."""
    c.train(c.folder / f"{entry}-{rate:g}", entry, SEED, rate, str(data), slot, every=c.budget.epochs)


def candidate_score(folder: Path) -> float | None:
    """10-NN top-1 at the end; 0 where the numbers ended before; None where it was not reached yet."""
    if ended(folder):
        return 0.0
    return next((line["top1"] for line in read_metrics(folder, "knn")), None)


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
