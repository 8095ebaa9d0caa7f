"""Finding the images of a folder, in the order of torchvision's ImageFolder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.image_files import ImageNames, is_hidden, mixture_of
from data.sources import Names
from runtime.errors import UserError

MOST_VISITS = 100  # times that one folder may be reached by links; folders that link to each other give endless paths


class Tree(NamedTuple):
    """What a scan finds.

    names: posix paths relative to the folder. labels: int64 [N], or None. classes: their names. notes: sentences about
    files that were skipped or found twice. mixture: a warning if images lie beside class folders, else ''.
    """

    names: Names
    labels: np.ndarray | None
    classes: list[str]
    notes: list[str]
    mixture: str


def scan(folder: Path, spec: str) -> Tree:
    """All images in and below a folder. Each sub-folder is a class, unless images lie directly in the folder: then they
    have no classes.

    Hidden files and folders and __MACOSX are skipped. Links are followed, except to a folder that contains the link.
    Raises UserError, naming --data `spec`, if a folder cannot be read.
    """
    walk = _Walk(folder, spec)
    places = walk.found
    loose, tops = places.get("", []), sorted({place.partition("/")[0] for place in places} - {""})
    order = sorted(places) if loose else sorted(places, key=lambda place: (place.partition("/")[0], place))
    names = Names(f"{place}/{name}" if place else name for place in order for name in sorted(places[place]))
    if loose:
        mixture = mixture_of(loose, tops)
        return Tree(names, None, [], walk.notes() + [mixture] * bool(mixture), mixture)
    number = {top: i for i, top in enumerate(tops)}
    labels = np.repeat(np.array([number[place.partition("/")[0]] for place in order], dtype=np.int64),
                       [len(places[place]) for place in order])
    return Tree(names, labels, tops, walk.notes(), "")


def list_folder(folder: Path, spec: str) -> tuple[list[str], bool]:
    """Sorted visible sub-folders, and whether images lie directly in the folder."""
    entries, takes = _entries(folder, spec), ImageNames().takes
    folders = sorted(name for name, is_folder in entries if is_folder and not is_hidden(name))
    return folders, any(takes(name) for name, is_folder in entries if not is_folder)


def _entries(folder: Path, spec: str) -> list[tuple[str, bool]]:
    """The names in a folder, each with whether it is a folder or a link to one."""
    def is_folder(entry: os.DirEntry) -> bool:
        try:
            return entry.is_dir()
        except OSError:  # a link to itself
            return False

    try:
        with os.scandir(folder) as entries:
            return [(entry.name, is_folder(entry)) for entry in entries]
    except OSError as error:  # os.walk would skip the folder silently
        raise UserError(unreadable(spec, error)) from None


class _Walk:
    """A walk through a folder and all below it, as os.walk with followlinks=True, but without following circular links.

    found: the images' names by folder; folders as relative posix paths, "" for the one that was given.
    """

    def __init__(self, folder: Path, spec: str):
        self.folder, self.spec = folder, spec
        self.files, self.found = ImageNames(), {}
        self.has_macosx, self.circles, self.twice = False, [], []
        self.places: dict[tuple[int, int], list[str]] = {}  # by (device, inode)
        waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ())]  # a folder, and the folders around it
        while waiting:
            place, above = waiting.pop()
            if key := self._enter(place, above):
                waiting += [(name, (*above, key)) for name in self._look_into(place)]

    def notes(self) -> list[str]:
        """Sentences about what was skipped or found twice."""
        notes = self.files.notes()
        if self.has_macosx:
            notes = [f"{notes[0]} and __MACOSX" if notes else "skipped: __MACOSX"]
        if self.circles:
            more = f", nor are {len(self.circles) - 1:,} more" * (len(self.circles) > 1)
            notes.append(f"{min(self.circles)} is a link to a folder that contains it, and is not followed{more}")
        if self.twice:
            more = f", and so on for {len(self.twice) - 1:,} more" * (len(self.twice) > 1)
            notes.append(f"{' and '.join(min(self.twice))} are the same folder, by a link, so its images count twice"
                         + more)
        return notes

    def _enter(self, place: str, above: tuple[tuple[int, int], ...]) -> tuple[int, int] | None:
        """The device and inode of a folder; None if a link leads back to a folder around it."""
        try:
            found = (self.folder / place).stat()
        except OSError as error:
            raise UserError(unreadable(self.spec, error)) from None
        key = (found.st_dev, found.st_ino) if found.st_ino else (-1, len(self.places))  # some disks have no inodes
        if key in above:
            self.circles.append(place)
            return None
        before = self.places.setdefault(key, [])
        if before:
            self.twice.append(sorted((before[0] or ".", place)))
        if len(before) == MOST_VISITS:
            raise UserError(f"--data {self.spec}: links lead to {self.folder / place} by more than {MOST_VISITS} "
                            "paths; remove links, or give a .txt list of the images")
        before.append(place)
        return key

    def _look_into(self, place: str) -> list[str]:
        """Record the images of a folder, and return its visible sub-folders."""
        prefix, images, folders = place + "/" if place else "", [], []
        for name, is_folder in _entries(self.folder / place, self.spec):
            if not is_folder:
                if self.files.takes(prefix + name):
                    images.append(name)
            elif not is_hidden(name):
                folders.append(prefix + name)
            self.has_macosx |= is_folder and name == "__MACOSX"
        if images:
            self.found[place] = images
        return folders


def unreadable(spec: str, error: OSError) -> str:
    """The message about a file or folder that the system refuses to read."""
    return f"--data {spec}: {error.filename} cannot be read ({error.strerror}); make it readable, or move it out"
