"""Packages that are optional: each is imported where it is used, and one sentence says how to install it."""

from __future__ import annotations

import importlib
from types import ModuleType

from runtime.errors import UserError
from runtime.first_pass import need_libraries


def need_package(package: str, what: str, *, module: str = "", install: str = "", otherwise: str = "") -> ModuleType:
    """The imported ``module`` (default: of the same name) of ``package``, or the error of :func:`package_missing`.

    A folder of that name in the current one, such as wandb leaves, is not the package.
    """
    need_libraries()
    try:
        found = importlib.import_module(module or package)
    except ImportError:
        found = None
    if found is None or all(name.startswith("__") for name in vars(found)):
        raise package_missing(package, what, install, otherwise)
    return found


def package_missing(package: str, what: str, install: str = "", otherwise: str = "") -> UserError:
    """Says that ``what`` needs ``package`` and how to install it. ``install``: the packages to install, if more;
    ``otherwise``: what else helps."""
    return UserError(f"{what} needs the package {package}, which is not installed; run `pip install "
                     f"{install or package}`{otherwise and f', or {otherwise}'}")
