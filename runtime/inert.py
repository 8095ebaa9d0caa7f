"""A pickle reader that runs no code of the file: it rebuilds tensors, arrays and containers, and replaces the rest.

A pickle names the functions that rebuild its objects, may call them with any arguments, and may set attributes of
anything that it names. Here names lead only to the builders below, which use nothing but their arguments; every other
name becomes an :class:`Inert` class and is never imported; and attributes are set only on objects that the pickle
itself created, never on a class or function of the process.
"""

from __future__ import annotations

import collections
import io
import pickle
import re
import types
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

# Builders of tensors and plain containers: they use nothing but their arguments.
HARMLESS = re.compile(
    r"torch\.(\w*Storage|\w*Tensor|Size|device|b?float\d+|u?int\d+|bool|half|float|double|long)|"
    r"torch\.storage\.\w*Storage|torch\.serialization\._get_layout|torch\.nn\.parameter\.Parameter|"
    r"torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)|torch\._tensor\._rebuild_from_type_v2|"
    r"collections\.(OrderedDict|defaultdict|deque|Counter)|"
    r"(builtins|__builtin__)\.(dict|list|tuple|set|frozenset|int|long|float|complex|bool|str|bytes|bytearray|slice)|"
    r"numpy\.(bool_?|float\d+|u?int\d+)")
PLAIN_DTYPE = re.compile(r"[<>=|]?([biufc]\d+|[?SUO]\d*)")
NUMPY_SCALAR = np.int64().__reduce__()[0]  # has no public name


class Inert:
    """Replaces an object of a class that is not imported: accepts whatever a pickle gives it and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:  # noqa: ARG004
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update((k, v) for k, v in state.items() if isinstance(k, str))

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        return self

    def append(self, item: Any) -> None:
        """As a list."""

    def extend(self, items: Any) -> None:
        """As a list."""

    def add(self, item: Any) -> None:
        """As a set."""

    def __hash__(self) -> int:
        return id(self)


class InertUnpickler(pickle._Unpickler):  # the C version cannot restrict where attributes are set
    """Rebuilds tensors, arrays and containers; every other name becomes :class:`Inert` and is noted in ``seen``."""

    seen: collections.Counter[str]
    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for. Imports nothing but the builders in ``HARMLESS``."""
        full = f"{module}.{name}".replace("numpy.core.", "numpy._core.")
        if "." not in name and full in BUILDERS:
            return BUILDERS[full]
        if "." not in name and HARMLESS.fullmatch(full):
            return super().find_class(module, name)
        self.seen[full] += 1
        return type(name.rpartition(".")[2], (Inert,), {"__module__": module})

    def load_build(self) -> None:
        """The opcode that sets an object's attributes, only for objects that this reader created."""
        made, state = self.stack[-2:]
        if isinstance(made, np.dtype):
            self.stack.pop()
            if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">") and made.kind in "iufc":
                made.__setstate__((3, state[1], None, None, None, -1, -1, 0))
        elif isinstance(made, Inert | Tensor | np.ndarray | collections.OrderedDict):
            super().load_build()
        else:
            raise pickle.UnpicklingError

    dispatch[pickle.BUILD[0]] = load_build

    def load_binpersid(self) -> None:
        """The opcode for data outside the pickle: storages. Old files also keep modules with their source there, which
        torch.load compares with the installed source and may write a patch for."""
        place = self.stack[-1]
        if isinstance(place, tuple) and place[0] not in ("storage", b"storage"):
            self.stack[-1] = place[1] if place[0] in ("module", b"module") else place[0]
        else:
            super().load_binpersid()

    dispatch[pickle.BINPERSID[0]] = load_binpersid


def plain_pickle(file: BinaryIO) -> Any:
    """The content of a pickle of numbers, texts, arrays and containers. Raises UnpicklingError, with the names, if it
    names anything else; a damaged file may raise any exception."""
    seen: collections.Counter[str] = collections.Counter()
    content = inert_pickle(seen).load(file, encoding="latin1")
    if seen:
        raise pickle.UnpicklingError(f"it names {', '.join(sorted(seen)[:3])}")
    return content


def inert_pickle(seen: collections.Counter[str]) -> types.ModuleType:
    """A stand-in for the module ``pickle``, as torch.load takes one."""
    unpickler = type("Unpickler", (InertUnpickler,), {"seen": seen})
    module = types.ModuleType("inert_pickle")
    module.Unpickler = unpickler
    module.load = lambda file, **options: unpickler(file, **options).load()
    return module


def _dtype(code: str, *_: Any) -> np.dtype:
    """A dtype of its own, whose byte order can be set. Structured ones, whose pickles say how memory is to be read as
    objects, are not made."""
    if not PLAIN_DTYPE.fullmatch(code):
        raise pickle.UnpicklingError
    return np.dtype(code, copy=True)


def _frombuffer(content: Any, dtype: np.dtype, shape: tuple[int, ...], order: str, *_: Any) -> np.ndarray:
    return np.frombuffer(content, dtype).reshape(shape, order=order)


# Replacements for the functions of these names, which could do too much.
BUILDERS = {
    # a tensor in a plain pickle is a file of its own
    "torch.storage._load_from_bytes": lambda file: torch.load(io.BytesIO(file), map_location="cpu", weights_only=True),
    "numpy.dtype": _dtype,
    "numpy.ndarray": type("ndarray", (Inert,), {"__module__": "numpy"}),  # is named for _reconstruct alone
    "numpy._core.multiarray._reconstruct": lambda *_: np.empty(0, np.int8),
    "numpy._core.multiarray.scalar": NUMPY_SCALAR,
    "numpy._core.numeric._frombuffer": _frombuffer,
    "copyreg._reconstructor": lambda cls, *_: Inert.__new__(cls),
    "copy_reg._reconstructor": lambda cls, *_: Inert.__new__(cls),
    "_codecs.encode": lambda text, encoding="latin1": text.encode({"latin1": "latin1"}[encoding]),
}
