"""Refuses a wrong command line before the libraries that take seconds to import: a first pass with stand-ins for them.

A script's flags are declared in modules that import torch, mostly for names that a command line never uses: a base
class, a type. So the pass imports these modules, unchanged, with every package that is neither ours nor Python's own
replaced by a stand-in, parses the command line and calls the script's ``check_flags``. It can only refuse (or print the
help): what needs a library for its answer ends the pass, and the script starts as if there had been none.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import io
import os
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from runtime.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


class Needed(BaseException):
    """A library is needed for the answer. Not an Exception, which a check might take for its own."""


class Name:
    """Anything that is imported or read from a stand-in. Modules can be executed with it: it is a base class, part of a
    type, a decorator, a constant. It answers no question, and after the imports it cannot be called either."""

    def __init__(self, finder: Finder) -> None:
        self._finder = finder

    def __getattr__(self, name: str) -> Name:
        if name.startswith("__"):  # what Python asks of an object, such as __wrapped__, is not there
            raise AttributeError(name)
        return Name(self._finder)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[()]:
        return ()

    def __getitem__(self, key: Any) -> Name:
        return self

    def __or__(self, other: Any) -> Name:
        return self

    __ror__ = __or__

    def __call__(self, *given: Any, **named: Any) -> Any:
        """As a decorator it returns what it decorates."""
        if not self._finder.importing:
            raise Needed
        return given[0] if given and callable(given[0]) and not isinstance(given[0], Name) else self

    def _asked(self, *_: Any) -> NoReturn:
        raise Needed

    __bool__ = __len__ = __iter__ = __contains__ = __instancecheck__ = __subclasscheck__ = _asked


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a stand-in for every module that is neither ours nor of the standard library."""

    importing = True

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None,
                  ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_foreign(name) else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__getattr__ = Name(self).__getattr__
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


def goes_on() -> bool:
    """Whether libraries are stand-ins now."""
    return any(isinstance(finder, Finder) for finder in sys.meta_path)


def need_libraries() -> None:
    """End the pass, if one goes on: what follows is not to be run with stand-ins."""
    if goes_on():
        raise Needed


def is_foreign(name: str) -> bool:
    """Whether the module ``name`` is of a library, neither ours nor Python's own."""
    top = name.partition(".")[0]
    return top not in sys.stdlib_module_names and not any((ROOT / x).exists() for x in (top, f"{top}.py"))


def refuse_early(script: str) -> None:
    """Exit as ``script`` would for --help, and for what its ``parse_args`` and ``check_flags`` refuse with no library.

    Raises SystemExit or :class:`UserError` for that; otherwise returns, and leaves no trace of the pass.
    """
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _stand_ins() as finder:
            names = runpy.run_path(script, run_name="first pass")
            finder.importing = False
            args = names["parse_args"]()
            if os.environ.get("WORLD_SIZE", "1") == "1":  # otherwise all processes must hear of it
                names["check_flags"](args)
    except (SystemExit, UserError):
        sys.stdout.write(out.getvalue())
        sys.stderr.write(err.getvalue())
        raise
    except (Exception, Needed):  # noqa: BLE001 - whatever it is, the script itself comes to it, or to an answer
        return


@contextlib.contextmanager
def _stand_ins() -> Iterator[Finder]:
    """Stand-ins until the end of the block, which forgets them and the modules that were imported with them."""
    finder, before = Finder(), set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield finder
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if name.partition(".")[0] not in sys.stdlib_module_names:
                del sys.modules[name]
