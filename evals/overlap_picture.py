"""The picture of ``evaluate.py overlap``: students side by side, in bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals.plane_picture import new_figure
from runtime.state import write_atomic

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#444444", "#999933")
WHOLE = {"cka": "linear CKA", "cka_unbiased": "CKA,\nunbiased", "row_cosine": "cosine\nof rows",
         "space_cosine": "cosine\nof columns", "dimension_correlation": "correlation\nof columns"}
LOST = {"trustworthiness": "trust.", "continuity": "cont."}


def save_picture(path: Path, students: Mapping[str, Mapping[str, Any]], chance: Mapping[int, float], title: str,
                 ) -> Path:
    """Bars of each student's measures, as evals.overlap gives them, a colour a student; ``chance``: percent by k.

    Raises :class:`UserError` without matplotlib.
    """
    figure = new_figure(figsize=(14, 4 + 0.25 * len(students)), layout="constrained")
    shared, lost, whole = figure.subplots(1, 3)
    first = next(iter(students.values()))
    ks = list(first["shared"])
    _bars(shared, [str(k) for k in ks], {name: list(x["shared"].values()) for name, x in students.items()}, "{:.2g}")
    shared.plot(range(len(ks)), [chance[k] for k in ks], "k_", markersize=30, label="by chance")
    shared.set(title="nearest neighbours shared with the teacher", xlabel="k", ylabel="%", ylim=(0, None))

    some = sorted({min(ks), min(ks, key=lambda k: abs(k - 11)), max(ks)} - {1})  # they differ little between sizes
    _bars(lost, [f"{word}\nk={k}" for word in LOST.values() for k in some],
          {name: [100 * (1 - x[word][k]) for word in LOST for k in some] for name, x in students.items()}, "{:.2g}")
    lost.set(title="what neighbourhoods lose (smaller is better)", ylabel="100 (1 - measure); 50 by chance",
             ylim=(0, None))

    _bars(whole, list(WHOLE.values()), {name: [x[key] for key in WHOLE] for name, x in students.items()}, "{:.2f}")
    whole.set(title="global similarity")
    whole.axhline(0, color="black", linewidth=0.8)
    for axis in (shared, lost, whole):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.legend(*shared.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(students) + 1),
                  frameon=False)
    return write_atomic(path, lambda file: figure.savefig(file, dpi=120, format="png"))


def _bars(axis: Any, places: Sequence[str], groups: Mapping[str, Sequence[float | None]], form: str) -> None:
    """A group of bars at each place, one for each name; None leaves its place empty."""
    width = 0.8 / len(groups)
    for number, (name, values) in enumerate(groups.items()):
        x = np.arange(len(places)) + (number - (len(groups) - 1) / 2) * width
        heights = [np.nan if value is None else value for value in values]
        bars = axis.bar(x, heights, width, label=name, color=COLOURS[number % len(COLOURS)])
        if form and len(groups) * len(places) <= 40:
            axis.bar_label(bars, ["" if np.isnan(h) else form.format(h) for h in heights], fontsize=6, padding=1)
    axis.set_xticks(range(len(places)), places, fontsize=8)
