"""Reading checkpoint files without running code from them: all of PyTorch's formats, safetensors, and plain pickles.

A pickle names the functions that rebuild its objects, so reading one can run any code. PyTorch's ``weights_only``
reader is tried first. Files that it refuses are read by :mod:`runtime.inert`, which replaces every class, except those
that build tensors and arrays, by a placeholder and never imports it. If all replaced classes belong to known training
libraries, the tensors are returned; otherwise the file is refused with the names of the others.
"""

from __future__ import annotations

import collections
import hashlib
import pickle
import re
import tarfile
import types
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from checkpoints.report import few
from runtime.archive import START, check_archive
from runtime.errors import Damaged, UserError
from runtime.inert import Inert, inert_pickle
from runtime.packages import need_package
from runtime.regular import open_regular
from runtime.store import check_content

# Libraries whose objects published checkpoints contain. Placeholders replace them; they are never imported.
KNOWN = re.compile(
    r"(omegaconf|easydict|addict|yacs|mmengine|mmcv|mmcls|mmselfsup|mmpretrain|openselfsup|pytorch_lightning|lightning|"
    r"lightning_fabric|lightning_utilities|torchmetrics|solo|lightly|vissl|classy_vision|fvcore|iopath|detectron2|timm|"
    r"torchvision|torch\.(nn|optim|amp|cuda\.amp|distributed)|enum|datetime|pathlib)\..+|"
    r"argparse\.Namespace|types\.SimpleNamespace|functools\.partial|(builtins|__builtin__)\.object|"
    r"__main__\.\w+")
PUBLISHED = {  # MD5, of which MoCo's README gives the first eight digits
    "b251726a57be750490c34a7602b59076": "MoCo v1, ResNet-50, 200 epochs",
    "59fd9945645e27d585be89338ce9232e": "MoCo v2, ResNet-50, 200 epochs",
    "a04e12f8b0e44fdcac1fb4e06f33727b": "MoCo v2, ResNet-50, 800 epochs",
    "f32f0062e8884e64bcd2044c67bd3e43": "MoCo v3, ViT-S/16, 300 epochs",
    "7fe6d104c5ba222fecc6dc838f2dbcf9": "MoCo v3, ViT-B/16, 300 epochs",
}
JAX = re.compile(r"(jax|jaxlib|haiku|flax)\..*")


def read_file(path: str | Path, flag: str = "--weights", trust: bool = False) -> Any:
    """The content of ``path``, with tensors on the CPU. Raises :class:`UserError` if it cannot be read safely.

    ``trust`` (--trust-checkpoint) unpickles everything in the file, which runs the code that it names.
    """
    path = Path(path)
    start = look_at(path, flag)
    if path.suffix == ".safetensors" or (start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 1 << 32):
        return _read_safetensors(path, flag)
    if start.startswith(START) and _is_torchscript(path):
        raise UserError(f"{flag} {path} is a TorchScript archive (as CLIP's files are), a program with its own network "
                        "inside, expected a state dict; save model.state_dict() of its image encoder and give that")
    if start.startswith(START):
        _check(check_archive, path, path, flag)
    if trust:
        return _unpickle_trusted(path, flag)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about outdated formats
            with open_regular(path) as file:  # given a path, torch opens only names that are valid UTF-8
                raw = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - in any case the inert reader reports what is wrong with the file
        return _unpickle_inert(path, flag)
    _check(check_content, raw, path, flag)
    return raw


def file_sha256(*paths: str | Path) -> str:
    """SHA-256, in hex, of a file, or of several files joined in this order."""
    return _file_hash(paths, hashlib.sha256())


def _file_hash(paths: Sequence[str | Path], digest: Any) -> str:
    for path in paths:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def published_as(path: str | Path, sha256: str) -> str | None:
    """Which published file this is, in words: known by its MD5, or checked by the hash at the end of its name. None if
    neither applies."""
    known = PUBLISHED.get(_file_hash([path], hashlib.md5()))
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", Path(path).name)
    if known or not named:
        return known
    if sha256.startswith(named[1]):
        return f"its name and its content agree on {named[1]}"
    return (f"its name ends in {named[1]}, but its SHA-256 begins with {sha256[:8]}: it was changed or damaged, or the "
            "name does not contain a hash")


def look_at(path: Path, flag: str) -> bytes:
    """The first bytes of a file that may be a checkpoint. Raises :class:`UserError` if they show that it is none."""
    name = f"{flag} {path}".strip()
    if not path.is_file():
        raise UserError(f"{name} is not a file; give the path of a checkpoint")
    if path.stat().st_size == 0:
        raise UserError(f"{name} is empty; download or copy it again")
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); make it readable") from None
    text = start.lstrip().lower()
    if text.startswith((b"<", b"version https://git-lfs")):
        what = "a Git LFS pointer" if text.startswith(b"version") else "a web page"
        raise UserError(f"{name} is {what}, not a checkpoint; download the file itself")
    if all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        raise UserError(f"{name} is text ({start[:40].decode().split(chr(10))[0].strip()!r}), not a PyTorch "
                        "checkpoint; download the file itself")
    return start


def _is_torchscript(path: Path) -> bool:
    """Checked with PyTorch's own archive reader, since torch.load passes TorchScript to its compiler, which runs it."""
    try:
        with open_regular(path) as file:
            names = torch._C.PyTorchFileReader(file).get_all_records()
    except (RuntimeError, UnicodeDecodeError):  # damaged, or with undecodable names
        return False
    return any(name == "constants.pkl" or name.startswith("code/") for name in names)


def _check(check: Callable[[Any], None], what: Any, path: Path, flag: str) -> None:
    try:
        check(what)
    except Damaged as error:
        raise UserError(f"{flag} {path} is damaged or cut short: {error}; download or copy it again") from None


def _read_safetensors(path: Path, flag: str) -> dict[str, Any]:
    need_package("safetensors", f"{flag} {path}".strip())
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return {**_numbers(file.metadata() or {}), "state_dict": tensors}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{flag} {path} is not a safetensors file or is cut short "
                        f"({' '.join(str(error).split())}); "
                        "download or copy it again") from None


def _numbers(metadata: dict[str, str]) -> dict[str, Any]:
    """The metadata of a safetensors file, which is all text, with whole numbers and lists of numbers parsed."""
    def value(text: str) -> Any:
        try:
            return [float(x) for x in text[1:-1].split(",")] if text.startswith("[") else int(text)
        except ValueError:
            return text
    return {name: value(text) for name, text in metadata.items()}


def _unpickle_inert(path: Path, flag: str) -> Any:
    seen: collections.Counter[str] = collections.Counter()
    reader = inert_pickle(seen)
    raw = problem = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about outdated formats
            raw = _unpickle(path, reader)
    except Exception as error:  # noqa: BLE001 - a damaged file can fail in any way
        problem = error
    if any(JAX.fullmatch(name) for name in seen):
        raise UserError(f"{flag} {path} was saved by JAX ({few(sorted(seen))}), expected PyTorch tensors; "
                        "convert it to a PyTorch state dict first")
    if unknown := sorted(name for name in seen if not KNOWN.fullmatch(name)):
        raise UserError(f"{flag} {path} holds Python objects, not only tensors ({few(unknown, 6)}) and was not opened "
                        "(unpickling them can run code); save its weights alone with torch.save and give that, or, "
                        "if you trust where it comes from, add --trust-checkpoint")
    if problem:
        raise UserError(f"{flag} {path} is not a PyTorch checkpoint or is cut short; download or copy it again")
    if isinstance(raw, Inert):
        raise UserError(f"{flag} {path} holds a whole pickled object of class {type(raw).__module__}."
                        f"{type(raw).__name__}, expected a state dict; save its state_dict() and give that, or, if you "
                        "trust where it comes from, add --trust-checkpoint")
    return raw


def _is_old_torch(path: Path) -> bool:
    """Whether a file has a format of PyTorch before 1.6: a pickled magic number, or a tar archive."""
    with path.open("rb") as file:
        start = file.read(32)
    if (0x1950A86A20F9469CFC6C).to_bytes(10, "little") in start:
        return True
    if not tarfile.is_tarfile(path):
        return False
    with tarfile.open(path, "r:") as archive:  # torch.load unpacks it, so it must not contain links or devices
        return all(member.isreg() for member in archive)


def _unpickle(path: Path, reader: types.ModuleType) -> Any:
    """The content of a file of PyTorch's, or of a plain pickle, by ``reader``, a module with pickle's interface."""
    torchs = zipfile.is_zipfile(path) or _is_old_torch(path)
    with open_regular(path) as file:
        if torchs:
            return torch.load(file, map_location="cpu", weights_only=False, pickle_module=reader)
        if file.read(1) not in (b"\x80", b"(", b"}", b"]"):  # text and images are not pickles, even if they decode
            raise pickle.UnpicklingError
        file.seek(0)
        return reader.load(file, encoding="latin1")


def _unpickle_trusted(path: Path, flag: str) -> Any:
    try:
        raw = _unpickle(path, pickle)  # the user's explicit choice
    except (AttributeError, ImportError) as error:
        raise UserError(f"{flag} {path} needs a class that is not installed "
                        f"({' '.join(str(error).split())}); install its package, or omit --trust-checkpoint") from None
    except Exception:  # noqa: BLE001 - a damaged file can fail in any way
        raise UserError(f"{flag} {path} is not a PyTorch checkpoint or is cut short; "
                        "download or copy it again") from None
    return raw.state_dict() if isinstance(raw, nn.Module) else raw

