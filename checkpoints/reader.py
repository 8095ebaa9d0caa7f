"""Reading a checkpoint file of any layout of the table: its container, wrappers, metadata and branch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from checkpoints.by_name import locate
from checkpoints.hugging_face import read_folder, weight_files
from checkpoints.layouts import LAYOUTS, Layout, find_layout
from checkpoints.match import Checkpoint
from checkpoints.report import few
from checkpoints.safe_load import read_file
from checkpoints.trunk import has_convolution
from models.backbones import STEMS
from runtime.errors import Damaged, UserError
from runtime.inert import Inert
from runtime.own import is_own
from runtime.store import check_content

WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile put these in front
CONTAINERS = ("state_dict", "model_state_dict", "classy_state_dict.base_model.model", "model", "module")  # DeepSpeed's
TRAINING_STATE = ("optimizer", "scaler", "lr_scheduler", "scheduler", "loss", "fp16_scaler", "amp", "updater", "args")


def read_checkpoint(path: str | Path, key: str | None = None, flag: str = "--weights", *, branch: str | None = None,
                    branch_flag: str = "--branch", trust: bool = False) -> Checkpoint:
    """Read ``path`` and find its layout. It is a file, a Hugging Face folder or a name (:mod:`checkpoints.by_name`);
    no code from it is run.

    ``key`` names the container within the file (dots separate levels), ``branch`` selects one of several trunks, and
    ``trust`` allows unpickling, which runs code from the file.
    """
    path, arch = locate(path, flag)
    files = weight_files(path, flag) if path.is_dir() else [path]
    raw = read_folder(path, files, flag, trust) if path.is_dir() else read_file(path, flag, trust)
    if not isinstance(raw, dict):
        raise UserError(f"{flag} {path} holds a {type(raw).__name__}, expected a dictionary of tensors")
    try:
        check_content(raw)
    except Damaged as error:
        raise UserError(f"{flag} {path} is damaged ({error}); copy it again, or, if its tensors were changed on "
                        "purpose, save it without its entry checksum") from None
    everything, raw = _flatten(raw), dict(dict.items(raw))
    if not everything:
        if whole := [f"{k} ({type(v).__module__}.{type(v).__name__})" for k, v in raw.items() if isinstance(v, Inert)]:
            raise UserError(f"{flag} {path} holds no tensors, only pickled objects ({few(whole)}), expected a state "
                            "dict; save its state_dict() and give that, or, if you trust where it comes from, add "
                            "--trust-checkpoint")
        raise UserError(f"{flag} {path} holds no tensors, only {few(list(map(str, raw)))}; "
                        "give a checkpoint with a state_dict")
    container, tensors = _open_container(everything, raw, path, key)
    outside: dict[str, int] = {}
    for name in everything.keys() - {container + k for k in tensors}:
        outside[name.partition(".")[0]] = outside.get(name.partition(".")[0], 0) + 1
    layout = find_layout(tensors)
    if layout is None and is_own(raw.get("arch")):  # without a convolution
        layout = next(x for x in LAYOUTS if x.name == "CoSS")
    if layout is None:
        raise UserError(f"{flag} {path} holds no image backbone, its tensors are {few(list(tensors))}; "
                        "give the file of the pretrained network itself")
    checkpoint = Checkpoint(path, flag, layout, container.rstrip("."), layout.prefix, tensors, outside,
                            {**_meta(raw), **({"arch": arch} if arch else {})}, tuple(files))
    if branch is None:
        return checkpoint
    prefix = branch.rstrip(".") + "."
    if prefix not in checkpoint.branches() and has_convolution(tensors, prefix):
        others = sorted({k.partition(".")[0] for k in tensors if not k.startswith(prefix)})
        return dataclasses.replace(checkpoint, prefix=prefix, layout=Layout(
            f"{branch_flag} {branch}", prefix, "", ("*fc.", "*head.", "*classifier."), dropped=tuple(others)))
    if prefix not in checkpoint.branches():
        there = [p.rstrip(".") for p in checkpoint.branches() if p]
        raise UserError(f"{branch_flag} {branch} is not in {path}; it holds "
                        + (f"{', '.join(there)}" if there else "one trunk without a prefix, so omit the flag"))
    return dataclasses.replace(checkpoint, prefix=prefix)


def _flatten(raw: dict[Any, Any], above: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Every tensor and numeric array of nested dictionaries under its dotted path, without wrappers at any level."""
    tensors: dict[str, Tensor] = {}
    for name, value in dict.items(raw):  # dict's own method: a file can give its dictionaries attributes
        name = _strip_wrappers(str(name))
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu" and value.dtype.itemsize <= 8:
            value = torch.from_numpy(np.array(value, value.dtype.newbyteorder("="), order="C"))
        if isinstance(value, nn.Module):  # only from a trusted file
            value = value.state_dict()
        if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
            tensors[name] = Tensor.detach(value)  # without attributes and gradients
        elif isinstance(value, dict) and id(value) not in above:  # a pickle can hold a dictionary that holds itself
            tensors.update((f"{name}.{inner}", x) for inner, x in _flatten(value, (*above, id(value))).items())
    return tensors


def _open_container(everything: dict[str, Tensor], raw: dict[str, Any], path: Path,
                    key: str | None) -> tuple[str, dict[str, Tensor]]:
    """The path of the container followed by a dot, or '' for a bare file, and its tensors."""
    def inside(name: str) -> dict[str, Tensor]:
        return {k[len(name) + 1:]: v for k, v in everything.items() if k.startswith(name + ".")}

    if key is not None:
        if tensors := inside(key):
            return key + ".", tensors
        if not any(isinstance(v, Tensor) for v in raw.values()):  # like the original, read a bare file without the key
            entries = [str(k) for k, v in raw.items() if isinstance(v, dict)] or [str(k) for k in raw]
            raise UserError(f"--checkpoint-key {key} is not in {path}; it holds {few(entries, 8)}")
    else:
        for name in CONTAINERS:
            holds = raw.get(name.partition(".")[0])
            if isinstance(holds, Mapping) and (tensors := inside(name)):
                return name + ".", tensors
    return "", {k: v for k, v in everything.items() if k.partition(".")[0] not in TRAINING_STATE}


def _meta(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What the file records about its network, as far as it is useful here."""
    inner = raw.get("meta")  # mmengine
    epoch = raw.get("epoch", inner.get("epoch") if isinstance(inner, Mapping) else None)
    colours = {name: raw[name] for name in ("mean", "std")
               if isinstance(raw.get(name), list | tuple) and len(raw[name]) == 3}
    arch = raw.get("arch", getattr(raw.get("args"), "arch", None))  # DINO's lies in its arguments
    meta = {"arch": arch, "stem": raw.get("stem"), "image_size": raw.get("image_size"),
            "feature": raw.get("feature"), "epoch": epoch, "hidden_act": raw.get("hidden_act"),
            "heads": raw.get("heads"), "code_sha256": raw.get("code_sha256")}
    kinds = {"arch": str, "stem": str, "image_size": int, "feature": str, "epoch": int, "hidden_act": str, "heads": int,
             "code_sha256": str}
    meta = {name: value for name, value in meta.items() if isinstance(value, kinds[name])}
    if meta.get("stem") not in (None, *STEMS):
        del meta["stem"]
    teacher = raw.get("teacher")  # the report of our own students', as opposed to DINO's weights
    if isinstance(teacher, dict) and isinstance(teacher.get("sha256"), str):
        meta["teacher"] = teacher
    return {**meta, **colours}


def _strip_wrappers(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name.replace("._orig_mod.", ".")  # a part alone was compiled
