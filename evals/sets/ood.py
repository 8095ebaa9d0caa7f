"""Out-of-distribution images, in folders whose classes are those of a training set or some of them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.datasets import open_source
from data.folders import list_folder
from data.sources import ImageSource
from runtime.errors import UserError

V2 = "imagenetv2-"  # its three variants unpack to imagenetv2-matched-frequency-format-val, -threshold0.7-… and so on
WHERE = {
    "v2": "https://github.com/modestyachts/ImageNetV2",
    "sketch": "https://github.com/HaohanWang/ImageNet-Sketch",
    "r": "https://github.com/hendrycks/imagenet-r",
    "a": "https://github.com/hendrycks/natural-adv-examples",
    "c": "https://zenodo.org/records/2235448",
}


@dataclass(frozen=True)
class Elsewhere:
    """Images with labels numbered as the training classes; ``columns``: the classes that have a folder here, int64 [c]
    ascending. ``corruption`` and ``severity`` (1 to 5) in the layout of ImageNet-C."""

    name: str
    source: ImageSource
    columns: np.ndarray
    corruption: str | None = None
    severity: int | None = None

    @property
    def labels(self) -> np.ndarray:
        """int64 [n]."""
        return self.source.labels


def open_elsewhere(name: str, folder: str, classes: list[str]) -> list[Elsewhere]:
    """The sets that lie in ``folder``: one of class folders, the variants of ImageNet-v2, or ImageNet-C's
    corruption/severity/class.

    Class folders are matched to ``classes`` by name; folders named 0, 1 … (ImageNet-v2) by number, unless ``classes``
    have such names. Raises :class:`UserError` for a missing folder and for a class that was not trained on.
    """
    path = Path(os.path.expanduser(folder))  # noqa: PTH111  (~nobody is an unknown path, not an error)
    if not os.path.isdir(path):  # noqa: PTH112  (Path.is_dir raises OSError for an over-long name)
        page = f"; get it under its terms from {WHERE[name.lower()]}" if name.lower() in WHERE else ""
        raise UserError(f"--ood {name}={folder} is not a folder; it should hold one folder per class{page}")
    folders, has_images = list_folder(path, f"--ood {name}")
    variants = [] if has_images else [f for f in folders if f.startswith(V2)]
    if variants:
        short = {f: f.removeprefix(V2).removesuffix("-format-val") for f in variants}
        return [_open(f"{name}/{short[f]}", path / f, classes) for f in variants]
    found = [] if has_images else _corruptions(path, folders)
    if found:
        return [_open(f"{name}/{corruption}/{severity}", place, classes, corruption, severity)
                for corruption, severity, place in found]
    return [_open(name, path, classes)]


def _corruptions(path: Path, folders: list[str], depth: int = 1) -> list[tuple[str, int, Path]]:
    """Corruption, severity and folder, also if corruptions are in groups (noise/, blur/ …); [] if there is anything
    else."""
    found = []
    for name in folders:
        inner, has_images = list_folder(path / name, f"--ood {path}")
        if has_images or not inner:
            return []
        if {*inner} <= {"1", "2", "3", "4", "5"} and not list_folder(path / name / inner[0], f"--ood {path}")[1]:
            found += [(name, int(severity), path / name / severity) for severity in inner]
        elif depth:
            below = _corruptions(path / name, inner, depth - 1)
            if not below:
                return []
            found += below
        else:
            return []
    return found


def _open(name: str, folder: Path, classes: list[str], corruption: str | None = None,
          severity: int | None = None) -> Elsewhere:
    source = open_source(str(folder), "test", labelled=True, flag=f"--ood {name}")
    number = {c: i for i, c in enumerate(classes)}
    if not set(source.classes) <= set(number) and all(c.isdecimal() for c in source.classes):
        number = {c: int(c) for c in source.classes if int(c) < len(classes)}
    unknown = [c for c in source.classes if c not in number]
    if unknown:
        raise UserError(f"--ood {name}: {len(unknown)} of the {len(source.classes)} class folders in {folder} are none "
                        f"of the {len(classes)} training classes ({', '.join(unknown[:3])}…); the folders must have "
                        "the same names, or be numbers that count the training classes in order")
    here = np.array([number[c] for c in source.classes], dtype=np.int64)
    source = source.take(np.arange(len(source)))
    source.labels, source.classes = here[source.labels], classes
    return Elsewhere(name, source, np.unique(here), corruption, severity)
