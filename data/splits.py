"""A labelled training set and a labelled test set whose classes mean the same."""

from __future__ import annotations

import numpy as np

from data.datasets import open_source
from data.sources import ImageSource
from runtime.errors import UserError


def open_labelled(root: str, flag: str = "--data") -> tuple[ImageSource, ImageSource]:
    """Train and test images of ``root``: a folder that holds train/ and val/ or test/, or a name.

    The test labels are numbered by the training classes' names, since an evaluation folder may lack a class.
    Raises :class:`UserError` if a split is missing, has no labels, or has a class that is not trained on.
    """
    train, test = (open_source(root, split, labelled=True, flag=flag) for split in ("train", "test"))
    if train.fingerprint() == test.fingerprint() and train.title == test.title:
        raise UserError(
            f"{flag} {root} holds no train/ and val/ (or test/) folders to compare; give the folder above them"
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
