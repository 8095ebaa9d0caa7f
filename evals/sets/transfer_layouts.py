"""The type of a transfer set, and readers of torchvision's layouts, with the official splits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.folders import scan
from data.sources import ArraySource, FileSource, ImageSource
from runtime.errors import UserError

CALTECH_TRAINING = 30  # images a class; Fei-Fei, Fergus and Perona, 2004


@dataclass(frozen=True)
class TransferSet:
    """Images to train on, to validate on (None: a share of the training images is to be drawn) and to test on.

    metric: 'top1', 'per_class' or 'map11' (evals/transfer.py). marks: of a set whose images have several labels (VOC
    2007) those of the three parts, int64 [n, C] of 1, -1 and 0 (difficult); its sources have none, all others have.
    """

    name: str
    metric: str
    classes: list[str]
    train: ImageSource
    validation: ImageSource | None
    test: ImageSource
    marks: dict[str, np.ndarray] = field(default_factory=dict)

    def parts(self) -> dict[str, ImageSource]:
        """The sources that exist, in order."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {part: source for part, source in parts.items() if source is not None}

    def labels(self, part: str) -> np.ndarray:
        """int64 [n], or [n, C] where images have several."""
        return self.marks[part][:len(self.parts()[part])] if self.marks else self.parts()[part].labels

    def subset(self, fraction: float) -> TransferSet:
        """Only the first ``fraction`` of each class's training and validation images (of all, where they have several
        labels)."""
        return replace(self, train=self.train.subset(fraction),
                       validation=self.validation and self.validation.subset(fraction))

    def with_parts(self, parts: dict[str, ImageSource]) -> TransferSet:
        """The same set of these sources, which are its own but for images that they leave out."""
        marks = {part: np.delete(self.labels(part), source.left_out, axis=0) for part, source in parts.items()}
        return replace(self, **parts, marks=marks if self.marks else {})

    @property
    def description(self) -> str:
        """One line that describes its images."""
        sizes = ", ".join(f"{len(source):,} {part}" for part, source in self.parts().items())
        return f"{self.name}: {len(self.classes)} classes; {sizes} images"


class Listing(NamedTuple):
    """Files below a folder, and a label or a row of marks for each."""

    files: list[Path]
    labels: np.ndarray


class Layout(NamedTuple):
    """A named set: its metric, the folder that torchvision makes for it, who reads it, and where it comes from."""

    metric: str
    folder: str
    read: Callable[[Path, str, str, bool, int], TransferSet]
    page: str
    downloads: bool = True


def _set(name: str, metric: str, root: Path, classes: list[str], *listings: Listing) -> TransferSet:
    """A set of files below ``root``: training, validation where it has one, and test."""
    parts = ("train", "validation", "test") if len(listings) == 3 else ("train", "test")
    sources: dict[str, ImageSource | None] = {"validation": None}
    for part, listing in zip(parts, listings, strict=True):
        if not listing.files:
            raise RuntimeError(f"no {part} image is listed")
        several = listing.labels.ndim == 2
        sources[part] = FileSource(root, (file.relative_to(root).as_posix() for file in listing.files),
                                   None if several else listing.labels, [] if several else classes, f"{root} ({part})")
    marks = {part: listing.labels for part, listing in zip(parts, listings, strict=True) if listing.labels.ndim == 2}
    return TransferSet(name, metric, classes, **sources, marks=marks)


def _of_torchvision(kind: str, *splits: str, **options: Any) -> Callable[..., TransferSet]:
    """A reader of one of torchvision's classes, with its names of the training (and validation) and test splits."""
    def read(root: Path, name: str, metric: str, download: bool, seed: int) -> TransferSet:
        from torchvision import datasets

        parts = [getattr(datasets, kind)(str(root), split=split, download=download and split == splits[0], **options)
                 for split in splits]
        listings = [_listing(part) for part in parts]
        numbers = range(max(int(listing.labels.max()) for listing in listings) + 1)
        # Flowers102 has no names of classes before torchvision 0.22.
        return _set(name, metric, root, list(getattr(parts[0], "classes", map(str, numbers))), *listings)

    return read


def _listing(dataset: Any) -> Listing:
    """torchvision's classes keep the same things under three names."""
    if hasattr(dataset, "_samples"):
        files, labels = zip(*dataset._samples, strict=True)
    else:
        files = dataset._images if hasattr(dataset, "_images") else dataset._image_files
        labels = dataset._labels
    return Listing([Path(file) for file in files], np.asarray(labels, dtype=np.int64))


def _arrays(kind: str) -> Callable[..., TransferSet]:
    """A reader of CIFAR or STL-10, which are held in memory."""
    def read(root: Path, name: str, metric: str, download: bool, seed: int) -> TransferSet:
        from torchvision import datasets

        sources = []
        for part in ("train", "test"):
            options = {"split": part} if kind == "STL10" else {"train": part == "train"}
            dataset = getattr(datasets, kind)(str(root), download=download and part == "train", **options)
            labels = dataset.labels if kind == "STL10" else dataset.targets
            images = dataset.data.transpose(0, 2, 3, 1) if kind == "STL10" else dataset.data
            sources.append(ArraySource(images, labels, dataset.classes, f"{name}/{part}"))
        train, test = sources
        return TransferSet(name, metric, train.classes, train, None, test)

    return read


def _caltech101(root: Path, name: str, metric: str, download: bool, seed: int) -> TransferSet:
    """30 images of each class, drawn by ``seed``, train and validate, all others test. BACKGROUND_Google is a class
    where it is there, which makes the 102 of the literature (Kornblith et al., table 1)."""
    if download:
        from torchvision import datasets

        datasets.Caltech101(str(root), download=True)
    folder = root / "caltech101" / "101_ObjectCategories"
    if not folder.is_dir():
        raise RuntimeError("no such folder")
    tree = scan(folder, str(folder))
    random = np.random.default_rng(seed)
    groups = [np.flatnonzero(tree.labels == c) for c in range(len(tree.classes))]
    small = next((tree.classes[c] for c, group in enumerate(groups) if len(group) <= CALTECH_TRAINING), None)
    if small:
        raise RuntimeError(f"class {small} has no more than {CALTECH_TRAINING} images")
    fit = np.sort(np.concatenate([random.choice(group, CALTECH_TRAINING, replace=False) for group in groups]))
    test = np.setdiff1d(np.arange(len(tree.labels)), fit)
    listings = [Listing([folder / tree.names[i] for i in rows], tree.labels[rows]) for rows in (fit, test)]
    return _set(name, metric, folder, tree.classes, *listings)


SUN_PARTITIONS = "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip"


def lines_of(file: Path) -> list[str]:
    """The lines of a list of names that are not empty. Raises OSError."""
    return [line for line in file.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if line.strip()]


def _sun397(root: Path, name: str, metric: str, download: bool, seed: int) -> TransferSet:
    """The first of the ten official partitions: 50 images a class to train, 50 to test (Xiao et al., CVPR 2010)."""
    if download:
        from torchvision import datasets

        datasets.SUN397(str(root), download=True)
    folder = root / "SUN397"
    classes = [line[3:].strip() for line in lines_of(folder / "ClassName.txt")]
    number = {c: i for i, c in enumerate(classes)}
    places = [folder, folder / "Partitions", folder / "partitions", root / "Partitions", root]
    home = next((place for place in places if (place / "Training_01.txt").is_file()), None)
    if home is None:
        raise UserError(f"--datasets {name}: the official split Training_01.txt and Testing_01.txt is not in {folder} "
                        f"or {folder}/Partitions; unpack {SUN_PARTITIONS} there")

    def listing(file: str) -> Listing:
        lines = [line.strip().strip("/") for line in lines_of(home / file)]
        return Listing([folder / line for line in lines],
                       np.array([number["/".join(line.split("/")[1:-1])] for line in lines], dtype=np.int64))

    return _set(name, metric, folder, classes, listing("Training_01.txt"), listing("Testing_01.txt"))


def _voc2007(root: Path, name: str, metric: str, download: bool, seed: int) -> TransferSet:
    """The classification task's train, val and test images, with its labels 1, -1 and 0 (only difficult objects)."""
    if download:
        from torchvision import datasets

        for part in ("train", "test"):
            datasets.VOCDetection(str(root), year="2007", image_set=part, download=True)
    folder = root / "VOCdevkit" / "VOC2007"
    lists = folder / "ImageSets" / "Main"
    classes = sorted(path.name[:-len("_train.txt")] for path in lists.glob("*_train.txt"))
    if not classes:
        raise RuntimeError(f"no class's list in {lists}")

    def listing(part: str) -> Listing:
        tables = [dict(line.split() for line in lines_of(lists / f"{c}_{part}.txt"))
                  for c in classes]
        return Listing([folder / "JPEGImages" / f"{image}.jpg" for image in tables[0]],
                       np.array([[int(table[image]) for table in tables] for image in tables[0]], dtype=np.int64))

    return _set(name, metric, folder, classes, listing("train"), listing("val"), listing("test"))


LAYOUTS: dict[str, Layout] = {
    "cifar10": Layout("top1", "cifar-10-batches-py", _arrays("CIFAR10"), "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "cifar100": Layout("top1", "cifar-100-python", _arrays("CIFAR100"), "https://www.cs.toronto.edu/~kriz/cifar.html"),
    "stl10": Layout("top1", "stl10_binary", _arrays("STL10"), "https://cs.stanford.edu/~acoates/stl10/"),
    "caltech101": Layout("per_class", "caltech101", _caltech101, "https://data.caltech.edu/records/mzrjq-6wc02"),
    "cars": Layout("top1", "stanford_cars", _of_torchvision("StanfordCars", "train", "test"),
                   "https://github.com/pytorch/vision/issues/7545, since its own page no longer exists",
                   downloads=False),
    "dtd": Layout("top1", "dtd", _of_torchvision("DTD", "train", "val", "test"),
                  "https://www.robots.ox.ac.uk/~vgg/data/dtd/"),
    "flowers102": Layout("per_class", "flowers-102", _of_torchvision("Flowers102", "train", "val", "test"),
                         "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/"),
    "pets": Layout("per_class", "oxford-iiit-pet", _of_torchvision("OxfordIIITPet", "trainval", "test"),
                   "https://www.robots.ox.ac.uk/~vgg/data/pets/"),
    "aircraft": Layout("per_class", "fgvc-aircraft-2013b", _of_torchvision("FGVCAircraft", "train", "val", "test"),
                       "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/"),
    "food101": Layout("top1", "food-101", _of_torchvision("Food101", "train", "test"),
                      "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/"),
    "sun397": Layout("top1", "SUN397", _sun397, "https://vision.princeton.edu/projects/2010/SUN/"),
    "voc2007": Layout("map11", "VOCdevkit", _voc2007, "https://host.robots.ox.ac.uk/pascal/VOC/voc2007/"),
}
