"""The evaluations by name: modules with HELP, add_flags, run and, for `evaluate.py all`, in_all."""

from __future__ import annotations

from types import ModuleType

from common import (
    evaluate_finetune,
    evaluate_knn,
    evaluate_linear,
    evaluate_map,
    evaluate_overlap,
    evaluate_retrieval,
    evaluate_robustness,
    evaluate_transfer,
    evaluate_video,
)

EVALUATIONS: dict[str, ModuleType] = {
    "knn": evaluate_knn, "linear": evaluate_linear, "finetune": evaluate_finetune, "transfer": evaluate_transfer,
    "robustness": evaluate_robustness, "retrieval": evaluate_retrieval, "overlap": evaluate_overlap,
    "map": evaluate_map, "video": evaluate_video,
}
