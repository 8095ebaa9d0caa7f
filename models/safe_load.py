"""Files in without running anything from them: PyTorch's formats of all ages, safetensors, and plain pickles.

A pickle names the functions that rebuild its objects, so reading one can run anything. PyTorch's ``weights_only``
reader comes first. What it refuses is read by :class:`InertUnpickler`, which calls nothing but the builders of
tensors and arrays; every other class becomes an :class:`Inert` stand-in, which is never imported. Where all of them
belong to known training libraries the tensors are given out; anything else is refused and named.
"""

from __future__ import annotations

import collections
import hashlib
import io
import pickle
import re
import tarfile
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from models.report import few
from runtime.errors import UserError

# Builders of tensors, arrays and plain containers: they look at nothing but their arguments.
HARMLESS = re.compile(
    r"torch\.(\w*Storage|\w*Tensor|Size|device|b?float\d+|u?int\d+|bool|half|float|double|long)|"
    r"torch\.storage\.\w*Storage|torch\.serialization\._get_layout|torch\.nn\.parameter\.Parameter|"
    r"torch\._utils\._rebuild_(tensor|tensor_v2|parameter|parameter_with_state)|torch\._tensor\._rebuild_from_type_v2|"
    r"collections\.(OrderedDict|defaultdict|deque|Counter)|"
    r"(builtins|__builtin__)\.(dict|list|tuple|set|frozenset|int|long|float|complex|bool|str|bytes|bytearray|slice)|"
    r"numpy\._?core\.(multiarray\.(_reconstruct|scalar)|numeric\._frombuffer)|numpy\.(ndarray|dtype)|numpy\.dtypes\.\w+|"
    r"numpy\.(bool_?|float\d+|u?int\d+)|_codecs\.encode")

# Whose classes lie in published checkpoints beside the tensors. They are stood in for, never imported.
KNOWN = re.compile(
    r"(omegaconf|easydict|addict|yacs|mmengine|mmcv|mmcls|mmselfsup|mmpretrain|openselfsup|pytorch_lightning|lightning|"
    r"lightning_fabric|lightning_utilities|torchmetrics|solo|lightly|vissl|classy_vision|fvcore|iopath|detectron2|timm|"
    r"torchvision|torch\.(nn|optim|amp|cuda\.amp|distributed)|enum|datetime|pathlib)\..+|"
    r"argparse\.Namespace|types\.SimpleNamespace|functools\.partial|cop(yreg|y_reg)\._reconstructor|__main__\.\w+")
PUBLISHED = {  # MD5, the first eight digits as in MoCo's README
    "b251726a57be750490c34a7602b59076": "MoCo v1, ResNet-50, 200 epochs",
    "59fd9945645e27d585be89338ce9232e": "MoCo v2, ResNet-50, 200 epochs",
    "a04e12f8b0e44fdcac1fb4e06f33727b": "MoCo v2, ResNet-50, 800 epochs",
    "f32f0062e8884e64bcd2044c67bd3e43": "MoCo v3, ViT-S/16, 300 epochs",
    "7fe6d104c5ba222fecc6dc838f2dbcf9": "MoCo v3, ViT-B/16, 300 epochs",
}
JAX = re.compile(r"(jax|jaxlib|haiku|flax)\..*")


class Inert:
    """Stands in for an object of a class that is not imported: takes whatever a pickle gives it and does nothing."""

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

    def __hash__(self) -> int:
        return id(self)


class InertUnpickler(pickle.Unpickler):
    """Rebuilds tensors, arrays and containers; every other name becomes :class:`Inert` and is noted in ``seen``."""

    seen: collections.Counter[str]

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the pickle stands for. Imports nothing but the builders in ``HARMLESS``."""
        full = f"{module}.{name}"
        if full == "torch.storage._load_from_bytes":  # a tensor in a plain pickle is a file of its own
            return lambda content: torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if "." not in name and HARMLESS.fullmatch(full):
            return super().find_class(module, name)
        self.seen[full] += 1
        return type(name.rpartition(".")[2], (Inert,), {"__module__": module})


def _inert_pickle(seen: collections.Counter[str]) -> types.ModuleType:
    """A stand-in for the module ``pickle``, as torch.load takes one."""
    unpickler = type("Unpickler", (InertUnpickler,), {"seen": seen})
    module = types.ModuleType("inert_pickle")
    module.Unpickler = unpickler
    module.load = lambda file, **options: unpickler(file, **options).load()
    return module


def read_file(path: str | Path, flag: str = "--weights", trust: bool = False) -> Any:
    """What ``path`` holds, tensors on the CPU. Raises :class:`UserError` in one sentence for everything else.

    ``trust`` (--trust-checkpoint) unpickles whatever is in the file, which runs the code that it names.
    """
    path = Path(path)
    start = _look_at(path, flag)
    if path.suffix == ".safetensors" or (start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 1 << 32):
        return _read_safetensors(path, flag)
    if _is_torchscript(path):
        raise UserError(f"{flag} {path} is a TorchScript archive (as CLIP's files are), a program with its own network "
                        "inside, expected a state dict; save model.state_dict() of its image encoder and give that")
    if trust:
        return _unpickle_trusted(path, flag)
    try:
        with warnings.catch_warnings(action="ignore"):  # of old formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - whatever it was, the inert reader says what is wrong with the file
        return _unpickle_inert(path, flag)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    return _file_hash(path, hashlib.sha256())


def _file_hash(path: str | Path, digest: Any) -> str:
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def published_as(path: str | Path, sha256: str) -> str | None:
    """Which published file this is, in words: by a known MD5, or by the hash that its name ends in."""
    known = PUBLISHED.get(_file_hash(path, hashlib.md5()))
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", Path(path).name)
    if known or not named:
        return known
    if sha256.startswith(named[1]):
        return f"its name and its content agree on {named[1]}"
    return f"its name says {named[1]}, its content {sha256[:8]}: it was changed or damaged, or is no hash"


def _look_at(path: Path, flag: str) -> bytes:
    """The first bytes of a file that may be a checkpoint."""
    if not path.is_file():
        raise UserError(f"{flag} {path} is not a file; give the path of a checkpoint")
    if path.stat().st_size == 0:
        raise UserError(f"{flag} {path} is empty; download or copy it again")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read ({error.strerror}); make it readable") from None
    text = start.lstrip().lower()
    if text.startswith((b"<", b"version https://git-lfs")):
        what = "a Git LFS pointer" if text.startswith(b"version") else "a web page"
        raise UserError(f"{flag} {path} is {what}, not a checkpoint; download the file itself")
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        raise UserError(f"{flag} {path} is text ({start[:40].decode().split(chr(10))[0].strip()!r}), not a PyTorch "
                        "checkpoint; download the file itself")
    return start


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(re.fullmatch(r"[^/]+/(constants\.pkl|code/.*)", name) for name in archive.namelist())


def _read_safetensors(path: Path, flag: str) -> dict[str, Any]:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{flag} {path} is a safetensors file and the package that reads it is missing; "
                        "pip install safetensors") from None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {**_numbers(file.metadata() or {}), "state_dict": tensors}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{flag} {path} is not a safetensors file or is cut short ({error}); "
                        "download or copy it again") from None


def _numbers(metadata: dict[str, str]) -> dict[str, Any]:
    """Metadata of a safetensors file, all text, with whole numbers and lists of numbers as such."""
    def value(text: str) -> Any:
        if re.fullmatch(r"\d+", text):
            return int(text)
        if re.fullmatch(r"\[[-\d., e]+\]", text):
            return [float(x) for x in text[1:-1].split(",")]
        return text
    return {name: value(text) for name, text in metadata.items()}


def _unpickle_inert(path: Path, flag: str) -> Any:
    seen: collections.Counter[str] = collections.Counter()
    reader = _inert_pickle(seen)
    damaged = UserError(f"{flag} {path} is not a PyTorch checkpoint or is cut short; download or copy it again")
    try:
        if zipfile.is_zipfile(path) or _is_old_torch(path):
            raw = torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)
        else:
            with path.open("rb") as file:
                raw = _plain_pickle(reader, file)
    except Exception:  # noqa: BLE001 - a damaged file can fail in any way
        if not (unknown := _unknown(seen)):
            raise damaged from None
        raise _not_opened(path, flag, unknown) from None
    if any(JAX.fullmatch(name) for name in seen):
        raise UserError(f"{flag} {path} was saved by JAX ({few(sorted(seen))}), expected PyTorch tensors; "
                        "convert it to a PyTorch state dict first")
    if unknown := _unknown(seen):
        raise _not_opened(path, flag, unknown)
    if isinstance(raw, Inert):
        raise UserError(f"{flag} {path} holds a whole pickled object of class {type(raw).__module__}."
                        f"{type(raw).__name__}, expected a state dict; save its state_dict() and give that, or, if you "
                        "trust where it comes from, add --trust-checkpoint")
    return raw


def _unknown(seen: collections.Counter[str]) -> list[str]:
    return sorted(name for name in seen if not KNOWN.fullmatch(name) and not JAX.fullmatch(name))


def _not_opened(path: Path, flag: str, unknown: list[str]) -> UserError:
    return UserError(f"{flag} {path} holds Python objects beside its tensors ({few(unknown, 6)}) and was not opened, "
                     "since unpickling them can run code; save its weights alone with torch.save and give that, or, if "
                     "you trust where it comes from, add --trust-checkpoint")


def _is_old_torch(path: Path) -> bool:
    """PyTorch's formats before 1.6: a magic number in a pickle of its own, or a tar archive."""
    with path.open("rb") as file:
        start = file.read(32)
    return (0x1950A86A20F9469CFC6C).to_bytes(10, "little") in start or tarfile.is_tarfile(path)


def _plain_pickle(reader: types.ModuleType, file: BinaryIO) -> Any:
    if file.read(1) not in (b"\x80", b"(", b"}", b"]"):  # text and images are no pickles, whatever they decode to
        raise pickle.UnpicklingError
    file.seek(0)
    return reader.load(file, encoding="latin1")


def _unpickle_trusted(path: Path, flag: str) -> Any:
    try:
        try:
            raw = torch.load(path, map_location="cpu", weights_only=False)
        except pickle.UnpicklingError:
            with path.open("rb") as file:
                raw = pickle.load(file, encoding="latin1")  # noqa: S301 - the user's explicit choice
    except (AttributeError, ImportError) as error:
        raise UserError(f"{flag} {path} needs a class that is not here ({error}); install its package, or leave "
                        "--trust-checkpoint out") from None
    except Exception:  # noqa: BLE001 - a damaged file can fail in any way
        raise UserError(f"{flag} {path} is not a PyTorch checkpoint or is cut short; "
                        "download or copy it again") from None
    return raw.state_dict() if isinstance(raw, nn.Module) else raw

