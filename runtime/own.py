"""The user's own code, given as FILE.py:NAME on the command line: a network, a loss or a data set.

Such a file runs only if a command line names it. A checkpoint just records its path and its hash, so that opening
someone else's checkpoint runs no code.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from runtime.errors import UserError
from runtime.first_pass import need_libraries
from runtime.regular import read_regular

OWN_HELP = "FILE.py:NAME of your own"


def is_own(text: object) -> bool:
    """Whether ``text`` is FILE.py:NAME."""
    file, colon, name = text.rpartition(":") if isinstance(text, str) else ("", "", "")
    return bool(colon) and file.endswith(".py") and name.isidentifier()


@dataclass(frozen=True)
class Own:
    """What FILE.py:NAME stands for: the ``value`` of that name, the file's absolute path, and its SHA-256."""

    path: Path
    name: str
    sha256: str
    value: Any
    flag: str

    def __str__(self) -> str:
        return f"{self.path}:{self.name}"

    @property
    def short(self) -> str:
        """FILE.py:NAME without the folder, for names and messages."""
        return f"{self.path.name}:{self.name}"

    def error(self, found: str, wanted: str) -> UserError:
        """An error that says what the code did (``found``) and what it should do (``wanted``)."""
        return UserError(f"{self.flag} {self.short} {found}; {wanted}")

    @contextlib.contextmanager
    def blamed(self, doing: str) -> Iterator[None]:
        """Turns any exception of this code into a :class:`UserError` with its line. ``doing``: what was done."""
        try:
            yield
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            where = _where(error, self.path)
            raise UserError(f"{self.flag} {self.short} fails {doing} ({where}); correct it") from None


def look_at_own(text: str, flag: str) -> tuple[Path, str, bytes]:
    """The path and the name in ``text``, and the content of the file, without running it. Raises :class:`UserError` if
    the file cannot be read."""
    file, _, name = text.rpartition(":")
    path = Path(file).expanduser().absolute()
    try:
        return path, name, read_regular(path)
    except OSError as error:
        raise UserError(f"{flag} {text}: {path} cannot be read ({error.strerror or error}); give FILE.py:NAME, a "
                        "Python file and a name that it defines") from None


def load_own(text: str, flag: str) -> Own:
    """Run the file that ``text`` names (once per process, unless its content changes) and return what NAME stands for.

    The file can import from its own folder, which is searched last. Raises :class:`UserError`, which begins with
    ``flag``, if the file or the name is missing, or if the code fails.
    """
    path, name, source = look_at_own(text, flag)
    need_libraries()
    digest = hashlib.sha256(source).hexdigest()
    own = Own(path, name, digest, None, flag)
    with own.blamed("while the file is run"):
        module = _module(path, source)
    if not callable(getattr(module, name, None)):
        others = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise UserError(f"{flag} {text}: {path.name} defines no function or class {name}; it defines "
                        f"{', '.join(others) or 'none'}")
    return Own(path, name, digest, getattr(module, name), flag)


def code_record(name: str, text: str | None) -> dict[str, str]:
    """The entry ``NAME_code_sha256`` of config.json, the file's hash; no entry if ``text`` is not FILE.py:NAME."""
    return {f"{name}_code_sha256": load_own(text, f"--{name}").sha256} if is_own(text) else {}


@functools.cache
def _module(path: Path, source: bytes) -> ModuleType:
    name = f"own_{path.stem}_{hashlib.sha256(str(path).encode() + source).hexdigest()[:8]}"
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, path))
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    sys.modules[name] = module  # dataclasses and type hints look for it there
    try:
        exec(compile(source, path, "exec"), vars(module))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _where(error: BaseException, path: Path) -> str:
    """``line 3: NameError: ...``, the deepest line of ``path`` that led to the error."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, error = [error.lineno], SyntaxError(error.msg)
    place = f"line {lines[-1]}: " if lines else ""
    return f"{place}{type(error).__name__}: {' '.join(str(error).split())[:200]}"
