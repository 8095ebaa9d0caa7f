"""Whether two folders hold the same run, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

TIMES = {"images_per_second", "data_wait"}  # measured, so never twice the same


def differences(one: Path, two: Path) -> list[str]:
    """What is not the same in two finished runs: the files of weights, the whole resume state, every line of
    metrics.jsonl and every point of TensorBoard but measured times. The folder's own name may differ."""
    found = []
    for name in sorted({path.name for folder in (one, two) for path in folder.glob("*.pth")}):
        if name.startswith("checkpoint-"):
            continue
        states = [torch.load(folder / name, map_location="cpu", weights_only=True) for folder in (one, two)]
        for state in states if not name.endswith("_trunk.pth") else ():  # those hold tensors alone
            state.pop("checksum")
            for key in ("output", "workers", "save_every", "keep"):
                state["config"].pop(key)
        found += [f"{name}: {where}" for where in _tree_differences(*states)]
    found += [f"metrics.jsonl: {line}" for line in _list_differences(*(metrics(folder) for folder in (one, two)))]
    curves = [scalars(folder) for folder in (one, two)]
    if curves[0].keys() != curves[1].keys():
        found.append(f"TensorBoard: other curves, {sorted(curves[0].keys() ^ curves[1].keys())}")
    for tag in curves[0].keys() & curves[1].keys():
        found += [f"TensorBoard {tag}: {line}" for line in _list_differences(curves[0][tag], curves[1][tag])]
    return found


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without measured times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each point of each curve, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(point.step, point.value) for point in events.Scalars(tag)] for tag in events.Tags()["scalars"]
            if tag.rpartition("/")[2] not in TIMES}


def _list_differences(one: list[Any], two: list[Any]) -> list[str]:
    if len(one) != len(two):
        return [f"{len(one)} and {len(two)} entries"]
    return [f"entry {i}: {a} and {b}" for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b][:3]


def _tree_differences(one: Any, two: Any, where: str = "") -> list[str]:
    if type(one) is not type(two):
        return [f"{where} {type(one).__name__} and {type(two).__name__}"]
    if isinstance(one, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape and torch.equal(_bits(one), _bits(two))
        return [] if same else [where]
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return [f"{where} has other keys, {sorted(map(str, one.keys() ^ two.keys()))}"]
        return [line for key in one for line in _tree_differences(one[key], two[key], f"{where}[{key}]")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(two):
            return [f"{where} {len(one)} and {len(two)} entries"]
        return [line for i, pair in enumerate(zip(one, two, strict=True))
                for line in _tree_differences(*pair, f"{where}[{i}]")]
    return [] if one == two else [f"{where} {one!r} and {two!r}"]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
