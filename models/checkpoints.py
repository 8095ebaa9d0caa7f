"""Checkpoint files in, strictly: which layout a file has, what of it fills a trunk, and what is left over.

One table of layouts; nothing else in the project knows the name of a key. Matching is strict both ways: every
tensor of the trunk is filled and no tensor that looks like a trunk's is left over. (ResNet-34 weights fill a
ResNet-18 completely, so filling alone proves nothing.)
"""

from __future__ import annotations

import hashlib
import pickle
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones import STEMS, arch_names
from runtime.errors import UserError

WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile put these in front
CONTAINERS = ("state_dict", "model")


@dataclass(frozen=True)
class Layout:
    """One way to lay a trunk in a file, after the wrappers are stripped.

    ``prefix`` stands before the trunk's keys. ``dropped`` are prefixes, anchored at the key's start, of what
    does not belong to the trunk; the head inside the trunk's own names is known from the architecture.
    """

    name: str
    prefix: str
    dropped: tuple[str, ...] = ()


LAYOUTS = (
    Layout("MoCo", "encoder_q.", ("encoder_k.", "queue")),
    Layout("MoCo v3", "base_encoder.", ("momentum_encoder.", "predictor.")),
    Layout("CoSS student", "backbone.", ("proj_head.",)),
    Layout("torchvision", ""),
)


@dataclass
class Report:
    """What became of each key of a file; printed, logged, and saved with the run."""

    file: str
    sha256: str
    layout: str
    arch: str
    stem: str
    matched: int = 0
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    epoch: int | None = None

    def record(self) -> dict[str, Any]:
        """As a plain dict, for JSON and for checkpoints."""
        return asdict(self)

    def __str__(self) -> str:
        dropped = ", ".join(f"{n} under {prefix}" for prefix, n in self.dropped.items()) or "nothing"
        return (f"{self.file}: {self.layout} layout, {self.arch} (stem {self.stem}), {self.matched} trunk tensors "
                f"matched, 0 missing, 0 left over, dropped {dropped}; sha256 {self.sha256[:16]}…")


@dataclass(frozen=True)
class Checkpoint:
    """A file read safely: its tensors without wrappers, and what it says of itself."""

    path: Path
    sha256: str
    tensors: dict[str, Tensor]
    layout: Layout
    arch: str | None
    stem: str | None
    image_size: int | None
    epoch: int | None

    def load_into(self, backbone: nn.Module) -> Report:
        """Fill ``backbone`` (see :func:`models.backbones.build_backbone`); raises unless the match is exact."""
        head = backbone.spec.head_name + "."
        wanted = backbone.state_dict()
        report = Report(str(self.path), self.sha256, self.layout.name, backbone.spec.arch, backbone.spec.stem,
                        epoch=self.epoch)
        found: dict[str, Tensor] = {}
        for key, value in self.tensors.items():
            outside = next((p for p in self.layout.dropped if key.startswith(p)), None)
            name = key[len(self.layout.prefix):] if key.startswith(self.layout.prefix) else None
            if name in wanted:
                found[name] = value
            elif outside or (name is not None and name.startswith(head)):
                place = outside or self.layout.prefix + head
                report.dropped[place] = report.dropped.get(place, 0) + 1
            else:
                report.unexpected.append(key)
        # Files older than PyTorch 0.4.1, and converted ones, lack the counters of batch norm; they are not weights.
        report.missing = [k for k in wanted if k not in found and not k.endswith(".num_batches_tracked")]
        shapes = [f"{k} {list(v.shape)} for {list(wanted[k].shape)}" for k, v in found.items()
                  if v.shape != wanted[k].shape]
        if report.missing or report.unexpected or shapes:
            raise UserError(self._mismatch(report, shapes))
        report.matched = len(found)
        wanted.update((k, v.to(wanted[k].dtype)) for k, v in found.items())  # keeps its metadata, which MNASNet reads
        backbone.load_state_dict(wanted)
        return report

    def _mismatch(self, report: Report, shapes: list[str]) -> str:
        says = f"; the file says it holds {self.arch}" if self.arch and self.arch != report.arch else ""
        findings = [f"{len(keys)} {what} ({_few(keys)})" for what, keys in (
            ("missing", report.missing), ("left over", report.unexpected), ("of another shape", shapes)) if keys]
        return (f"{self.path} ({report.layout} layout) does not fit {report.arch} with stem '{report.stem}'"
                f"{says}: trunk tensors {', '.join(findings)}; give the architecture and stem that the file was "
                "trained with")


def read_checkpoint(path: str | Path, key: str | None = None, flag: str = "--weights") -> Checkpoint:
    """Read ``path`` without running code from it, and find its layout. ``key`` names the container inside."""
    path = Path(path)
    raw = _read_file(path, flag)
    meta = raw if isinstance(raw, dict) else {}
    tensors = _find_tensors(raw, path, key, flag)
    tensors = {_strip_wrappers(name): value for name, value in tensors.items()}
    layout = _find_layout(tensors, path, flag)
    arch, stem, size, epoch = (meta.get(name) for name in ("arch", "stem", "image_size", "epoch"))
    return Checkpoint(path, file_sha256(path), tensors, layout,
                      arch if isinstance(arch, str) and arch in arch_names() else None,
                      stem if isinstance(stem, str) and stem in STEMS else None,
                      size if isinstance(size, int) else None, epoch if isinstance(epoch, int) else None)


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, as 64 hex digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _read_file(path: Path, flag: str) -> Any:
    if not path.is_file():
        raise UserError(f"{flag} {path} is not a file; give the path of a checkpoint")
    if path.stat().st_size == 0:
        raise UserError(f"{flag} {path} is empty; download or copy it again")
    try:
        with path.open("rb") as file:
            start = file.read(64).lstrip().lower()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read ({error.strerror}); make it readable") from None
    if start.startswith((b"<", b"version https://git-lfs")):
        what = "a Git LFS pointer" if start.startswith(b"version") else "a web page"
        raise UserError(f"{flag} {path} is {what}, not a checkpoint; download the file itself")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if any(word in text for word in ("GLOBAL", "Unsupported global", "Unsupported class")):
            found = re.search(r"(?:GLOBAL|global|class) ([\w.]+\.\w+)", text)
            what = f" ({found[1]})" if found else ""
            raise UserError(f"{flag} {path} holds Python objects{what} beside its tensors and was not opened, since "
                            f"that can run code; save its weights alone with torch.save and give that") from None
        raise UserError(f"{flag} {path} is not a PyTorch checkpoint or is damaged; download or copy it again") from None
    except (RuntimeError, EOFError, ValueError, OSError, KeyError, TypeError):
        raise UserError(f"{flag} {path} is not a PyTorch checkpoint or is cut short; "
                        "download or copy it again") from None


def _find_tensors(raw: Any, path: Path, key: str | None, flag: str) -> dict[str, Tensor]:
    if not isinstance(raw, dict):
        raise UserError(f"{flag} {path} holds a {type(raw).__name__}, expected a dictionary of tensors")
    if key is not None:
        if key in raw and isinstance(raw[key], dict):
            raw = raw[key]
        elif not _tensors_of(raw):  # the original takes a file without the container for a bare state dict
            entries = [str(k) for k, v in raw.items() if isinstance(v, dict)] or [str(k) for k in raw]
            raise UserError(f"--checkpoint-key {key} is not in {path}; it holds {_few(entries, 8)}")
    else:
        raw = next((raw[k] for k in CONTAINERS if isinstance(raw.get(k), dict)), raw)
    tensors = _tensors_of(raw)
    if not tensors:
        raise UserError(f"{flag} {path} holds no tensors, only {_few(list(map(str, raw)))}; "
                        "give a checkpoint with a state_dict")
    return tensors


def _tensors_of(container: dict[Any, Any]) -> dict[str, Tensor]:
    return {k: v for k, v in container.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _find_layout(tensors: dict[str, Tensor], path: Path, flag: str) -> Layout:
    layout = next((x for x in LAYOUTS if any(k.startswith(x.prefix) for k in tensors)), None)
    if layout is None or not any(v.ndim == 4 for k, v in tensors.items() if k.startswith(layout.prefix)):
        raise UserError(f"{flag} {path} holds no image backbone: its tensors are {_few(list(tensors))}; "
                        "give the file of the pre-trained network itself")
    return layout


def _strip_wrappers(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name


def _few(items: list[str], most: int = 3) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
