"""What the scan of a large folder found, kept for the next start.

Listing 1.28 M files takes seconds on a local disk and minutes on a shared one. The list is kept in
$XDG_CACHE_HOME/coss/scans, else ~/.cache/coss/scans, with the state of every folder that was looked into: its
times of change, number, links and size. Any file or folder added, removed or renamed changes that state of the
folder it lies in. COSS_SCAN_CACHE names another place, or, as "off", switches it off.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np

from data.folders import Tree
from data.image_files import IMAGE_EXTENSIONS
from data.sources import Names
from runtime.errors import UserError
from runtime.state import write_atomic

VERSION = 2
MIN_IMAGES = 10_000  # what is scanned in a moment need not be kept
SETTLED_SECONDS = 5.0  # a folder that changed this lately may change again without its time showing it


def cache_folder() -> Path | None:
    """Where scans are kept; None if that is switched off."""
    chosen = os.environ.get("COSS_SCAN_CACHE", "")
    if chosen.lower() in ("off", "0", "no", "false"):
        return None
    if chosen:
        return Path(chosen)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coss" / "scans"
    except RuntimeError:  # no home
        return None


def load(folder: Path) -> Tree | None:
    """What the last scan found, if one was kept and no folder has changed since."""
    file = _file(folder)
    if file is None or not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as kept:
            version, places = int(kept["version"]), _strings(kept["folders"])
            if version != VERSION or _strings(kept["endings"]) != list(IMAGE_EXTENSIONS):
                return None
            if not np.array_equal(kept["states"], _states(folder, places)):
                return None
            names = Names.of_block(kept["names"].tobytes(), kept["ends"])
            labels = kept.get("labels")
            *notes, mixture = _strings(kept["notes"])
            return Tree(names, labels, _strings(kept["classes"]), places, notes, mixture)
    except Exception:  # a damaged file fails in many ways, and each means: scan again
        return None


def save(folder: Path, tree: Tree, started: float) -> None:
    """Keep a scan that began at time.time() `started`; quietly not where nothing can be written, or where a folder
    changed so lately that the scan may have missed it."""
    file = _file(folder)
    if file is None or len(tree.names) < MIN_IMAGES:
        return
    with contextlib.suppress(OSError, UserError):
        states = _states(folder, tree.folders)
        if states[:, :2].max() / 1e9 > started - SETTLED_SECONDS:
            return
        parts = {"version": np.array(VERSION), "states": states, "folders": _block(tree.folders),
                 "classes": _block(tree.classes), "notes": _block([*tree.notes, tree.mixture]),
                 "endings": _block(IMAGE_EXTENSIONS), "names": np.frombuffer(tree.names.block, dtype=np.uint8),
                 "ends": tree.names.ends}
        if tree.labels is not None:
            parts["labels"] = tree.labels
        write_atomic(file, lambda stream: np.savez(stream, **parts))


def _file(folder: Path) -> Path | None:
    home = cache_folder()
    key = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:24]
    return None if home is None else home / f"{key}.npz"


def _states(folder: Path, places: list[str]) -> np.ndarray:
    """int64 [folders, 5]. The time of the last change of status cannot be set back, as that of the content can."""
    stats = [(folder / place).stat() for place in places]
    return np.array([(s.st_mtime_ns, s.st_ctime_ns, s.st_ino % 2**63, s.st_nlink, s.st_size) for s in stats],
                    dtype=np.int64)


def _block(strings: list[str]) -> np.ndarray:
    return np.frombuffer(b"".join(os.fsencode(s) + b"\0" for s in strings), dtype=np.uint8)


def _strings(block: np.ndarray) -> list[str]:
    return [os.fsdecode(s) for s in block.tobytes().split(b"\0")[:-1]]
