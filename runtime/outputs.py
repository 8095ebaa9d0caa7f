"""Checks of output paths before the work, so that nothing is replaced that should stay."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from runtime.errors import UserError

ZEROS = 16 << 20


def check_output_folder(folder: Path, flag: str) -> None:
    """Refuse a ``folder`` that cannot be created, before the work whose results go there; creates nothing yet."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        found = "is not a folder" if not there.is_dir() else "cannot be written"
        raise UserError(f"{flag} {folder} cannot be made, since {there} {found}; choose another folder")


def check_output_file(path: Path, flag: str, endings: Iterable[str] = (), inputs: Iterable[str | Path] = ()) -> None:
    """Refuse, before the work, a ``path`` that the result must not be written to.

    Its name must end in one of ``endings`` (any, if there are none); an existing file must be regular and none of
    ``inputs``, also through a link; its folder must be possible to create. Raises :class:`UserError`.
    """
    endings = list(endings)
    if endings and path.suffix.lower() not in endings:
        raise UserError(f"{flag} {path} is written as {' or '.join(endings)}; let its name end so")
    if path.is_dir():
        raise UserError(f"{flag} {path} is a folder; give the path of a file in it")
    if path.exists() and not path.is_file():
        raise UserError(f"{flag} {path} is a device, a pipe or a socket, not a regular file; choose another name")
    if path.exists():
        for given in inputs:
            if os.path.exists(given) and path.samefile(given):  # noqa: PTH110 - no error for text that is not a path
                raise UserError(f"{flag} {path} is a file that is read here ({given}) and would be replaced; choose "
                                "another name")
    check_output_folder(path.parent, flag)


def no_link(path: str | Path, flags: int) -> int:
    """An ``opener`` for :func:`open` that never writes through a symbolic link, which another user may have created."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def new_file(path: str | Path, flags: int) -> int:
    """An ``opener`` for a temporary file: removes a leftover of that name, and never writes through a link."""
    Path(path).unlink(missing_ok=True)
    return no_link(path, flags | os.O_EXCL)


def reserve(file: BinaryIO, size: int) -> None:
    """Allocate ``size`` bytes at the end of an open file, so that a full disk is noticed before the work. Raises
    OSError."""
    start = file.seek(0, os.SEEK_END)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), start, max(size, 1))
        file.truncate(start + size)
        return
    for done in range(0, size, ZEROS):
        file.write(bytes(min(ZEROS, size - done)))
