"""The checkpoints of a run: written atomically, the last few kept, verified when read."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from runtime.archive import check_archive
from runtime.errors import Damaged, UserError
from runtime.regular import open_regular
from runtime.state import write_atomic

CHECKPOINT = "checkpoint.pth"
OLDER = re.compile(r"checkpoint-(\d+)\.pth")  # the number of steps done
CHECKSUM = "checksum"
PLACE = ("epoch", "step", "steps", "skipped")  # where a run was


class Checkpoints:
    """``checkpoint.pth``, the newest, and those before it as ``checkpoint-STEPS.pth``: ``keep`` in all.

    ``checkpoint.pth`` is a complete file at any moment: the older one gets its second name before the new one replaces
    it, and is removed only after that.
    """

    def __init__(self, folder: Path, keep: int, newest: int | None = None) -> None:
        """``newest``: the steps of a ``checkpoint.pth`` known to be valid, which is then kept as an older one."""
        self.folder, self.keep, self.newest = folder, keep, newest

    def save(self, state: dict[str, Any]) -> Path:
        """Write ``state``, which holds tensors and plain values, with ``steps`` among them. Raises UserError."""
        path, steps = self.folder / CHECKPOINT, state["steps"]
        if self.keep > 1 and self.newest not in (None, steps):
            self._keep_as(path, self.folder / f"checkpoint-{self.newest:09d}.pth")
        save_checkpoint(state, path)
        self.newest = steps
        older = [(number, file) for number, file in older_checkpoints(self.folder) if number < steps]
        kept = {file for _, file in older[:self.keep - 1]}
        for _, file in older_checkpoints(self.folder):  # later ones belong to a course that was abandoned
            if file not in kept:
                with contextlib.suppress(OSError):
                    file.unlink()
        return path

    @staticmethod
    def _keep_as(path: Path, older: Path) -> None:
        with contextlib.suppress(FileNotFoundError):
            older.unlink()
        try:
            os.link(path, older)
        except FileNotFoundError:
            return
        except OSError:  # no hard links here: for a moment only the older name exists, not checkpoint.pth
            with contextlib.suppress(OSError):
                path.replace(older)


def older_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(steps, file) of each ``checkpoint-STEPS.pth``, the newest first."""
    found = ((OLDER.fullmatch(file.name), file) for file in folder.glob("checkpoint-*.pth"))
    return sorted(((int(match[1]), file) for match, file in found if match), reverse=True)


def candidates(folder: Path) -> list[Path]:
    """The checkpoints that a folder holds, the newest first."""
    newest = folder / CHECKPOINT
    return [newest] * newest.exists() + [file for _, file in older_checkpoints(folder)]


def find_resume(output: Path, resume: str) -> list[Path]:
    """The checkpoints to resume from, the best first; none for a fresh start. Raises :class:`UserError`.

    ``resume``: ``auto`` resumes from what ``output`` holds, if anything; ``force`` requires a checkpoint there;
    anything else is the path of a checkpoint.
    """
    if resume not in ("auto", "force"):
        if not Path(resume).is_file():
            raise UserError(f"--resume {resume} is not a file; give a {CHECKPOINT}, or leave the flag out to resume "
                            "from --output")
        return [Path(resume)]
    found = candidates(output)
    if resume == "force" and not found:
        raise UserError(f"--resume: {output} holds no {CHECKPOINT} to resume from; leave the flag out to start there")
    return found


def load_newest(paths: list[Path]) -> tuple[Path, dict[str, Any], list[str]]:
    """The first valid file of ``paths``, its content, and a sentence on each damaged one before it.

    Raises :class:`UserError` if none is valid.
    """
    said = []
    for path in paths:
        try:
            return path, read_checkpoint(path), said
        except Damaged as error:
            said.append(f"{path} is damaged ({error})")
    raise UserError(f"--resume {'; '.join(said)}; nothing to resume from: remove such files to start anew")


def save_checkpoint(state: dict[str, Any], path: Path) -> Path:
    """``torch.save`` with a checksum, atomically. ``state`` holds tensors and plain values, so that it loads safely."""
    buffer = io.BytesIO()  # torch.save does not distinguish a full disk from other errors
    torch.save({**state, CHECKSUM: digest(state)}, buffer)
    return write_atomic(path, lambda file: file.write(buffer.getbuffer()) and None)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint, on the CPU; raises :class:`UserError` if it is damaged."""
    return load_newest([path])[1]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A training checkpoint, on the CPU; raises :class:`Damaged`."""
    try:
        check_archive(path)
        with open_regular(path) as file:  # by its name torch opens only what has UTF-8 letters
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Damaged:
        raise
    except Exception as error:  # torch.load fails in many ways on a damaged file; all mean the same to the user
        raise Damaged(f"{type(error).__name__} on reading") from None
    state = dict(dict.items(state)) if isinstance(state, dict) else state  # it may have its own attributes
    if not isinstance(state, dict) or "random" not in state:
        _refuse_networks(path, state)
        raise Damaged("not a training checkpoint of this project")
    if CHECKSUM not in state:
        raise Damaged("it has no checksum, so it cannot be verified")
    check_content(state)
    del state[CHECKSUM]
    if not all(type(state.get(name)) is int and state[name] >= 0 for name in PLACE):
        raise Damaged("it does not say how far the run had come")
    return state


def check_content(content: Any) -> None:
    """Raise :class:`Damaged` if ``content``, read from a file, was written by :func:`save_checkpoint` and has changed
    since. Other programs' files, which have no such checksum, pass.

    ``dict.items(content)``, not ``content.items()``: a file may have given its dictionaries other attributes."""
    content = dict(dict.items(content)) if isinstance(content, dict) else {}
    claimed = content.get(CHECKSUM)
    if isinstance(claimed, str) and re.fullmatch("[0-9a-f]{64}", claimed) and claimed != digest(
            {name: value for name, value in content.items() if name != CHECKSUM}):
        raise Damaged("its content does not have the checksum that it was written with")


def _refuse_networks(path: Path, state: Any) -> None:
    """Raise :class:`UserError` for a valid file that holds only a network, from which no run can resume."""
    if isinstance(state, dict) and CHECKSUM in state:
        check_content(state)
        raise UserError(f"--resume {path} holds only the network, and a run needs its full state to resume; give the "
                        f"{CHECKPOINT} beside it, or leave the flag out to start anew")
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        raise UserError(f"--resume {path} is a checkpoint in the format of another program (the original code's are "
                        "such), which lacks the random state and the place in the epoch needed to resume; let "
                        "that program finish it, or start anew in another --output; the network in it can be given as "
                        "--weights or --distill")


def digest(value: Any) -> str:
    """SHA-256 over a tree of dicts, lists, tensors and plain values: types, names, shapes and bytes."""
    sha = hashlib.sha256()
    for part in _parts(value):
        sha.update(part)
    return sha.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}:".encode()
        yield memoryview(Tensor.detach(value).cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        yield f"dict {len(value)}:".encode()
        for key, item in dict.items(value):
            yield f"{key!r}=".encode()
            yield from _parts(item)
    elif isinstance(value, (list, tuple)):
        yield f"list {len(value)}:".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield f"{value!r};".encode()
