"""The project from Python: load a network with its preprocessing, embed images, start a distillation.

    import coss
    network = coss.load("run/student.pth")          # or a teacher, in any layout of docs/CHECKPOINTS.md
    rows = network.embed("photos/")                 # float32 [n, d], in the order of coss.names("photos/")
    features = network(network.transform(image)[None])      # a PIL image -> uint8 [1, 3, S, S] -> [1, d], on its device
    coss.distill(data="photos/", distill="moco.pth", output="run", epochs=100, lr=0.03)

Importing it makes the repository's packages (losses, models, data, ...) importable under these names.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

_HERE = Path(__file__).resolve().parent
ROOT = _HERE / "_root" if (_HERE / "_root").is_dir() else _HERE.parent  # installed, or in a checkout
_NAMES = ("checkpoints", "common", "data", "evals", "losses", "models", "runtime", "search")

if TYPE_CHECKING:
    from coss.network import Network, distill, embed, load, names  # noqa: F401
    from runtime.errors import UserError  # noqa: F401

__all__ = ["Network", "UserError", "distill", "embed", "load", "names"]


def add_root() -> None:
    """Put the repository's packages on the path. Raises ImportError if other packages of these names are imported, and
    runtime.errors.UserError on Windows."""
    for name in _NAMES:
        file = getattr(sys.modules.get(name), "__file__", None)
        if file and ROOT not in Path(file).resolve().parents:
            raise ImportError(f"coss needs its own package {name}, but another one is imported ({file}); import coss "
                              "in a separate process, or rename the other")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    importlib.import_module("runtime.start").check_platform()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module coss has no attribute {name}")
    add_root()
    return getattr(importlib.import_module("runtime.errors" if name == "UserError" else "coss.network"), name)
