"""The root scripts as installed commands: coss-distill is train_distill.py, and so on."""

from __future__ import annotations

import functools
import runpy

from coss import ROOT, add_root


def run(script: str) -> None:
    """Run a root script as if it had been started directly."""
    add_root()
    runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")


distill, teacher, knn, evaluate, embed, export, inspect, pack = (functools.partial(run, script) for script in (
    "train_distill", "train_teacher", "compute_knn", "evaluate", "embed", "export", "inspect_checkpoint",
    "pack_dataset"))
