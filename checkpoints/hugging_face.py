"""A model's folder in Hugging Face's form: config.json, weights in one or several files, and the normalisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints.safe_load import read_file
from models.backbones import TIMM, timm_config
from runtime.errors import UserError
from runtime.state import load_json

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.bin")


def weight_files(folder: Path, flag: str) -> list[Path]:
    """The files in ``folder`` that hold the weights, in a fixed order."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            table = _json(index, flag).get("weight_map")
            names = sorted({str(x) for x in table.values()}) if isinstance(table, dict) else []
            if bad := [x for x in names if Path(x).name != x or not (folder / x).is_file()]:
                raise UserError(f"{flag} {folder}: {index.name} names the file {bad[0]}, which is not there; download "
                                "the whole folder again")
            if names:
                return [folder / x for x in names]
    raise UserError(f"{flag} {folder} is a folder without {WEIGHTS[0]} or {WEIGHTS[1]}; give a checkpoint file, or the "
                    "folder of a Hugging Face model")


def read_folder(folder: Path, files: list[Path], flag: str, trust: bool = False) -> dict[str, Any]:
    """The tensors of all ``files`` as one state dict, and the description of the network in the folder's JSON files
    and, of a student's (export.py --to safetensors), in the file itself."""
    tensors: dict[str, Any] = {}
    inside: dict[str, Any] = {}
    for path in files:
        raw = read_file(path, flag, trust)
        tensors |= raw.get("state_dict", raw) if isinstance(raw, dict) else {}
        inside |= raw if isinstance(raw, dict) and "source_sha256" in raw else {}
    return {**inside, "state_dict": tensors, **about(folder, flag)}


def about(folder: Path, flag: str) -> dict[str, Any]:
    """Those of ``arch``, ``hidden_act``, ``heads``, ``mean`` and ``std`` that the folder records."""
    config = _json(folder / "config.json", flag)
    if isinstance(config.get("architecture"), str) and isinstance(config.get("pretrained_cfg"), dict):
        return _about_timms(config["architecture"], config["pretrained_cfg"])
    inner = config.get("vision_config") or config  # of CLIP and SigLIP with their text halves
    images = _json(folder / "preprocessor_config.json", flag)
    found = {"hidden_act": inner.get("hidden_act"), "heads": inner.get("num_attention_heads"),
             "mean": images.get("image_mean"), "std": images.get("image_std")}
    return {name: value for name, value in found.items() if value is not None}


def _about_timms(arch: str, record: dict[str, Any]) -> dict[str, Any]:
    """The description in timm's config.json; the tag is included if timm knows it."""
    name = f"{arch}.{record.get('tag')}"
    try:
        timm_config(name, TIMM)
    except UserError:  # the tag of the user's own training, or timm is not installed, which is reported later
        name = arch
    return {"arch": TIMM + name, **{key: record[key] for key in ("mean", "std") if record.get(key)}}


def _json(path: Path, flag: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = load_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {path} is not JSON ({error}); download it again") from None
    return content if isinstance(content, dict) else {}
