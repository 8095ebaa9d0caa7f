"""A person's own code, given as FILE.py:NAME on the command line: a network, a loss, a data set.

Only a command line runs such a file. A checkpoint merely records its path and its hash, so that opening a file from
elsewhere runs nothing.
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
        """Without the folder, for names and messages."""
        return f"{self.path.name}:{self.name}"

    def error(self, found: str, wanted: str) -> UserError:
        """The sentence on what was ``found``, and what is ``wanted``."""
        return UserError(f"{self.flag} {self.short} {found}; {wanted}")

    @contextlib.contextmanager
    def blamed(self, doing: str) -> Iterator[None]:
        """Turn whatever its code raises while ``doing`` something into one sentence with the line."""
        try:
            yield
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(f"{self.flag} {self.short} fails {doing} ({_where(error, self.path)}); repair it") from None


def look_at_own(text: str, flag: str) -> tuple[Path, str, bytes]:
    """The file of ``text``, the name in it, and the file's content, of which nothing is run. Raises
    :class:`UserError`."""
    file, _, name = text.rpartition(":")
    path = Path(file).expanduser().absolute()
    try:
        return path, name, read_regular(path)
    except OSError as error:
        raise UserError(f"{flag} {text}: {path} cannot be read ({error.strerror or error}); give FILE.py:NAME, a "
                        "Python file and a name that it defines") from None


def load_own(text: str, flag: str) -> Own:
    """Run the file of ``text`` (once in a process while its content stays) and take the name from it.

    Its folder is searched for imports after everything else. Raises :class:`UserError`, which begins with ``flag``, for
    a file or a name that is missing, and for code that fails.
    """
    path, name, source = look_at_own(text, flag)
    need_libraries()
    digest = hashlib.sha256(source).hexdigest()
    own = Own(path, name, digest, None, flag)
    with own.blamed("while it is read"):
        module = _module(path, source)
    if not callable(getattr(module, name, None)):
        others = [key for key, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        raise UserError(f"{flag} {text}: {path.name} defines no function or class {name}; it has "
                        f"{', '.join(others) or 'none'}")
    return Own(path, name, digest, getattr(module, name), flag)


def code_record(name: str, text: str | None) -> dict[str, str]:
    """For config.json: ``NAME_code_sha256`` of one's own file; nothing where ``text`` is none."""
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
