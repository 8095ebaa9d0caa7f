"""Boxes read from COCO's and VOC's formats, and batches of them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from data.samplers import RandomSampler
from evals.sets.box_batches import BoxDataset, check_boxes, evaluation_batches, training_batches
from evals.sets.boxes import open_pair, read_coco, read_voc
from runtime.errors import UserError

SIZES = [(20, 30), (24, 16), (10, 10)]  # height, width


def picture(path, size, colour=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), colour, np.uint8)).save(path)


def annotation(number, image, category, bbox, **more):
    return {"id": number, "image_id": image, "category_id": category, "bbox": bbox, "area": bbox[2] * bbox[3], **more}


def coco(folder, part="train2017", **changes):
    """Three images, the last without objects; categories out of order and with gaps."""
    content = {
        "images": [{"id": 10 + i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in enumerate(SIZES)],
        "categories": [{"id": 9, "name": "cat"}, {"id": 4, "name": "dog"}],
        "annotations": [annotation(1, 11, 4, [1, 2, 8, 5]), annotation(2, 10, 9, [3, 4, 10, 12]),
                        annotation(3, 10, 4, [0, 0, 30, 20], iscrowd=1), annotation(4, 10, 9, [5, 5, 0, 3])],
        **changes}
    for i, size in enumerate(SIZES):
        picture(folder / part / f"{i}.png", size, 40 * i)
    file = folder / "annotations" / f"instances_{part}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))
    return file


VOC = ("<annotation><size><width>30</width><height>20</height><depth>3</depth></size>{}</annotation>")
OBJECT = ("<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
          "<ymax>{}</ymax></bndbox></object>")


def voc(folder, split, objects):
    (folder / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
    (folder / "Annotations").mkdir(exist_ok=True)
    (folder / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"{split}{i}\n" for i in range(len(objects))))
    for i, boxes in enumerate(objects):
        picture(folder / "JPEGImages" / f"{split}{i}.jpg", (20, 30))
        (folder / "Annotations" / f"{split}{i}.xml").write_text(VOC.format("".join(OBJECT.format(*b) for b in boxes)))


def test_coco(tmp_path):
    source = read_coco(coco(tmp_path), tmp_path / "train2017")
    assert (len(source), source.classes) == (3, ["dog", "cat"])  # by id
    assert source.sizes.tolist() == [list(size) for size in SIZES]
    assert source.boxes[source.objects(0)].tolist() == [[3, 4, 13, 16], [0, 0, 30, 20], [5, 5, 5, 8]]
    assert source.labels[source.objects(0)].tolist() == [1, 0, 1]
    assert [source.trained(i).tolist() for i in range(3)] == [[0], [3], []]  # no crowd, and none without extent
    assert source.with_objects().tolist() == [0, 1]
    assert source.location(1) == str(tmp_path / "train2017/1.png")


def test_back_in_cocos_format(tmp_path):
    truth = read_coco(coco(tmp_path), tmp_path / "train2017").coco()
    assert truth["categories"] == [{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}]
    assert truth["images"] == [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(SIZES)]
    assert [(a["image_id"], a["category_id"], a["bbox"], a["area"], a["iscrowd"]) for a in truth["annotations"]] == [
        (0, 2, [3, 4, 10, 12], 120, 0), (0, 1, [0, 0, 30, 20], 600, 1), (0, 2, [5, 5, 0, 3], 0, 0),
        (1, 1, [1, 2, 8, 5], 40, 0)]
    assert len({a["id"] for a in truth["annotations"]}) == 4
    json.dumps(truth)


def test_the_pair_of_cocos_layout_has_the_classes_of_training(tmp_path):
    coco(tmp_path)
    coco(tmp_path, "val2017", categories=[{"id": 4, "name": "cat"}, {"id": 9, "name": "dog"}])
    train, test = open_pair(str(tmp_path))
    assert test.classes == train.classes == ["dog", "cat"]
    assert test.labels[test.objects(0)].tolist() == [0, 1, 0]  # category 9, now a dog
    assert train.fingerprint() != test.fingerprint()
    assert train.fingerprint() == open_pair(str(tmp_path))[0].fingerprint()


@pytest.mark.parametrize("above", [False, True])
def test_voc(tmp_path, above):
    place = tmp_path / "VOCdevkit" if above else tmp_path
    voc(place / "VOC2007", "trainval", [[("dog", 0, 1, 1, 30, 20), ("cat", 1, 3, 4, 10, 11)]])
    voc(place / "VOC2007", "test", [[("dog", 1, 2, 2, 9, 9)], []])
    voc(place / "VOC2012", "trainval", [[], [("emu", 0, 5, 5, 6, 6)]])
    train, test = open_pair(str(tmp_path))
    assert (len(train), train.classes, test.classes) == (3, ["cat", "dog", "emu"], ["cat", "dog", "emu"])
    assert train.title == "VOC2007 trainval + VOC2012 trainval"
    assert train.boxes.tolist() == [[0, 0, 30, 20], [2, 3, 10, 11], [4, 4, 6, 6]]
    assert train.areas.tolist() == [600, 64, 4]
    assert train.labels.tolist() == [1, 0, 2]
    assert train.trained(0).tolist() == [0, 1]  # the difficult one too
    assert train.with_objects().tolist() == [0, 2]
    assert [(a["category_id"], a["iscrowd"]) for a in test.coco()["annotations"]] == [(2, 1)]


@pytest.mark.parametrize(("changes", "says"), [
    ({"images": []}, "not in COCO's format"), ({"annotations": []}, "with 0 objects"),
    ({"categories": [{"id": 4, "name": "dog"}]}, "not in COCO's format .KeyError: 9"),
    ({"categories": [{"id": 4, "name": "dog"}, {"id": 9, "name": "dog"}]}, "two categories with the same name"),
    ({"annotations": [annotation(1, 10, 4, [1, 2, 3, 4]) | {"bbox": [1, 2]}]}, "not in COCO's format"),
])
def test_files_that_are_not_in_cocos_format(tmp_path, changes, says):
    file = coco(tmp_path, **changes)
    with pytest.raises(UserError, match=says) as error:
        read_coco(file, tmp_path / "train2017")
    assert str(file) in str(error.value)


def test_other_bad_input(tmp_path):
    with pytest.raises(UserError, match="has no known layout"):
        open_pair(str(tmp_path))
    file = coco(tmp_path)
    with pytest.raises(UserError, match="instances_val….json .*found none"):
        open_pair(str(tmp_path))
    coco(tmp_path, "val2017", categories=[{"id": 4, "name": "dog"}, {"id": 9, "name": "lion"}])
    with pytest.raises(UserError, match="1 classes that the training images lack .lion"):
        open_pair(str(tmp_path))
    coco(tmp_path, "train2014")
    with pytest.raises(UserError, match="found instances_train2014.json, instances_train2017.json"):
        open_pair(str(tmp_path))
    with pytest.raises(UserError, match="which is missing; give the folder of its images"):
        read_coco(file, tmp_path / "elsewhere")
    with pytest.raises(UserError, match="No such file"):
        read_coco(tmp_path / "none.json", tmp_path)
    file.write_text("{")
    with pytest.raises(UserError, match="JSONDecodeError"):
        read_coco(file, tmp_path / "train2017")
    voc(tmp_path / "VOC2007", "trainval", [[("dog", 0, 1, 1, 30, 20)]])
    with pytest.raises(UserError, match=r"test\.txt cannot be read"):
        open_pair(str(tmp_path))
    (tmp_path / "VOC2007/Annotations/trainval0.xml").write_text("<annotation/>")
    with pytest.raises(UserError, match=r"trainval0\.xml is not an annotation"):
        read_voc([(tmp_path / "VOC2007", "trainval")])


def test_a_mirrored_image_keeps_its_objects(tmp_path):
    """Each object is painted in a colour of its own; its box must hold that colour and nothing else, turned or not."""
    folder = tmp_path / "train2017"
    file = coco(tmp_path, annotations=[annotation(1, 10, 4, [2, 3, 9, 6]), annotation(2, 11, 9, [1, 5, 4, 8])])
    for i, (box, colour) in enumerate((((2, 3, 11, 9), 200), ((1, 5, 5, 13), 90))):
        pixels = np.zeros((*SIZES[i], 3), np.uint8)
        pixels[box[1]:box[3], box[0]:box[2]] = colour
        Image.fromarray(pixels).save(folder / f"{i}.png")
    source = read_coco(file, folder)
    turned = set()
    for stamp in range(12):
        batch = BoxDataset(source, np.array([1, 0]), seed=3).__getitems__([(1, stamp), (0, stamp + 100)])
        assert batch.indices.tolist() == [0, 1]
        for image, target, colour in zip(batch.views, batch.targets, (200, 90), strict=True):
            x1, y1, x2, y2 = target["boxes"][0].int().tolist()
            assert (image[:, y1:y2, x1:x2] == colour).all()
            assert (image == colour).sum() == 3 * (x2 - x1) * (y2 - y1)
            turned.add((colour, x1))
        assert [target["labels"].tolist() for target in batch.targets] == [[1], [2]]
    assert turned == {(200, 2), (200, 19), (90, 1), (90, 11)}


def test_batches(tmp_path):
    source = read_coco(coco(tmp_path), tmp_path / "train2017")
    rows = source.with_objects()
    sampler = RandomSampler(len(rows), 2, seed=1)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batch, = training_batches(source, rows, sampler, 0, 1, "cpu")
        assert sorted(batch.indices.tolist()) == [0, 1]
        check_boxes(batch)
    first, second = evaluation_batches(source, range(1, 3), 1, 0, "cpu")
    assert (first.indices.tolist(), second.indices.tolist()) == ([1], [2])
    assert second.targets[0]["boxes"].shape == (0, 4)
    assert first.views[0].dtype == torch.uint8
    assert first.views[0].shape == (3, 24, 16)


def test_images_that_cannot_be_used(tmp_path):
    source = read_coco(coco(tmp_path), tmp_path / "train2017")
    picture(tmp_path / "train2017/1.png", (16, 24))
    batch = BoxDataset(source, np.arange(3)).__getitems__([0, 1])
    with pytest.raises(UserError, match=r"1\.png could not be used .it has 24 x 16 pixels, its boxes are for 16 x 24"):
        check_boxes(batch)
    (tmp_path / "train2017/0.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"0\.png could not be used"):
        check_boxes(BoxDataset(source, np.arange(3)).__getitems__([0]))


def test_json_nested_too_deep(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"a.json is not in COCO's format \(ValueError: nested too deep\)"):
        read_coco(tmp_path / "a.json", tmp_path)
