"""Average precision of boxes, by COCO's own code (pycocotools), and the detections that it is computed from."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from runtime.agreement import together
from runtime.device import Process, gather_objects
from runtime.packages import need_package

NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # COCO's first six: IoU 0.5-0.95, 0.5, 0.75; small, medium, large


def need_pycocotools() -> None:
    """Refuse to start without pycocotools."""
    need_package("pycocotools", "average precision", module="pycocotools.cocoeval")


@torch.inference_mode()
def detect(model: nn.Module, batches: Iterable[Any], process: Process, check: Callable[[Any], None],
           ) -> list[dict[str, Any]]:
    """Detections of ``model`` on this rank's ``batches`` (``views``, ``indices``), of all ranks, as COCO's results.

    A collective. ``check`` looks at each batch before it is used. The model is left in evaluation mode.
    """
    model.eval()
    found = []
    with together(process):
        for batch in batches:
            check(batch)
            images = [view.to(process.device).float() / 255 for view in batch.views]
            for index, output in zip(batch.indices.tolist(), model(images), strict=True):
                found += as_results(index, output)
    return [result for part in gather_objects(found) for result in part]


def as_results(image: int, output: dict[str, Tensor]) -> list[dict[str, Any]]:
    """torchvision's ``boxes`` [n, 4] (corners), ``labels`` [n], ``scores`` [n] of an image as COCO's results."""
    corners = output["boxes"].double().cpu()
    sides = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
    return [{"image_id": image, "category_id": label, "bbox": box, "score": score} for label, box, score in
            zip(output["labels"].tolist(), sides.tolist(), output["scores"].tolist(), strict=True)]


def average_precision(truth: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, Any]:
    """COCO's average precision in percent: :data:`NAMES`, None if no object has that size, and ``classes``, AP of
    each class by name.

    ``truth`` is in COCO's format, ``results`` in that of its results. Crowds count neither way.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        known, found = COCO(), COCO()
        known.dataset = {"info": {}, **truth}
        known.createIndex()
        if results:
            found = known.loadRes(results)
        else:  # loadRes takes no empty list
            found.dataset = {**known.dataset, "annotations": []}
            found.createIndex()
        scorer = COCOeval(known, found, "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    precision = scorer.eval["precision"][:, :, :, 0, -1]               # [IoU, recall, class], all sizes, 100 an image
    names = {category["id"]: category["name"] for category in truth["categories"]}
    classes = {names[number]: _percent(_mean(precision[:, :, k])) for k, number in enumerate(scorer.params.catIds)}
    scores = {name: _percent(value) for name, value in zip(NAMES, scorer.stats[:len(NAMES)], strict=True)}
    return {**scores, "classes": classes}


def _mean(values: np.ndarray) -> float:
    """The mean without the entries of -1, which mean none."""
    return float(values[values > -1].mean()) if (values > -1).any() else -1.0


def _percent(value: float) -> float | None:
    return None if value < 0 else 100 * float(value)
