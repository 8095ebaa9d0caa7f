"""Which of a tree's top folders are train/, val/ and their like, rather than classes: one rule for folders and tars."""

from __future__ import annotations

from collections.abc import Callable, Collection

EVALUATION_FOLDERS = ("val", "test", "valid", "validation")  # looked for in this order
SPLITS = frozenset(("train", *EVALUATION_FOLDERS))


def are_splits(tops: Collection[str], train_is_flat: Callable[[], bool]) -> bool:
    """Whether some of the top folders are splits; COCO has a class called train.

    They are if all of them have such names. With other folders beside them (annotations/, ...) it takes two splits, and
    classes inside train/: ``train_is_flat`` says whether images lie directly in it.
    """
    splits = SPLITS.intersection(tops)
    if len(splits) == len(tops):
        return bool(splits)
    return "train" in splits and len(splits) > 1 and not train_is_flat()


def names_of(split: str) -> tuple[str, ...]:
    """The folders that may hold the images of ``split``, 'train' or 'test', the first choice first."""
    return ("train",) if split == "train" else EVALUATION_FOLDERS
