"""Opens files that the user names only if they are regular files: a pipe would block the script for ever, and a device
may have no end."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

from runtime.errors import UserError


def expect_file(path: str | os.PathLike, name: str, advice: str) -> None:
    """Raise :class:`UserError` unless ``path``, ``name`` in the message, is a file; ``advice``: what to give."""
    if not os.path.isfile(path):  # noqa: PTH113 - no error for an over-long name
        found = "is a folder" if os.path.isdir(path) else "does not exist"  # noqa: PTH112
        raise UserError(f"{name} {found}; {advice}")


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file for reading. Raises OSError, at once, for a FIFO, a socket, a device or a folder."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)  # a plain open would block on a FIFO; the path may change
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise OSError(0, "is a directory" if stat.S_ISDIR(mode) else "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | os.PathLike) -> bytes:
    """The content of a file. Raises OSError as :func:`open_regular`."""
    with open_regular(path) as file:
        return file.read()


def read_regular_text(path: str | os.PathLike) -> str:
    """The UTF-8 text of a file, without a byte order mark; names in it that are not UTF-8 stay. Raises OSError as
    :func:`open_regular`."""
    return read_regular(path).decode("utf-8-sig", "surrogateescape")
