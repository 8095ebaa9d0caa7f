"""The few labelled images of semi-supervised evaluation: drawn, equally many per class, or listed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.sources import ImageSource
from runtime.errors import UserError
from runtime.regular import read_regular_text


def balanced_subset(source: ImageSource, share: float, seed: int, flag: str = "--labels") -> ImageSource:
    """``share`` in (0, 1] of the images, equally many of each class (all of a class that has fewer), drawn by ``seed``.

    The draw of a class depends on its number and ``seed`` alone, and a smaller share of the same ``seed`` is contained
    in a larger one. Raises UserError where not one image a class is left.
    """
    if not 0 < share <= 1:
        raise UserError(f"{flag} {share:g} is not a share of the images; give a number above 0, up to 1, or a file")
    if share == 1:
        return source
    there = np.unique(source.labels)
    each = round(share * len(source) / len(there))
    if not each:
        raise UserError(f"{flag} {share:g} leaves no image a class of {source.description}; give a larger share")
    rows = [np.random.default_rng((seed, label)).permutation(np.flatnonzero(source.labels == label))[:each]
            for label in there.tolist()]
    taken = source.take(np.sort(np.concatenate(rows)))
    taken.title = f"{source.title} ({each} labels a class, seed {seed})"
    return taken


def listed_subset(source: ImageSource, path: str | Path, flag: str = "--labels") -> ImageSource:
    """The images that a text file lists, one a line, in the source's order: file names (SimCLR's 1percent.txt), or
    paths as the source names them. Raises UserError for a name that is not there, or that several images have."""
    try:
        lines = read_regular_text(path).splitlines()
    except OSError as error:
        raise UserError(f"{flag} {path} could not be read ({error.strerror}); give a share such as 0.01, or a file "
                        "with one image name a line") from None
    wanted = {line.strip() for line in lines if line.strip()}
    if not wanted:
        raise UserError(f"{flag} {path} lists no image; write one image name a line")
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(source.names):
        for key in {name, name.rpartition("/")[2]} & wanted:
            rows.setdefault(key, []).append(row)
    missing = sorted(wanted - rows.keys())
    if missing:
        raise UserError(f"{flag} {path} lists {len(missing):,} of {len(wanted):,} images that {source.title} lacks, "
                        f"the first is {missing[0]}; give the list that belongs to these images")
    double = next((key for key, found in rows.items() if len(found) > 1), None)
    if double:
        raise UserError(f"{flag} {path} lists {double}, and {len(rows[double])} images of {source.title} are so "
                        "called; list paths below that folder")
    taken = source.take(np.unique(np.concatenate(list(rows.values()))))
    taken.title = f"{source.title} ({len(taken):,} images listed in {path})"
    return taken
