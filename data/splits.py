"""Pairs of labelled sets with common class numbers: training and test images, or queries and a database."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from data.datasets import open_source
from data.sources import ImageSource
from runtime.errors import UserError


def open_labelled(root: str, flag: str = "--data") -> tuple[ImageSource, ImageSource]:
    """The training and test images of ``root``: a folder that holds train/ and val/ or test/, or a named set.

    Test labels use the numbers of the training classes, since the test folder may lack a class. Raises
    :class:`UserError` if a split is missing or has no labels, or if a test class is not among the training classes.
    """
    train, test = (open_source(root, split, labelled=True, flag=flag) for split in ("train", "test"))
    if train.fingerprint() == test.fingerprint() and train.title == test.title:
        raise UserError(
            f"{flag} {root} does not hold train/ and val/ (or test/), expected both; give the folder that contains them"
        )
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise UserError(
            f"{flag} {root}: {len(unknown)} test classes are not among the {len(train.classes)} training "
            f"classes ({', '.join(unknown[:3])}…); the class folders must have the same names"
        )
    number = {name: i for i, name in enumerate(train.classes)}
    renumbered = np.array([number[name] for name in test.classes], dtype=np.int64)
    test = test.take(np.arange(len(test)))
    test.labels, test.classes = renumbered[test.labels], train.classes
    return train, test


QUERY_FOLDERS, DATABASE_FOLDERS = ("query", "queries"), ("database", "gallery")


def open_queries(spec: str, flag: str = "--data") -> tuple[ImageSource, ImageSource | None]:
    """Labelled queries, and the images to search; None to search among the other queries.

    There are two sets if ``spec`` is a folder with query/ (or queries/) and database/ (or gallery/); labels are then
    numbered by the class names of both together. Otherwise the queries are the test images of ``spec``, which may be
    anything that data.datasets.open_source opens. Raises :class:`UserError` if the images have no labels.
    """
    pair = [next((Path(spec) / name for name in names if (Path(spec) / name).is_dir()), None)
            for names in (QUERY_FOLDERS, DATABASE_FOLDERS)]
    if None in pair:
        return open_source(spec, "test", labelled=True, flag=flag), None
    queries, database = (open_source(str(folder), "test", labelled=True, flag=flag) for folder in pair)
    classes = sorted({*queries.classes, *database.classes})
    number = {name: i for i, name in enumerate(classes)}
    renumbered = []
    for source in (queries, database):
        taken = source.take(np.arange(len(source)))
        taken.labels = np.array([number[name] for name in source.classes], dtype=np.int64)[source.labels]
        taken.classes = classes
        renumbered.append(taken)
    return renumbered[0], renumbered[1]
