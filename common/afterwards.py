"""What the end of a training leaves and says: the trunk alone beside a student, and how to use and evaluate it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

import torch

from checkpoints.conversion import export
from checkpoints.frozen import load_frozen
from checkpoints.report import colours
from checkpoints.targets import Network
from runtime.agreement import on_first_rank
from runtime.device import Process
from runtime.errors import UserError
from runtime.own import is_own

PROBES = 2  # images on which the file of the trunk is compared with the student


def trunk_name(name: str) -> str:
    """``student_trunk.pth`` for ``student.pth``."""
    return f"{Path(name).stem}_trunk{Path(name).suffix}"


def write_trunks(folder: Path, names: Iterable[str], arch: str, process: Process) -> list[str]:
    """Beside each student of ``names`` its trunk alone, as export.py --to state_dict; what to say of them.

    ``arch``: the students'. Where a trunk cannot be written, a sentence says why: the student itself is there.
    """
    return on_first_rank(lambda: [line for name in names for line in _write_trunk(folder / name, arch)], process) or []


def _write_trunk(path: Path, arch: str) -> list[str]:
    place = path.with_name(trunk_name(path.name))
    try:
        encoder, report = load_frozen(path, arch, flag="student")
        size = encoder.backbone.spec.image_size
        images = torch.randint(256, (PROBES, 3, size, size), generator=torch.Generator().manual_seed(0))
        done = export(Network.of(encoder, report), "state_dict", place, {"random": encoder.normalise(images.byte())})
    except UserError as error:
        return [f"{place.name} was not written: {error}"]
    return [f"{place}: the trunk alone, {done.bytes / 1e6:.1f} MB (with its head {path.stat().st_size / 1e6:.1f}), for "
            f"images with mean {colours(report.mean)}, std {colours(report.std)}", f"    {done.code}"]


def use_student(path: Path, data: str, teacher: str | None, arch: str) -> list[str]:
    """The lines that load and evaluate a student."""
    own = ["-a", arch] if is_own(arch) else []
    code = f", arch={arch!r}" if own else ""
    evaluated = _command("compute_knn.py eval", "--data", _root(data), "--weights", path, *own)
    compared = _command("evaluate.py overlap", "--data", _root(data), "--weights", path, *own, "--teacher", teacher)
    return [f"{path}: used and evaluated by",
            f"    import coss; rows = coss.load({str(path)!r}{code}).embed('photos/')",
            evaluated, *([compared] if teacher else [])]


def use_teacher(path: Path, data: str, arch: str) -> list[str]:
    """The lines that evaluate a teacher and go on with it."""
    own = ["-a", arch] if is_own(arch) else []
    return [f"{path}: evaluated and distilled by",
            _command("compute_knn.py eval", "--data", _root(data), "--weights", path, *own),
            _command("compute_knn.py mine", "--data", data, "--weights", path, *own, "--output", path.parent / "nn"),
            _command("train_distill.py", "--data", data, "--distill", path, *(["-k", arch] if own else []),
                     "--closek-info", path.parent / "nn" / "closek_info.npy", "--output", path.parent / "student")]


def _root(data: str) -> str:
    """The folder that holds train/ and the test images, where ``data`` is its train/."""
    path = Path(data)
    beside = any((path.parent / name).is_dir() for name in ("val", "test"))
    return str(path.parent) if path.name == "train" and beside else data


def _command(script: str, *words: object) -> str:
    return f"    python {script} {shlex.join(map(str, words))}"
