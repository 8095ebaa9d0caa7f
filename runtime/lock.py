"""A file, or a folder, that belongs to one job at a time."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.outputs import no_link
from runtime.state import parse_json

LOCK = "run.lock"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}


class Held(Exception):
    """Another job holds the lock. ``hint``: what to do if that job is gone but the file system cannot tell."""

    def __init__(self, owner: str, hint: str = "") -> None:
        super().__init__(owner)
        self.hint = hint


class FileLock:
    """Locks the file ``path``, which names the owner, until :meth:`release` or the end of the process.

    It is a POSIX lock, so child processes do not share it and NFS enforces it between machines. It ends with its
    process, however that ends, so a leftover file locks nothing. On a file system without locks, the host and process
    named in the file decide.
    """

    def __init__(self, path: Path) -> None:
        """Raises :class:`Held` if another job holds it, and OSError where it cannot be written."""
        self.path = path
        self.left_by = None  # the owner of a leftover lock file
        path.parent.mkdir(parents=True, exist_ok=True)
        self._take()
        while not self._is_the_file():  # its last owner removed it between open and lock
            os.close(self.file)
            self._take()
        self._sign()

    def release(self) -> None:
        """Remove the file and release the lock."""
        with contextlib.suppress(OSError):
            self.path.unlink()
        with contextlib.suppress(OSError):
            os.close(self.file)

    def _take(self) -> None:
        """Open and lock the file."""
        self.file = no_link(self.path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner, locks = self._read(), error.errno not in NO_LOCKS
            if locks or _may_live(owner):
                os.close(self.file)
                raise Held(_named(owner), "" if locks else f", remove {self.path} if it has ended") from None

    def _is_the_file(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self.file), self.path.stat())
        except FileNotFoundError:
            return False

    def _sign(self) -> None:
        owner = self._read()
        self.left_by = _named(owner) if owner else None
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, json.dumps(mine).encode(), 0)

    def _read(self) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            owner = parse_json(os.pread(self.file, 4096, 0))
            return owner if isinstance(owner, dict) else None
        return None


class FolderLock(FileLock):
    """Holds ``folder/run.lock``."""

    def __init__(self, folder: Path) -> None:
        """Raises :class:`UserError` if another job holds it, or the folder cannot be written."""
        try:
            super().__init__(folder / LOCK)
        except OSError as error:
            raise UserError(f"--output {folder} cannot be written ({error.strerror or error}); free some space or "
                            "choose another folder") from None
        except Held as other:
            raise UserError(f"--output {folder} is in use by {other}; wait until that job ends{other.hint}, or choose "
                            "another folder") from None


def _named(owner: dict[str, Any] | None) -> str:
    if not owner:
        return "another job"
    return f"process {owner.get('pid')} on {owner.get('host')} since {owner.get('since')}"


def _may_live(owner: dict[str, Any] | None) -> bool:
    """Whether the owner that a file names may still run: a living process of this host, or one of another host."""
    if not owner:
        return False
    return owner.get("host") != socket.gethostname() or Path(f"/proc/{owner.get('pid')}").exists()
