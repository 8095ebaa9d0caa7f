#!/usr/bin/env python
"""Draws the diagram of the method, method.svg, into this folder (needs matplotlib). data/demo.py renders its images.

    python docs/figures/draw_method.py
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.patches import FancyBboxPatch, Rectangle  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from data.demo import render  # noqa: E402

PAPER, INK, FAINT = "#fbfaf7", "#24292f", "#6e7781"  # an own background, so that dark pages leave the text legible
TEACHER, STUDENT, ROW, COLUMN = "#57606a", "#0969da", "#bc4c00", "#1a7f37"
ROWS, COLUMNS = 6, 9


def panel(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many tenths of an inch, with a rounded background and one axis that covers it."""
    figure = pyplot.figure(figsize=(width / 10, height / 10))
    figure.patch.set_alpha(0)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axis.axis("off")
    axis.add_patch(FancyBboxPatch((0.4, 0.4), width - 0.8, height - 0.8, "round,pad=0,rounding_size=1.5",
                                  facecolor=PAPER, edgecolor="#d0d7de"))
    return figure, axis


def box(axis: Axes, x: float, y: float, text: str, colour: str, width: float = 15, height: float = 8) -> None:
    """A filled box with white text, by its lower left corner."""
    axis.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=1", facecolor=colour, linewidth=0))
    axis.text(x + width / 2, y + height / 2, text, color="white", ha="center", va="center", fontsize=9.5)


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    """An arrow between two points."""
    axis.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": FAINT, "lw": 1.2, **style})


def matrix(axis: Axes, x: float, y: float, values: np.ndarray, name: str, colour: str) -> None:
    """Features as a grid of cells, row 1 and column 4 framed."""
    low, high = values.min(), values.max()
    for (row, column), value in np.ndenumerate(values):
        axis.add_patch(Rectangle((x + 2 * column, y + 2 * (ROWS - 1 - row)), 2, 2, facecolor=colour, linewidth=0,
                                 alpha=0.12 + 0.75 * (value - low) / (high - low)))
    axis.add_patch(Rectangle((x, y + 2 * (ROWS - 2)), 2 * COLUMNS, 2, fill=False, edgecolor=ROW, lw=2))
    axis.add_patch(Rectangle((x + 8, y), 2, 2 * ROWS, fill=False, edgecolor=COLUMN, lw=2))
    axis.text(x + COLUMNS, y + 2 * ROWS + 0.9, name, ha="center", color=colour, fontsize=9)


def method() -> Figure:
    """A batch through both networks, and what the two terms compare."""
    figure, axis = panel(100, 46)
    random = np.random.default_rng(4)
    axis.text(10.5, 41.6, "a batch: images, each with its\nnearest neighbours in the\nteacher's space", ha="center",
              va="center", color=INK, fontsize=8.5)
    for row, kind in enumerate((1, 1, 1, 6, 6, 6)):
        bottom = 31 - 5.1 * row - (1.4 if row > 2 else 0)
        axis.imshow(render(kind, random), extent=(9.5, 14.1, bottom, bottom + 4.6), zorder=3, aspect="auto")
        axis.text(8.7, bottom + 2.3, "neighbour" if row % 3 else "image", ha="right", va="center",
                  color=FAINT if row % 3 else INK, fontsize=8)
    axis.set(xlim=(0, 100), ylim=(0, 46))
    box(axis, 21, 27.5, "teacher\nlarge, frozen", TEACHER)
    box(axis, 21, 9.5, "student + head\nsmall, trained", STUDENT)
    values = random.normal(size=(ROWS, COLUMNS))
    axis.plot([14.8, 15.6, 15.6, 14.8], [35.6, 35.6, 4.1, 4.1], color=FAINT, lw=1.2)  # the whole batch goes to both
    for y, name, colour, noise in ((25.5, "teacher's features T", TEACHER, 0.0),
                                   (7.5, "student's features S", STUDENT, 0.5)):
        arrow(axis, (15.6, 19.9), (20.7, y + 6))
        arrow(axis, (36.4, y + 6), (41.6, y + 6))
        matrix(axis, 42, y, values + noise * random.normal(size=values.shape), name, colour)
    axis.text(51, 4.6, "rows: images     columns: dimensions", ha="center", va="center", color=FAINT, fontsize=8)
    for y, colour, title, text in (
            (34, ROW, "row term", "Each image's feature vector points\nthe same way in both spaces."),
            (22, COLUMN, "space similarity", "Each dimension, read down the batch,\npoints the same way in both "
                                             "spaces.\nNormalised rows alone lose this.")):
        depth = 1.8 * text.count("\n")
        axis.add_patch(Rectangle((64, y - 1.4 - depth), 0.7, 6 + depth, facecolor=colour, linewidth=0))
        axis.text(66.2, y + 3, title, color=colour, fontsize=11, weight="bold", va="center")
        axis.text(66.2, y + 1.2, text, color=INK, fontsize=9.5, va="top", linespacing=1.35)
    loss = r"$\mathrm{loss}\;=\;-\,(\,l_0\,R+l_1\,C\,)\,/\,\tau_t\,\tau_s$"
    axis.text(64, 12.2, loss, color=INK, fontsize=12, va="center")
    axis.text(64, 9.4, "R: mean cosine of the rows of T and S\nC: mean cosine of their columns", color=INK,
              fontsize=9.5, va="top", linespacing=1.35)
    return figure


def write(draw: Callable[[], Figure], words: str) -> None:
    """The figure ``draw`` returns, as an SVG named after it; the same bytes each time. ``words``: its description."""
    pyplot.rcParams.update({"svg.hashsalt": "coss", "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"})
    path = HERE / f"{draw.__name__}.svg"
    draw().savefig(path, transparent=False, metadata={"Date": None, "Creator": None, "Description": words})
    print(path)


if __name__ == "__main__":
    write(method, "CoSS")
