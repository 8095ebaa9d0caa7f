"""What --data may be: `open_source` opens folders, packed files, lists of paths, and named sets."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from data.folders import list_folder, scan, unreadable
from data.image_files import ImageNames, image_extensions
from data.own_source import OwnSource
from data.packed import PackedSource, is_packed
from data.sources import UNMIX, ArraySource, FileSource, ImageSource
from data.split_folders import EVALUATION_FOLDERS, SPLITS, are_splits, names_of
from runtime.errors import UserError
from runtime.outputs import no_link
from runtime.own import is_own, load_own, look_at_own
from runtime.packages import need_package
from runtime.regular import open_regular

SPEC_HELP = (
    "an image folder, a packed file (.pack), a .txt file of image paths, or one of demo, digits, cifar10, cifar100, "
    "stl10, or FILE.py:NAME of your own data set"
)


def open_source(spec: str, split: str = "train", labelled: bool = False, flag: str = "--data") -> ImageSource:
    """Open the images that --data names.

    spec is one of
    (a) a folder with one sub-folder per class, in the order of torchvision's ImageFolder, or a folder that holds
        train/ (and val/ or test/, used for split 'test');
    (b) a folder with images directly in it: all images in it and below it, without labels;
    (c) a .txt file with one path per line, absolute or relative to that file; blank lines and lines that begin with #
        are skipped;
    (d) a packed file written by pack_dataset.py, or a folder that holds train.pack (and val.pack or test.pack; a
        sub-folder train/ takes precedence over train.pack);
    (e) demo, digits, cifar10, cifar100 or stl10, or the name of any folder in `datasets_root()` that holds train/. A
        built-in name takes precedence over a folder of that name: write ./digits for the folder;
    (f) FILE.py:NAME, a function of the user's own that makes a data set (data.own_source).

    split is 'train' or 'test'. labelled=True requires labels; for stl10's training images it selects the small
    labelled part. Raises UserError, beginning with `flag` (the flag that gave `spec`), if the images are missing, there
    are none, or they lack the labels that were asked for.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    try:
        source = _find_source(spec, split, labelled)
    except UserError as error:
        raise UserError(str(error).replace("--data", flag, 1)) from None
    if labelled and source.labels is None:
        raise UserError(
            f"{flag} {spec} has images without labels ({source.mixture or source.title}), and labels are needed here; "
            + (UNMIX if source.mixture else "give a folder with one sub-folder per class")
        )
    return source


def check_there(spec: str, flag: str = "--data") -> None:
    """Raise UserError, beginning with `flag`, if nothing is called `spec`; see :func:`open_source`."""
    if is_own(spec):
        look_at_own(spec, flag)
        return
    path = Path(os.path.expanduser(spec))  # noqa: PTH111  (~nobody is an unknown path, not an error)
    if spec in _BUILT_IN or (spec and _is_folder(path)) or _is_file(path) or _is_stored(spec):
        return
    near = difflib.get_close_matches(spec, _BUILT_IN, n=2, cutoff=0.5)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise UserError(f"{flag} {spec or repr('')} was not found{hint}; give {SPEC_HELP}")


def datasets_root() -> Path:
    """The folder of the named sets: $COSS_DATASETS, else ./datasets."""
    return Path(os.environ.get("COSS_DATASETS") or "datasets")


def _is_stored(spec: str) -> bool:
    return "/" not in spec and spec != "" and _is_folder(datasets_root() / spec / "train")


def _find_source(spec: str, split: str, labelled: bool) -> ImageSource:
    check_there(spec)
    if is_own(spec):
        return OwnSource(load_own(spec, "--data"), split)
    stored = datasets_root() / spec
    if spec in _BUILT_IN:
        if _is_stored(spec) and spec != "demo":  # write_demo itself checks that the demo set is complete
            return _open_folder(stored, split, spec)
        return _BUILT_IN[spec](spec, split, labelled)
    path = Path(os.path.expanduser(spec))  # noqa: PTH111
    if _is_file(path):
        return _open_list(path, spec)
    return _open_folder(path if spec and _is_folder(path) else stored, split, spec)


# Path's own methods raise OSError for a name that is too long (such as a line of prose in a .txt); these do not.
def _is_folder(path: Path) -> bool:
    return os.path.isdir(path)  # noqa: PTH112


def _is_file(path: Path) -> bool:
    return os.path.isfile(path)  # noqa: PTH113


# ---- folders and lists of files


def _open_folder(folder: Path, split: str, spec: str) -> ImageSource:
    folders, has_images = list_folder(folder, spec)
    if not has_images:
        packed = _packed_splits(folder, folders)
        if packed or are_splits(folders, lambda: list_folder(folder / "train", spec)[1]):
            folder = _choose_split(folder, folders, packed, split, spec)
            if folder.suffix == ".pack":
                return PackedSource(folder)
    elif "train" in folders and {*EVALUATION_FOLDERS}.intersection(folders):
        raise UserError(f"--data {spec} has images directly beside {', '.join(f + '/' for f in folders)}; move them "
                        f"out, or give {folder / 'train'}")
    return _open_tree(folder, spec)


def _open_tree(folder: Path, spec: str) -> ImageSource:
    tree = scan(folder, spec)
    if not len(tree.names):
        raise UserError(
            f"--data {spec} contains no images: nothing below {folder} ends in {', '.join(image_extensions())}"
            f"{''.join(f' ({note})' for note in tree.notes)}; give {SPEC_HELP}"
        )
    source = FileSource(folder, tree.names, tree.labels, tree.classes, str(folder))
    source.notes, source.mixture = tree.notes, tree.mixture
    return source


def _packed_splits(folder: Path, folders: list[str]) -> set[str]:
    """The splits that the folder holds as packed files; none if its sub-folders are classes."""
    return {name for name in SPLITS if _is_file(folder / f"{name}.pack")} if SPLITS.issuperset(folders) else set()


def _choose_split(folder: Path, folders: list[str], packed: set[str], split: str, spec: str) -> Path:
    wanted = names_of(split)
    for name in wanted:
        if name in folders:
            return folder / name
        if name in packed:
            return folder / f"{name}.pack"
    raise UserError(
        f"--data {spec} has {', '.join([f + '/' for f in folders] + sorted(f + '.pack' for f in packed))} but no "
        f"{' or '.join(f + '/' for f in wanted)} for the {split} images; add it, or name the folder to use"
    )


def _open_list(path: Path, spec: str) -> ImageSource:
    if is_packed(path):
        return PackedSource(path)
    if path.suffix.lower() == ".tar":
        raise UserError(f"--data {spec} is a tar file; pack it once with pack_dataset.py --data {spec} --output "
                        "NAME.pack and give NAME.pack")
    if path.suffix.lower() != ".txt":
        raise UserError(f"--data {spec} is a file but not a .txt list; give {SPEC_HELP}")
    try:
        with open_regular(path) as file:
            lines = file.read().decode("utf-8-sig", "surrogateescape").split("\n")
    except OSError as error:
        raise UserError(unreadable(spec, error)) from None
    names = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    files = ImageNames()
    names = [name for name in names if not files.leaves_out(_judged(name))]
    if not names:
        raise UserError(f"--data {spec} lists no images{''.join(f' ({note})' for note in files.notes())}; write one "
                        "image path per line")
    missing = [name for name in names if not _is_file(path.parent / name)]
    if missing:
        raise UserError(
            f"--data {spec} lists {len(names):,} files, of which {len(missing):,} "
            f"{'are' if len(missing) > 1 else 'is'} missing, first {path.parent / missing[0]}; correct the list: its "
            "paths are absolute or relative to its own folder"
        )
    source = FileSource(path.parent, names, None, [], str(path))
    source.notes = files.notes()
    return source


def _judged(name: str) -> str:
    """The part of a listed path whose hidden parts count: of an absolute path only the file's own name does."""
    return os.path.basename(name) if os.path.isabs(name) else name  # noqa: PTH117, PTH119


# ---- named sets


def _open_demo(name: str, split: str, labelled: bool) -> ImageSource:
    from data.demo import write_demo

    root = datasets_root() / name
    try:
        with _one_process_at_a_time(name):
            write_demo(root)
    except OSError as error:
        raise UserError(
            f"--data demo could not be written into {root} ({error.strerror or error}); "
            "set COSS_DATASETS to a folder that you can write to"
        ) from None
    return _open_folder(root, split, name)


def _open_digits(name: str, split: str, labelled: bool) -> ImageSource:
    """scikit-learn's 1,797 digits of 8 x 8 pixels: the first 1,437 are training images, the last 360 test images."""
    digits = need_package("scikit-learn", "--data digits", module="sklearn.datasets").load_digits()
    rows = slice(None, 1437) if split == "train" else slice(1437, None)
    images = np.rint(digits.images[rows] * (255 / 16)).astype(np.uint8)
    images = np.repeat(images[..., None], 3, axis=-1)
    return ArraySource(images, digits.target[rows], [str(d) for d in range(10)], f"{name}/{split}")


def _open_downloaded(name: str, split: str, labelled: bool) -> ImageSource:
    """CIFAR-10, CIFAR-100 or STL-10, downloaded by torchvision, which checks the MD5 sum."""
    from torchvision import datasets

    kind = getattr(datasets, name.upper())
    if name == "stl10":
        part = split if split == "test" or labelled else "train+unlabeled"
        options = {"split": part}
    else:
        part, options = split, {"train": split == "train"}
    root = datasets_root() / name
    try:
        with _one_process_at_a_time(name):
            dataset = kind(str(root), download=True, **options)
    except Exception as error:  # URLError, timeouts, RuntimeError for a wrong MD5, a full disk, ...
        raise UserError(
            f"--data {name} could not be downloaded from {kind.url} into {root} "
            f"({' '.join(str(error).split())}); check the network, put the images there as {root}/train/CLASS/*.png, "
            "or set COSS_DATASETS to the folder that holds them"
        ) from None
    if name != "stl10":
        return ArraySource(dataset.data, dataset.targets, dataset.classes, f"{name}/{part}")
    images = dataset.data.transpose(0, 2, 3, 1)  # a view: STL-10 keeps [N, 3, H, W]
    if part == "train+unlabeled":
        return ArraySource(images, None, [], f"{name}/{part}")
    return ArraySource(images, dataset.labels, dataset.classes, f"{name}/{part}")


@contextmanager
def _one_process_at_a_time(name: str) -> Iterator[None]:
    """The ranks of a machine start together: one writes the set, the others wait until it is complete."""
    try:
        import fcntl

        datasets_root().mkdir(parents=True, exist_ok=True)
        lock = open(datasets_root() / f".{name}.lock", "wb", opener=no_link)  # noqa: PTH123, SIM115
    except (ImportError, OSError):
        yield  # Windows, or a read-only folder, in which no process writes
        return
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


_BUILT_IN: dict[str, Callable[[str, str, bool], ImageSource]] = {
    "demo": _open_demo,
    "digits": _open_digits,
    "cifar10": _open_downloaded,
    "cifar100": _open_downloaded,
    "stl10": _open_downloaded,
}
