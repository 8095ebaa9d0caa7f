"""What the losses declare, as the table of docs/METHODS.md and as the command lines of scripts/methods.sh.

    python -m losses.tables                       # the table of docs/METHODS.md
    python -m losses.tables docs/METHODS.md       # replaces the tables in that file
    python -m losses.tables recipe seed resnet18  # GPUs and files of its paper's training, then flags, one word a line
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    from runtime.start import begin
    begin()

from losses import LOSSES, needs_of, settings
from losses.base import Loss
from runtime.errors import UserError, run_script
from runtime.settings import said

STUDENTS = ("resnet18", "resnet34", "efficientnet_b0")
BEGIN, END = "<!-- python -m losses.tables docs/METHODS.md -->\n", "<!-- end -->\n"


def method_table() -> str:
    """A row for each loss: what it needs, its own flags, and its paper's training."""
    lines = ["| `--loss` | views | compared with | student's head | also | passes | own flags |",
             "|---|---|---|---|---|---|---|"]
    for name, loss in LOSSES.items():
        needs = loss.needs
        also = ["pairs"] * needs.pairs + ["momentum student"] * needs.momentum + [needs.also] * bool(needs.also)
        also += ["no teacher"] * (needs.teacher is None)
        flags = [f"{owners[name].flag} {said(owners[name].default)}".removesuffix(" False")
                 for owners in settings([name]).values()]
        lines.append(f"| {name} | {needs.views} | {needs.teacher or '-'} | {needs.head} | {', '.join(also)} | "
                     f"{needs.passes:g} | {' '.join(f'`{flag}`' for flag in flags)} |")
    return "\n".join(lines) + "\n"


def recipe_table() -> str:
    """A row for each loss with a recipe of its own: its paper's training, and what it published."""
    lines = [f"| `--loss` | epochs | -b | lr | GPUs | {' | '.join(STUDENTS)} | |", "|---" * (6 + len(STUDENTS)) + "|"]
    for name, loss in LOSSES.items():
        recipe = loss.recipe
        if recipe is Loss.recipe:
            continue
        published = " | ".join(recipe.published.get(student, "-") for student in STUDENTS)
        lines.append(f"| {name} | {recipe.epochs} | {recipe.batch} | {recipe.lr:g} | {recipe.gpus} | {published} | "
                     f"{recipe.note} |")
    return "\n".join(lines) + "\n"


def recipe_flags(name: str, student: str) -> list[str]:
    """The flags of train_distill.py that train ``student`` as in the method's own paper, except for file names.

    Raises :class:`UserError` for an unknown loss or a student that is not in the table.
    """
    needs_of(name)
    if student not in STUDENTS:
        raise UserError(f"{student!r} is not a student of the table; give {', '.join(STUDENTS)}, and further flags "
                        "after it")
    recipe = LOSSES[name].recipe
    small = recipe.small if student == "efficientnet_b0" else ()
    near = ["--nearest-k", recipe.nearest_k, "--total-k", recipe.total_k] if recipe.sampler == "cf" else []
    warmup = [] if recipe.warmup is None else ["--warmup-epochs", recipe.warmup]
    start = ["--head-init", "random"] if LOSSES[name].follows_rows else []  # where that is not the default
    words = ["--loss", name, *start, "-a", student, "--sampler", recipe.sampler, *near, "-b", recipe.batch, "--epochs",
             recipe.epochs, *warmup, "--lr", f"{recipe.lr:g}", "--wd", f"{recipe.weight_decay:g}", *recipe.flags,
             *small]
    return [str(word) for word in words]


def recipe_lines(name: str, student: str) -> list[str]:
    """What scripts/methods.sh reads: the number of GPUs and the files that are needed (teacher, neighbours), then
    :func:`recipe_flags`."""
    flags, recipe = recipe_flags(name, student), LOSSES[name].recipe
    files = ["teacher"] * (LOSSES[name].needs.teacher is not None) + ["neighbours"] * (recipe.sampler == "cf")
    return [" ".join([str(recipe.gpus), *files]), *flags]


def main(words: Sequence[str] | None = None) -> None:
    """See the module's docstring."""
    words = sys.argv[1:] if words is None else words
    tables = f"{BEGIN}{method_table()}\n{recipe_table()}{END}"
    if words[:1] == ["recipe"]:
        name, student = [*words[1:], "", ""][:2]
        print(*recipe_lines(name, student), sep="\n")
    elif words:
        path = Path(words[0])
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        path.write_text(before + tables + rest.partition(END)[2], encoding="utf-8")
    else:
        print(tables, end="")


if __name__ == "__main__":
    run_script(main)
