"""Images with boxes: COCO's format (one JSON file and a folder of images) and VOC's (an XML file an image)."""

from __future__ import annotations

import hashlib
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.sources import Names
from runtime.errors import UserError
from runtime.regular import open_regular, read_regular_text
from runtime.state import load_json

VOC_TRAIN, VOC_TEST = (("VOC2007", "trainval"), ("VOC2012", "trainval")), ("VOC2007", "test")


class Box(NamedTuple):
    """An object: its corners in pixels from the image's upper left, its class, its area as COCO counts it, and whether
    it counts neither way in a score: a crowd of COCO's, which is not trained on, or a difficult object of VOC's."""

    corners: tuple[float, float, float, float]  # x1, y1, x2, y2
    name: str
    area: float
    crowd: bool


class Photo(NamedTuple):
    """An image's file, height and width, and what is on it."""

    file: str
    size: tuple[int, int]
    boxes: list[Box]


class BoxSource:
    """N images and their M objects, as arrays that workers share.

    ``files`` [N]; ``sizes`` int64 [N, 2], height and width; ``starts`` int64 [N + 1], image i's objects being
    ``starts[i]:starts[i + 1]`` of ``boxes`` float32 [M, 4] (x1, y1, x2, y2), ``labels`` int64 [M] (``classes[label]``),
    ``areas`` float32 [M] and ``crowds`` bool [M].
    """

    def __init__(self, title: str, photos: list[Photo], classes: list[str], train_on_all: bool = False) -> None:
        self.title, self.classes, self.train_on_all = title, classes, train_on_all
        self.files = Names(photo.file for photo in photos)
        self.sizes = np.array([photo.size for photo in photos], np.int64).reshape(-1, 2)
        self.starts = np.cumsum([0, *(len(photo.boxes) for photo in photos)])
        boxes = [box for photo in photos for box in photo.boxes]
        number = {name: i for i, name in enumerate(classes)}
        self.boxes = np.array([box.corners for box in boxes], np.float32).reshape(-1, 4)
        self.labels = np.array([number[box.name] for box in boxes], np.int64)
        self.areas = np.array([box.area for box in boxes], np.float32)
        self.crowds = np.array([box.crowd for box in boxes], bool)

    def __len__(self) -> int:
        return len(self.files)

    def location(self, i: int) -> str:
        """The file of image i."""
        return self.files[i]

    def objects(self, i: int) -> slice:
        """Where image i's objects lie in the arrays."""
        return slice(int(self.starts[i]), int(self.starts[i + 1]))

    def trained(self, i: int) -> np.ndarray:
        """Which of the M objects image i is trained with, int64 [n]: those with an extent, without crowds but with
        VOC's difficult ones, as in detectron2."""
        rows = np.arange(self.starts[i], self.starts[i + 1])
        extent = (self.boxes[rows, 2:] > self.boxes[rows, :2]).all(1)
        return rows[extent & (self.train_on_all | ~self.crowds[rows])]

    def with_objects(self) -> np.ndarray:
        """int64 indices of the images that training has something to learn from, as everyone's."""
        return np.array([i for i in range(len(self)) if len(self.trained(i))], np.int64)

    def fingerprint(self) -> str:
        """SHA-256 of the images' names, sizes, objects and classes; where they lie is left out."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for file in self.files:
            digest.update(Path(file).name.encode("utf-8", "surrogateescape") + b"\n")
        for array in (self.sizes, self.starts, self.boxes, self.labels, self.areas, self.crowds):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def coco(self) -> dict[str, Any]:
        """Everything in COCO's format; an image's id is its index, a category's its label + 1, as a detector's."""
        x1, y1, x2, y2 = self.boxes.astype(float).T
        where = np.repeat(np.arange(len(self)), np.diff(self.starts))
        rows = zip(where.tolist(), self.labels.tolist(), x1.tolist(), y1.tolist(), (x2 - x1).tolist(),
                   (y2 - y1).tolist(), self.areas.astype(float).tolist(), self.crowds.tolist(), strict=True)
        return {"images": [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(self.sizes.tolist())],
                "categories": [{"id": i + 1, "name": name} for i, name in enumerate(self.classes)],
                "annotations": [{"id": n + 1, "image_id": image, "category_id": label + 1, "bbox": [x, y, w, h],
                                 "area": area, "iscrowd": int(crowd)}
                                for n, (image, label, x, y, w, h, area, crowd) in enumerate(rows)]}


def open_pair(root: str, flag: str = "--data") -> tuple[BoxSource, BoxSource]:
    """Training and test images of a folder in COCO's layout (annotations/instances_NAME.json and NAME/) or in VOC's
    (VOC2007 and, if present, VOC2012; the folder may be VOCdevkit or the one above). Raises :class:`UserError`.
    """
    folder = Path(root)
    for place in (folder, folder / "VOCdevkit"):
        if (place / VOC_TEST[0]).is_dir():
            train = [(place / name, split) for name, split in VOC_TRAIN if (place / name).is_dir()]
            return same_classes(read_voc(train, flag), read_voc([(place / VOC_TEST[0], VOC_TEST[1])], flag), flag)
    if (folder / "annotations").is_dir():
        train, test = (read_coco(*_coco_part(folder, word, flag), flag) for word in ("train", "val"))
        return same_classes(train, test, flag)
    raise UserError(f"{flag} {root} has no known layout, expected annotations/instances_train….json and "
                    "…val….json with image folders of the same names (COCO), or VOC2007/; or give --train and "
                    "--test, a file in COCO's format and a folder each")


def same_classes(train: BoxSource, test: BoxSource, flag: str = "--data") -> tuple[BoxSource, BoxSource]:
    """The pair with the test labels numbered as the training ones. Raises :class:`UserError` on an unknown class."""
    unknown = sorted(set(test.classes) - set(train.classes))
    if unknown:
        raise UserError(f"{flag}: the test images have {len(unknown)} classes that the training images lack "
                        f"({', '.join(unknown[:3])}), expected the same names in both")
    number = np.array([train.classes.index(name) for name in test.classes], np.int64)
    test.labels, test.classes = number[test.labels], train.classes
    return train, test


def read_coco(file: str | Path, images: str | Path, flag: str = "--data") -> BoxSource:
    """A file in COCO's format (images, annotations, categories) and the folder of its images."""
    try:
        content = load_json(Path(file))
        names = {category["id"]: str(category["name"]) for category in
                 sorted(content["categories"], key=lambda category: category["id"])}
        photos = {image["id"]: Photo(str(Path(images) / image["file_name"]), (image["height"], image["width"]), [])
                  for image in content["images"]}
        for annotation in content["annotations"]:
            x, y, w, h = map(float, annotation["bbox"])
            photos[annotation["image_id"]].boxes.append(
                Box((x, y, x + w, y + h), names[annotation["category_id"]], float(annotation.get("area", w * h)),
                    bool(annotation.get("iscrowd", 0))))
    except OSError as error:
        raise UserError(f"{flag} {file} cannot be read ({error.strerror or error}); give a file in COCO's format"
                        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
        raise UserError(f"{flag} {file} is not in COCO's format ({reason}), expected images, annotations with bbox, "
                        "and categories, whose ids fit together") from None
    if len(set(names.values())) < len(names):
        raise UserError(f"{flag} {file} has two categories with the same name; rename one")
    return _checked(BoxSource(Path(file).stem, list(photos.values()), list(names.values())), file, flag)


def read_voc(parts: Sequence[tuple[str | Path, str]], flag: str = "--data") -> BoxSource:
    """The images that ImageSets/Main/SPLIT.txt of each VOC folder lists, ``parts`` being (folder, SPLIT).

    Coordinates are taken to count from 1, as VOC's do.
    """
    photos: list[Photo] = []
    for folder, split in parts:
        file = listing = Path(folder) / "ImageSets/Main" / f"{split}.txt"
        try:
            for name in read_regular_text(listing).split():
                file = Path(folder) / "Annotations" / f"{name}.xml"
                with open_regular(file) as stream:
                    root = ElementTree.parse(stream).getroot()
                size = int(root.findtext("size/height")), int(root.findtext("size/width"))
                photos.append(Photo(str(Path(folder) / "JPEGImages" / f"{name}.jpg"), size,
                                    [_voc_box(entry) for entry in root.findall("object")]))
        except OSError as error:
            raise UserError(f"{flag} {file} cannot be read ({error.strerror or error}); give a full VOC folder, with "
                            "ImageSets/Main, Annotations and JPEGImages") from None
        except (ValueError, TypeError, AttributeError, ElementTree.ParseError) as error:
            raise UserError(f"{flag} {file} is not an annotation in VOC's format ({' '.join(str(error).split())[:80]})"
                            "; unpack the data set again") from None
    title = " + ".join(f"{Path(folder).name} {split}" for folder, split in parts)
    classes = sorted({box.name for photo in photos for box in photo.boxes})
    return _checked(BoxSource(title, photos, classes, train_on_all=True), parts[0][0], flag)


def _voc_box(entry: ElementTree.Element) -> Box:
    x1, y1, x2, y2 = (float(entry.findtext(f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    corners = x1 - 1, y1 - 1, x2, y2
    return Box(corners, entry.findtext("name").strip(), (x2 - x1 + 1) * (y2 - y1 + 1),
               entry.findtext("difficult", "0").strip() == "1")


def _coco_part(folder: Path, word: str, flag: str) -> tuple[Path, Path]:
    """The JSON file of a part and its images' folder."""
    pairs = [(file, folder / file.stem.removeprefix("instances_"))
             for file in sorted((folder / "annotations").glob(f"instances_{word}*.json"))]
    pairs = [pair for pair in pairs if pair[1].is_dir()]
    if len(pairs) != 1:
        found = ", ".join(file.name for file, _ in pairs) or "none"
        raise UserError(f"{flag} {folder} should hold one annotations/instances_{word}….json beside a folder of images "
                        f"called as it is, found {found}; or give --train and --test, a file and a folder each")
    return pairs[0]


def _checked(source: BoxSource, file: str | Path, flag: str) -> BoxSource:
    """Refuse a set without images or objects, or a folder that does not hold the first image."""
    if not len(source) or not len(source.boxes):
        raise UserError(f"{flag} {file} lists {len(source)} images with {len(source.boxes)} objects, expected some of "
                        "both; give another file")
    if not Path(source.location(0)).is_file():
        raise UserError(f"{flag} {file} lists {source.location(0)}, which is missing; give the folder of its images")
    return source
