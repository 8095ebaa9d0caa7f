"""Exporting a network to a format that other programs read, after checking that the file gives the same features.

The file is written to a temporary folder beside its final place and opened as the target program does. Its features are
compared with the source's on the given images, and only if they agree is it moved to its place.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints.safe_load import file_sha256
from checkpoints.targets import Moco, Network, Opened, Safetensors, StateDict, Target, Torchvision
from checkpoints.targets_elsewhere import Detectron2, Onnx
from checkpoints.targets_timm import Timm
from runtime.errors import UserError
from runtime.outputs import check_output_file, reserve
from runtime.packages import need_package

TARGETS: dict[str, Target] = {"torchvision": Torchvision(), "timm": Timm(), "safetensors": Safetensors(),
                              "onnx": Onnx(), "detectron2": Detectron2(), "moco": Moco(), "state_dict": StateDict()}
# of a file that has passed its check, given its path and how to open it: replaces the file, says what to record of it
Convert = Callable[[Path, Callable[[], Opened]], dict[str, Any]]


@dataclass(frozen=True)
class Exported:
    """What was written and how it was checked. ``difference``: the largest one, divided by the largest feature."""

    target: str
    path: str
    bytes: int
    sha256: str
    difference: float
    tolerance: float
    images: dict[str, int]  # the images that were compared: {description: number}
    code: str  # Python that loads the file
    projector: str | None = None
    projector_code: str | None = None
    converted: dict[str, Any] | None = None  # what ``convert`` made of the file that was compared

    def record(self) -> dict[str, Any]:
        """As a plain dict, for JSON."""
        return asdict(self)


def check_target(name: str, with_projector: bool = False) -> None:
    """Raise UserError, before any work, if the target's packages are not installed or it cannot store a projector."""
    target = TARGETS[name]
    if with_projector and not target.projector:
        able = ", ".join(key for key, other in TARGETS.items() if other.projector)
        raise UserError(f"--with-projector: {name} cannot store a projector; omit the flag, or choose --to among "
                        f"{able}")
    for package in target.packages:
        need_package(package, f"--to {name}", install=" ".join(target.packages))


def check_output(name: str, path: Path, force: bool, with_projector: bool = False, source: Path | None = None) -> None:
    """Raise UserError, before any work, if the result cannot be written to ``path``."""
    suffix, target = TARGETS[name].suffix, TARGETS[name]
    others = {other.suffix for other in TARGETS.values()} - {suffix, ".pth"}
    if path.suffix != suffix and (suffix != ".pth" or path.suffix in others):
        raise UserError(f"--output {path} has the suffix of another format, by which programs would misread it; give a "
                        f"name that ends in {suffix}")
    if not path.parent.is_dir():
        raise UserError(f"--output {path}: the folder {path.parent} does not exist; create it or choose another")
    beside = [projector_path(path)] if with_projector and target.projector == "beside" else []
    for place in (path, *beside):
        check_output_file(place, "--output", inputs=[source] if source else [])
        if place.exists() and not force:
            raise UserError(f"--output {place} exists; choose another name, or add --force to replace it")


def export(network: Network, name: str, path: Path, images: Mapping[str, Tensor], convert: Convert | None = None,
           ) -> Exported:
    """Write ``network`` to ``path`` in the format ``name``, and its head if it has one.

    ``images``: {description: normalised images, float32 [b, 3, S, S]}. ``convert`` changes the file that has passed its
    check. Raises :class:`UserError`, and leaves no file, if the format cannot hold the network, the file gives other
    features when it is read back, or ``convert`` refuses it.
    """
    target, arch = TARGETS[name], network.trunk.spec.arch
    if reason := target.refuse(network):
        raise UserError(f"--to {name} cannot take {arch}: {reason}")
    beside = projector_path(path) if network.head is not None and target.projector == "beside" else None
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", suffix=".tmp", dir=path.parent))
        parts = {place: folder / place.name for place in (path, beside) if place}  # programs go by the suffix
        places = parts[path], parts.get(beside)
        try:
            difference = _write_and_compare(network, target, *places, images)
        except OSError:
            raise
        except Exception as error:  # libraries raise many kinds of errors for a file that they cannot read
            raise UserError(f"--output {path} was not written: {arch} in the format {name} did not pass its check "
                            f"({_sentence(error)}); choose another --to") from error
        converted = convert and convert(parts[path], lambda: target.open(network, parts[path], parts[beside or path]))
        digest, size = file_sha256(parts[path]), parts[path].stat().st_size
        for final, temporary in parts.items():
            _sync(temporary)
            temporary.replace(final)
    except OSError as error:
        raise UserError(f"--output {path} could not be written ({error.strerror or error}); free some space or choose "
                        "another folder") from None
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
    return Exported(name, str(path), size, digest, difference, target.tolerance,
                    {what: len(batch) for what, batch in images.items()}, target.code(network, path),
                    str(beside or path) if network.head is not None else None, _projector_code(target, network, path),
                    converted)


def projector_path(path: Path) -> Path:
    """``OUT.projector.pth`` beside ``OUT.pth``."""
    return path.with_name(f"{path.stem}.projector{path.suffix}")


def _projector_code(target: Target, network: Network, path: Path) -> str | None:
    if network.head is None:
        return None
    return target.projector_code(network, projector_path(path) if target.projector == "beside" else path)


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference divided by the largest magnitude, over all outputs."""
    largest = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            raise UserError(f"read back, it gives features {list(b.shape)}, the source {list(a.shape)}")
        for whose, x in (("the source's", a), ("read back, its", b)):
            if not torch.isfinite(x).all():
                raise UserError(f"{whose} features are not finite")
        scale = float(a.abs().max()) or 1.0
        largest = max(largest, float((a.double() - b.double()).abs().max()) / scale)
    return largest


def _write_and_compare(network: Network, target: Target, path: Path, projector: Path | None,
                       images: Mapping[str, Tensor]) -> float:
    """Write the file, and the projector's if there is one, and read them back; the largest difference of features."""
    size = sum(x.numel() * x.element_size() for x in network.trunk.state_dict().values())
    with while_writing(path, size):
        target.write(network, path)
        if projector:
            target.write_projector(network, projector)
    opened = target.open(network, path, projector or path)
    difference = max(_difference(network(batch), opened(batch)) for batch in images.values())
    if difference > target.tolerance:
        raise UserError(f"read back, its features differ from the source's by {difference:.2g} of the largest, "
                        f"at most {target.tolerance:g} is allowed")
    return difference


@contextlib.contextmanager
def while_writing(path: Path, size: int) -> Iterator[None]:
    """Raises OSError if the disk is full, also if a library hides that error: writing a probe of ``size`` bytes beside
    ``path`` shows it."""
    try:
        yield
    except Exception:
        with path.with_name("probe").open("wb") as file:
            reserve(file, size)
        raise


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sentence(error: Exception) -> str:
    """The first line of what an exception says."""
    text = str(error).strip().partition("\n")[0][:200]
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
