"""Files in without running anything from them: PyTorch's formats of all ages, safetensors, and plain pickles.

A pickle names the functions that rebuild its objects, so reading one can run anything. PyTorch's ``weights_only``
reader comes first. What it refuses is read by :mod:`runtime.inert`, where every class but the builders of tensors and
arrays becomes a stand-in, which is never imported. Where all of them belong to known training libraries the tensors
are given out; anything else is refused and named.
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
from typing import Any, BinaryIO

import torch
from torch import nn

from checkpoints.report import few
from runtime.archive import START, check_archive
from runtime.errors import Damaged, UserError
from runtime.inert import Inert, inert_pickle
from runtime.regular import open_regular
from runtime.store import check_content

# Libraries whose objects published checkpoints contain. Placeholders replace them; they are never imported.
KNOWN = re.compile(
    r"(omegaconf|easydict|addict|yacs|mmengine|mmcv|mmcls|mmselfsup|mmpretrain|openselfsup|pytorch_lightning|lightning|"
    r"lightning_fabric|lightning_utilities|torchmetrics|solo|lightly|vissl|classy_vision|fvcore|iopath|detectron2|timm|"
    r"torchvision|torch\.(nn|optim|amp|cuda\.amp|distributed)|enum|datetime|pathlib)\..+|"
    r"argparse\.Namespace|types\.SimpleNamespace|functools\.partial|(builtins|__builtin__)\.object|"
    r"__main__\.\w+")
PUBLISHED = {  # MD5, the first eight digits as in MoCo's README
    "b251726a57be750490c34a7602b59076": "MoCo v1, ResNet-50, 200 epochs",
    "59fd9945645e27d585be89338ce9232e": "MoCo v2, ResNet-50, 200 epochs",
    "a04e12f8b0e44fdcac1fb4e06f33727b": "MoCo v2, ResNet-50, 800 epochs",
    "f32f0062e8884e64bcd2044c67bd3e43": "MoCo v3, ViT-S/16, 300 epochs",
    "7fe6d104c5ba222fecc6dc838f2dbcf9": "MoCo v3, ViT-B/16, 300 epochs",
}
JAX = re.compile(r"(jax|jaxlib|haiku|flax)\..*")


def read_file(path: str | Path, flag: str = "--weights", trust: bool = False) -> Any:
    """What ``path`` holds, tensors on the CPU. Raises :class:`UserError` in one sentence for everything else.

    ``trust`` (--trust-checkpoint) unpickles whatever is in the file, which runs the code that it names.
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
            with open_regular(path) as file:  # by its name torch opens only what has UTF-8 letters
                raw = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # noqa: BLE001 - whatever it was, the inert reader says what is wrong with the file
        return _unpickle_inert(path, flag)
    _check(check_content, raw, path, flag)
    return raw


def file_sha256(*paths: str | Path) -> str:
    """SHA-256 of a file, or of several one behind the other, as 64 hex digits."""
    return _file_hash(paths, hashlib.sha256())


def _file_hash(paths: Sequence[str | Path], digest: Any) -> str:
    for path in paths:
        with Path(path).open("rb") as file:
            while block := file.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def published_as(path: str | Path, sha256: str) -> str | None:
    """Which published file this is, in words: by a known MD5, or by the hash that its name ends in."""
    known = PUBLISHED.get(_file_hash([path], hashlib.md5()))
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", Path(path).name)
    if known or not named:
        return known
    if sha256.startswith(named[1]):
        return f"its name and its content agree on {named[1]}"
    return f"its name says {named[1]}, its content {sha256[:8]}: it was changed or damaged, or the name has no hash"


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
    """By PyTorch's own reader of archives, since torch.load hands such a file to its compiler, which runs it."""
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
        raise UserError(f"{flag} {path} is not a safetensors file or is cut short "
                        f"({' '.join(str(error).split())}); "
                        "download or copy it again") from None


def _numbers(metadata: dict[str, str]) -> dict[str, Any]:
    """Metadata of a safetensors file, all text, with whole numbers and lists of numbers as such."""
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
            torchs = zipfile.is_zipfile(path) or _is_old_torch(path)
            with open_regular(path) as file:
                raw = (torch.load(file, map_location="cpu", weights_only=False, pickle_module=reader) if torchs else
                       _plain_pickle(reader, file))
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
    """PyTorch's formats before 1.6: a magic number in a pickle of its own, or a tar archive."""
    with path.open("rb") as file:
        start = file.read(32)
    if (0x1950A86A20F9469CFC6C).to_bytes(10, "little") in start:
        return True
    if not tarfile.is_tarfile(path):
        return False
    with tarfile.open(path, "r:") as archive:  # torch.load unpacks it: no links and no devices
        return all(member.isreg() for member in archive)


def _plain_pickle(reader: types.ModuleType, file: BinaryIO) -> Any:
    if file.read(1) not in (b"\x80", b"(", b"}", b"]"):  # text and images are not pickles, whatever they decode to
        raise pickle.UnpicklingError
    file.seek(0)
    return reader.load(file, encoding="latin1")


def _unpickle_trusted(path: Path, flag: str) -> Any:
    try:
        torchs = zipfile.is_zipfile(path) or _is_old_torch(path)
        with open_regular(path) as file:
            raw = (torch.load(file, map_location="cpu", weights_only=False) if torchs else
                   pickle.load(file, encoding="latin1"))  # noqa: S301 - the user's explicit choice
    except (AttributeError, ImportError) as error:
        raise UserError(f"{flag} {path} needs a class that is not here "
                        f"({' '.join(str(error).split())}); install its package, or leave "
                        "--trust-checkpoint out") from None
    except Exception:  # noqa: BLE001 - a damaged file can fail in any way
        raise UserError(f"{flag} {path} is not a PyTorch checkpoint or is cut short; "
                        "download or copy it again") from None
    return raw.state_dict() if isinstance(raw, nn.Module) else raw

