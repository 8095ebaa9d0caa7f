"""Files that someone names are opened only where they are regular files: a pipe would keep the script waiting for ever,
and a device may have no end."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a file to be read. Raises OSError, at once, for a FIFO, a socket, a device or a folder."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)  # a FIFO would keep a plain open waiting; what a name stands for may change
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
