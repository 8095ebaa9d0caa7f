"""Whether the top folders of a tree are splits (train/, val/, ...) or classes: one rule for folders and tars."""

from __future__ import annotations

from collections.abc import Callable, Collection

EVALUATION_FOLDERS = ("val", "test", "valid", "validation")  # looked for in this order
SPLITS = frozenset(("train", *EVALUATION_FOLDERS))


def are_splits(tops: Collection[str], train_is_flat: Callable[[], bool]) -> bool:
    """Whether the top folders are splits rather than classes (COCO has a class called train).

    They are if all of them have such names. If there are other folders beside them (annotations/, ...), at least two
    must have names of splits, and train/ must hold classes: ``train_is_flat`` says whether images lie directly in it.
    """
    splits = SPLITS.intersection(tops)
    if len(splits) == len(tops):
        return bool(splits)
    return "train" in splits and len(splits) > 1 and not train_is_flat()


def names_of(split: str) -> tuple[str, ...]:
    """The folders that may hold the images of ``split``, 'train' or 'test', in order of preference."""
    return ("train",) if split == "train" else EVALUATION_FOLDERS
