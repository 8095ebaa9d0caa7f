"""Checks, in plain sentences and as a picture, whether a neighbour or cluster file belongs to a data set."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data.clusters import NO_CLUSTER, load_clusters
from data.image_files import image_extensions
from data.images import BadImage
from data.neighbours import LEFT_OUT, left_out_rows, load_neighbours, read_twin
from data.sources import ImageSource
from runtime.errors import UserError
from runtime.npy import pieces
from runtime.state import write_atomic

AGREEMENT_K = 10  # nearest neighbours whose classes are compared

# A row of a contact sheet: (heading of a column group, indices of its images).
Row = list[tuple[str, list[int]]]


def typical_side(source: ImageSource, images: int = 9) -> int:
    """The median of the longer sides, in pixels, of some images spread evenly over ``source``; 0 if none opens."""
    sides = []
    for i in np.linspace(0, len(source) - 1, min(images, len(source))).round().astype(int).tolist():
        with contextlib.suppress(BadImage):
            sides.append(max(source.pixels(i).shape[1:]))
    return int(np.median(sides)) if sides else 0


def check_neighbours(path: Path, source: ImageSource) -> list[str]:
    """Sentences that describe a valid neighbour file. Raises UserError for any other (see load_neighbours)."""
    ids, warnings = load_neighbours(path, source.fingerprint(), len(source), flag="")
    gone = left_out_rows(ids)
    kept = len(ids) - len(gone)
    sentences = [*_origin(path, source, warnings),
                 f"Each image has {ids.shape[1]} neighbours, all of them among these images, never the image itself, "
                 "and none twice.", *_left_out(gone, source)]
    if source.labels is not None and kept > 1:
        k = min(AGREEMENT_K, ids.shape[1])
        same_class = sum(int(((source.labels[rows[:, :k]] == source.labels[first:first + len(rows), None])
                              & (rows[:, :1] != LEFT_OUT)).sum()) for first, rows in pieces(ids))
        sizes = np.bincount(np.delete(source.labels, gone)).astype(float)
        chance = (sizes * (sizes - 1)).sum() / (kept * (kept - 1))
        sentences.append(f"{100 * same_class / (k * kept):.1f} % of the nearest {k} neighbours have the class of their "
                         f"image ({100 * chance:.1f} % by chance).")
    return sentences


def check_clusters(path: Path, source: ImageSource) -> list[str]:
    """Sentences that describe a valid cluster file. Raises UserError if the file is not valid (see load_clusters)."""
    labels, warnings = load_clusters(path, source.fingerprint(), len(source), flag="")
    gone, kept = np.flatnonzero(labels == NO_CLUSTER), np.flatnonzero(labels != NO_CLUSTER)
    sizes = np.bincount(labels[kept])
    filled = sizes[sizes > 0]
    sentences = [*_origin(path, source, warnings),
                 f"Each image is in one of {len(filled):,} clusters of {filled.min():,} to {filled.max():,} images "
                 f"(median {np.median(filled):,.0f}).", *_left_out(gone, source)]
    if source.labels is not None:
        table = np.zeros((len(sizes), len(source.classes)), dtype=np.int64)
        np.add.at(table, (labels[kept], source.labels[kept]), 1)
        purity, chance = table.max(axis=1).sum() / len(kept), table.sum(axis=0).max() / len(kept)
        sentences.append(f"{100 * purity:.1f} % of the images have the most common class of their cluster "
                         f"({100 * chance:.1f} % with a single cluster).")
    return sentences


def _left_out(images: np.ndarray, source: ImageSource) -> list[str]:
    """A sentence about the images that could not be opened when the file was made, int64 [m], if there are any."""
    return [f"{len(images):,} images could not be opened when it was made, {source.shown(images[0])} first; "
            "training leaves them out."] if len(images) else []


def _origin(path: Path, source: ImageSource, warnings: list[str]) -> list[str]:
    twin = read_twin(path)
    if twin is None:
        return [f"{path} has as many images as {source.title}, {len(source):,}.", *(f"{line}." for line in warnings)]
    how = ", ".join(f"{key} {twin[key]}" for key in ("feature", "metric", "init", "seed", "transform") if key in twin)
    return [f"{path} belongs to {source.title}: {len(source):,} images of the same names in the same order.",
            f"It was made in the space of {twin.get('teacher_arch', 'an unknown network')} (SHA-256 "
            f"{str(twin.get('teacher_sha256', 'unknown'))[:16]}), {how}."]


def neighbour_rows(path: Path, source: ImageSource, anchors: int, show: int, seed: int) -> tuple[list[Row], list[str]]:
    """For random anchors: the anchor, its nearest images, and its farthest if fark_info.npy lies beside
    closek_info.npy. Returns the rows, and a note if that second file cannot be used."""
    is_far = path.stem == "fark_info"
    tables, notes = [("farthest" if is_far else "nearest", path)], []
    beside = path.with_name("closek_info.npy" if is_far else "fark_info.npy")
    if path.stem in ("closek_info", "fark_info") and beside.is_file():
        tables.append(("nearest" if is_far else "farthest", beside))
    found = {}
    for name, file in tables:
        try:
            found[name] = load_neighbours(file, source.fingerprint(), len(source), flag="")[0]
        except UserError as error:
            notes.append(f"Not in the picture: {error}.")
    gone = left_out_rows(next(iter(found.values()))) if found else []
    known = np.delete(np.arange(len(source)), gone)
    chosen = np.sort(np.random.default_rng(seed).choice(known, min(anchors, len(known)), replace=False))
    return [[("anchor", [int(i)]), *((name, found[name][i, :show].tolist()) for name in ("nearest", "farthest")
                                     if name in found)] for i in chosen], notes


def images_called(source: ImageSource, name: str) -> Iterator[str]:
    """The paths of the images with this file name, which an output file must not overwrite."""
    return (source.location(i) for i, each in enumerate(source.names) if each.rpartition("/")[2] == name)


def check_apart(folder: str | Path, data: str | None, flag: str = "--output") -> None:
    """Raise UserError if ``folder``, for results, is the folder ``data``, or lies in it and holds images or folders of
    images, because files written there would mix with the images."""
    root, folder = Path(data or ""), Path(folder)
    if not (data and root.is_dir() and folder.is_dir()):
        return
    if folder.samefile(root) or (root.resolve() in folder.resolve().parents and any(
            path.name.lower().endswith(image_extensions())
            for place in (folder, *filter(Path.is_dir, folder.iterdir())) for path in place.iterdir())):
        raise UserError(f"{flag} {folder} is one of the image folders of --data {data}; choose another folder for the "
                        "output")


def cluster_rows(path: Path, source: ImageSource, anchors: int, show: int, seed: int) -> list[Row]:
    """For random clusters: a few random images of each."""
    labels, _ = load_clusters(path, source.fingerprint(), len(source), flag="")
    generator = np.random.default_rng(seed)
    filled = np.unique(labels[labels != NO_CLUSTER])
    rows = []
    for cluster in np.sort(generator.choice(filled, min(anchors, len(filled)), replace=False)):
        members = generator.permutation(np.flatnonzero(labels == cluster))[: 1 + show]
        rows.append([("image of a cluster", [int(members[0])]), ("others of the same cluster", members[1:].tolist())])
    return rows


TILE, LINE, LETTER, MARGIN, GAP = 120, 12, 6, 12, 18  # pixels


def contact_sheet(source: ImageSource, rows: list[Row], path: Path,
                  cosines: Sequence[Mapping[int, float]] | None = None) -> Path:
    """Write a PNG, atomically, with one line for each of `rows`: the images of each group side by side, resized to
    tiles, each with its file's name, its index, and, if known, its class and its cosine to the first image of the line
    (``cosines``: for each line, by index)."""
    widths = [max(len(row[group][1]) for row in rows) * (TILE + 4) for group in range(len(rows[0]))]
    lefts = [MARGIN + sum(widths[:group]) + GAP * group for group in range(len(widths))]
    top, height = MARGIN + LINE + 6, TILE + (2 if cosines is None else 3) * LINE + 8
    sheet = Image.new("RGB", (lefts[-1] + widths[-1] + MARGIN, top + height * len(rows) + MARGIN), "white")
    draw = ImageDraw.Draw(sheet)
    for left, (heading, _) in zip(lefts, rows[0], strict=True):
        draw.text((left, MARGIN), heading, fill="black")
    for number, row in enumerate(rows):
        for left, (_, indices) in zip(lefts, row, strict=True):
            for place, i in enumerate(indices):
                corner = left + place * (TILE + 4), top + number * height
                sheet.paste(_tile(source, i), corner)
                caption = _caption(source, i, cosines[number] if cosines else {})
                draw.multiline_text((corner[0], corner[1] + TILE + 1), caption, fill="black", spacing=2)
    return write_atomic(path, lambda file: sheet.save(file, format="PNG"))


def _caption(source: ImageSource, i: int, cosines: Mapping[int, float]) -> str:
    """The end of image i's name, its index and class, and its cosine, on a line each."""
    most = TILE // LETTER
    name, kind = source.names[i].rpartition("/")[2], "" if source.labels is None else source.classes[source.labels[i]]
    lines = [name if len(name) <= most else f"..{name[2 - most:]}", f"{i} {kind}"[:most]]
    lines += [f"cosine {cosines[i]:.3f}"] if i in cosines else []
    return "\n".join(lines).encode("ascii", "replace").decode()  # some builds of Pillow draw only ASCII


def _tile(source: ImageSource, i: int) -> Image.Image:
    """Image i in the middle of a grey square."""
    tile = Image.new("RGB", (TILE, TILE), (225, 225, 225))
    try:
        image = source.open(i)
    except BadImage as error:
        ImageDraw.Draw(tile).text((4, TILE // 2), str(error)[:15], fill="black")
        return tile
    image = fitted(image, TILE)
    tile.paste(image, ((TILE - image.width) // 2, (TILE - image.height) // 2))
    return tile


def fitted(image: Image.Image, side: int) -> Image.Image:
    """The image enlarged or reduced so that its longer side is ``side`` pixels."""
    scale = side / max(image.size)
    return image.resize([max(1, round(length * scale)) for length in image.size], Image.Resampling.BICUBIC)
