"""Where output may be written: looked at before the work, so that nothing is replaced that should stay."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from runtime.errors import UserError

ZEROS = 16 << 20


def check_output_folder(folder: Path, flag: str) -> None:
    """Refuse, before the work that is to be written there, a ``folder`` that cannot be made; makes nothing yet."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        found = "is not a folder" if not there.is_dir() else "cannot be written"
        raise UserError(f"{flag} {folder} cannot be made, since {there} {found}; choose another folder")


def check_output_file(path: Path, flag: str, endings: Iterable[str] = (), inputs: Iterable[str | Path] = ()) -> None:
    """Refuse, before the work, a ``path`` that must not become the result.

    Its name ends in one of ``endings`` (any, if there are none); what is there already is a regular file, and none of
    ``inputs`` by whatever name or link; its folder can be made. Raises :class:`UserError`.
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
            if os.path.exists(given) and path.samefile(given):  # noqa: PTH110 - no error for what is no path
                raise UserError(f"{flag} {path} is a file that is read here ({given}) and would be replaced; choose "
                                "another name")
    check_output_folder(path.parent, flag)


def no_link(path: str | Path, flags: int) -> int:
    """An ``opener`` for :func:`open` that never writes through a symbolic link, which someone else may have put there.
    """
    return os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)


def new_file(path: str | Path, flags: int) -> int:
    """An ``opener`` for a temporary file: what is left there under its name is removed, and never written through."""
    Path(path).unlink(missing_ok=True)
    return no_link(path, flags | os.O_EXCL)


def reserve(file: BinaryIO, size: int) -> None:
    """Take ``size`` bytes behind the end of an open file now: a full disk is better known before the work than after.
    Raises OSError."""
    start = file.seek(0, os.SEEK_END)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), start, max(size, 1))
        file.truncate(start + size)
        return
    for done in range(0, size, ZEROS):
        file.write(bytes(min(ZEROS, size - done)))
