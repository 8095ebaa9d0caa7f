"""The data sets of the transfer benchmarks, by name, in torchvision's layout or in your own folders."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import numpy as np

from data.datasets import datasets_root, open_source
from data.sources import ImageSource
from data.split_folders import EVALUATION_FOLDERS
from data.splits import open_labelled
from evals.sets.transfer_layouts import LAYOUTS, Layout, TransferSet
from runtime.errors import UserError
from runtime.packages import package_missing


def open_transfer_set(name: str, root: Path, download: bool = False, seed: int = 0) -> TransferSet:
    """The set called ``name`` (a key of LAYOUTS, or any folder of ``root`` that holds train/).

    Looked for as root/name/train (class folders, see :func:`open_transfer_folder`), then as torchvision lays it out in
    ``root`` or in root/name. ``download`` lets torchvision fetch it into ``root``. ``seed`` draws the split of
    Caltech-101, which has no official one. Raises :class:`UserError` if it is missing or incomplete.
    """
    root = Path(os.path.expanduser(root))  # noqa: PTH111  (~nobody is an unknown path, not an error)
    if os.path.isdir(root / name / "train"):  # noqa: PTH112  (Path.is_dir raises OSError for an over-long name)
        return open_transfer_folder(str(root / name), "--root", name)
    layout = LAYOUTS.get(name)
    if layout is None:
        raise UserError(f"--datasets {name} is neither {root / name}/train nor one of {', '.join(LAYOUTS)}; "
                        f"give one of these, or make {root / name} a folder that holds train/ and test/")
    home = next((place for place in (root, root / name) if (place / layout.folder).is_dir()), root)
    try:
        return layout.read(home, name, layout.metric, download, seed)
    except UserError:
        raise
    except ImportError as error:
        raise package_missing(str(error.name), f"--datasets {name}") from None
    except Exception as error:  # torchvision: RuntimeError for what is not there, URLError, a wrong MD5, damaged lists
        with contextlib.suppress(OSError):
            (root / layout.folder).rmdir()  # torchvision makes it before it fetches; only an empty one goes
        raise UserError(_missing(name, layout, root, download, error)) from None


def sets_in(root: str | Path) -> list[str]:
    """Names of the sets that ``root`` holds in one of the ways that :func:`open_transfer_set` knows."""
    root = Path(root)
    folders = {path.parent.name for path in root.glob("*/train") if path.is_dir()}
    known = {name for name, layout in LAYOUTS.items()
             if any((place / layout.folder).is_dir() for place in (root, root / name))}
    return sorted(folders | known)


def _missing(name: str, layout: Layout, root: Path, download: bool, error: Exception) -> str:
    expected = f"{root / layout.folder} (torchvision's layout) or {root / name}/train and test"
    reason = " ".join(str(error).split()).replace(" You can use download=True to download it", "")[:200]
    if not layout.downloads:
        how = f"get it under its terms from {layout.page}"
    elif download:
        how = f"check the network, or get it under its terms from {layout.page}"
    else:
        how = f"--download fetches it from where {layout.page} offers it, under its terms"
    what = "could not be fetched" if download and layout.downloads else (
        "is incomplete" if (root / layout.folder).is_dir() else "was not found")
    return f"--datasets {name} {what} ({reason}): {expected} is expected; {how}"


# ---- your own folders


def open_transfer_folder(spec: str, flag: str = "--data", name: str | None = None) -> TransferSet:
    """Labelled images with train/ and val/ or test/ (or such packed files), or a name that data/datasets.py knows.

    With both val/ and test/ the first validates and the second tests. The metric is top-1, except for a set with the
    name of one in LAYOUTS.
    """
    train, test = open_labelled(spec, flag)
    name = name or Path(spec).name or spec
    metric = LAYOUTS[name].metric if name in LAYOUTS and LAYOUTS[name].metric != "map11" else "top1"
    folder = Path(spec) if Path(spec).is_dir() else datasets_root() / spec
    held_out, tested = ([path for part in names for path in (folder / part, folder / f"{part}.pack") if path.exists()]
                        for names in ([part for part in EVALUATION_FOLDERS if part != "test"], ["test"]))
    if not held_out or not tested:
        return TransferSet(name, metric, train.classes, train, None, test)
    validation, test = (renumbered(open_source(str(path), labelled=True, flag=flag), train.classes, flag)
                        for path in (held_out[0], tested[0]))
    return TransferSet(name, metric, train.classes, train, validation, test)


def renumbered(source: ImageSource, classes: list[str], flag: str) -> ImageSource:
    """The source with its labels numbered by ``classes``. Raises :class:`UserError` for a class that is not there."""
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in source.classes if name not in number]
    if unknown:
        raise UserError(f"{flag} {source.title} has {len(unknown)} classes that are not among the {len(classes)} "
                        f"training classes ({', '.join(unknown[:3])}…); the class folders must have the same names")
    taken = source.take(np.arange(len(source)))
    taken.labels = np.array([number[name] for name in source.classes], dtype=np.int64)[source.labels]
    taken.classes = classes
    return taken
