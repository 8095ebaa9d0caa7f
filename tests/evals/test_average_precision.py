"""Average precision by COCO's code on cases whose value is known by hand."""

import platform
import sys

import pytest
import torch
from helpers.ranks import on_ranks
from torch import nn

from data.batches import Batch
from evals.average_precision import NAMES, as_results, average_precision, detect, need_pycocotools
from runtime.device import Process
from runtime.errors import UserError

pytest.importorskip("pycocotools", reason="scores boxes; pip install pycocotools")

A, B = (10, 10, 110, 110), (200, 200, 300, 300)  # corners; large by COCO's reckoning


def truth(*objects, classes=("cat", "dog")):
    """(image, label from 1, corners, crowd) each, on two images."""
    return {"images": [{"id": i, "height": 400, "width": 400} for i in range(2)],
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(classes)],
            "annotations": [{"id": n + 1, "image_id": image, "category_id": label, "iscrowd": int(crowd),
                             "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1)}
                            for n, (image, label, (x1, y1, x2, y2), crowd) in enumerate(objects)]}


def found(image, *objects):
    """(label, corners, score) each."""
    labels, boxes, scores = zip(*objects, strict=True)
    return as_results(image, {"labels": torch.tensor(labels), "boxes": torch.tensor(boxes).float(),
                              "scores": torch.tensor(scores)})


def test_everything_found():
    scores = average_precision(truth((0, 1, A, 0), (1, 2, B, 0)), found(0, (1, A, 0.9)) + found(1, (2, B, 0.8)))
    whole = pytest.approx(100)
    assert [scores[name] for name in NAMES] == [whole, whole, whole, None, None, whole]
    assert scores["classes"] == {"cat": whole, "dog": whole}


def test_a_box_that_overlaps_by_two_thirds():
    """IoU 80/120 passes the thresholds 0.5, 0.55, 0.6 and 0.65, four of ten."""
    scores = average_precision(truth((0, 1, A, 0)), found(0, (1, (30, 10, 130, 110), 0.9)))
    assert (scores["AP"], scores["AP50"], scores["AP75"]) == (pytest.approx(40), pytest.approx(100), 0)


def test_a_false_box_first_halves_the_precision():
    """Precision 1/2 at every recall, interpolated."""
    scores = average_precision(truth((0, 1, A, 0)), found(0, (1, B, 0.9), (1, A, 0.8)))
    assert scores["AP"] == pytest.approx(50)


def test_one_of_two_found():
    """Recall ends at 1/2: 51 of COCO's 101 places have precision 1."""
    scores = average_precision(truth((0, 1, A, 0), (1, 1, B, 0)), found(0, (1, A, 0.9)))
    assert scores["AP"] == pytest.approx(100 * 51 / 101)


def test_crowds_count_neither_way_and_a_class_without_objects_has_no_score():
    scores = average_precision(truth((0, 1, A, 0), (0, 1, B, 1)), found(0, (1, B, 0.95), (1, A, 0.9)))
    assert scores["AP"] == pytest.approx(100)
    assert scores["classes"] == {"cat": pytest.approx(100), "dog": None}


def test_nothing_found():
    scores = average_precision(truth((0, 1, A, 0)), [])
    assert (scores["AP"], scores["classes"]["cat"]) == (0, 0)


def test_detections_are_collected_by_image():
    class Finder(nn.Module):
        """Says of each image one box as large as the image."""

        def forward(self, images):
            assert not self.training
            return [{"labels": torch.tensor([2]), "scores": image.max()[None],
                     "boxes": torch.tensor([[0.0, 0.0, image.shape[2], image.shape[1]]])} for image in images]

    images = tuple(torch.full((3, 4 + i, 7), 51 * i, dtype=torch.uint8) for i in range(3))
    batches = [Batch(images[:2], torch.tensor([5, 3]), []), Batch(images[2:], torch.tensor([4]), [])]
    seen = []
    results = detect(Finder().train(), batches, Process(0, 1, torch.device("cpu")), seen.append)
    assert seen == batches
    assert results == [{"image_id": index, "category_id": 2, "bbox": [0, 0, 7, 4 + i], "score": pytest.approx(0.2 * i)}
                       for i, index in enumerate((5, 3, 4))]


def _on_a_rank(rank, broken):
    """A batch each, of image 10 + rank; the images of ranks in ``broken`` cannot be used."""
    def check(batch):
        if rank in broken:
            raise UserError(f"image {batch.indices[0]} is broken", every_process=False)

    class Finder(nn.Module):
        def forward(self, images):
            return [{"labels": torch.tensor([1]), "scores": torch.ones(1), "boxes": torch.ones(1, 4)} for _ in images]

    batches = [Batch((torch.zeros(3, 4, 4, dtype=torch.uint8),), torch.tensor([10 + rank]), [])]
    process = Process(rank, 2, torch.device("cpu"), torch.distributed.new_group(backend="gloo"))
    try:
        return [result["image_id"] for result in detect(Finder(), batches, process, check)]
    except UserError as error:
        return str(error)


@pytest.mark.parametrize(("broken", "expected"), [((), [10, 11]),
                                                    ((1,), f"rank 1 on {platform.node()}: image 11 is broken")])
def test_every_rank_has_what_all_found_or_the_error_of_one(tmp_path, broken, expected):
    assert on_ranks(2, _on_a_rank, tmp_path, broken) == [expected, expected]


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.delitem(sys.modules, "pycocotools.cocoeval", raising=False)
    with pytest.raises(UserError, match="pycocotools, which is not installed; run `pip install pycocotools"):
        need_pycocotools()
