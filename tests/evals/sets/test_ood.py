"""Folders of images from elsewhere, matched to the training classes."""

import numpy as np
import pytest
from PIL import Image

from evals.sets.ood import open_elsewhere
from runtime.errors import UserError

CLASSES = [f"n{i:08d}" for i in range(12)]


def tree(root, classes, each=1):
    for name in classes:
        for i in range(each):
            path = root / str(name) / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(path)


def test_classes_by_name_and_only_those_that_are_there(tmp_path):
    tree(tmp_path, [CLASSES[7], CLASSES[2], CLASSES[11]], each=2)
    only, = open_elsewhere("r", str(tmp_path), CLASSES)
    assert only.columns.tolist() == [2, 7, 11]
    assert only.labels.tolist() == [2, 2, 7, 7, 11, 11]
    assert (only.name, only.corruption, only.severity) == ("r", None, None)


def test_numbered_folders_count_the_classes_in_order(tmp_path):
    tree(tmp_path, range(12))  # sorted as texts, 10 and 11 come before 2
    only, = open_elsewhere("v2", str(tmp_path), CLASSES)
    assert [(only.source.names[i].split("/")[0], label) for i, label in enumerate(only.labels.tolist())] == [
        (str(label), label) for label in (0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9)]
    assert (only.columns == np.arange(12)).all()


def test_numbers_that_are_the_training_classes_names_are_names(tmp_path):
    tree(tmp_path, [2, 10])
    only, = open_elsewhere("digits", str(tmp_path), [str(i) for i in sorted(map(str, range(12)))])
    assert only.labels.tolist() == [2, 4]  # 0, 1, 10, 11, 2 …


def test_the_three_variants_of_v2(tmp_path):
    for variant in ("matched-frequency", "threshold0.7", "top-images"):
        tree(tmp_path / f"imagenetv2-{variant}-format-val", range(12))
    assert [each.name for each in open_elsewhere("v2", str(tmp_path), CLASSES)] == [
        "v2/matched-frequency", "v2/threshold0.7", "v2/top-images"]


@pytest.mark.parametrize("grouped", [False, True])
def test_corruptions_and_severities(tmp_path, grouped):
    for name, group in (("fog", "weather"), ("gaussian_noise", "noise")):
        for severity in range(1, 6):
            tree(tmp_path / (group if grouped else "") / name / str(severity), CLASSES)
    found = open_elsewhere("c", str(tmp_path), CLASSES)
    names = ["gaussian_noise", "fog"] if grouped else ["fog", "gaussian_noise"]
    assert [(each.corruption, each.severity) for each in found] == [(n, s) for n in names for s in range(1, 6)]
    assert found[0].name == f"c/{names[0]}/1"
    assert all((each.labels == np.arange(12)).all() for each in found)


def test_classes_in_sub_folders_are_no_corruptions(tmp_path):
    for name in CLASSES[:3]:
        tree(tmp_path / name, ["left", "right"])
    only, = open_elsewhere("own", str(tmp_path), CLASSES)
    assert only.labels.tolist() == [0, 0, 1, 1, 2, 2]


def test_what_is_not_there_and_what_does_not_fit(tmp_path):
    with pytest.raises(UserError, match=r"--ood sketch=.*gone is not a folder.*github.com/HaohanWang/ImageNet-Sketch"):
        open_elsewhere("sketch", str(tmp_path / "gone"), CLASSES)
    tree(tmp_path, [CLASSES[0], "cat"])
    with pytest.raises(UserError, match=r"--ood a: 1 of the 2 class folders .* \(cat…\)"):
        open_elsewhere("a", str(tmp_path), CLASSES)
    tree(tmp_path / "numbers", range(13))
    with pytest.raises(UserError, match=r"1 of the 13 class folders .* \(12…\)"):
        open_elsewhere("v2", str(tmp_path / "numbers"), CLASSES)


def test_a_root_with_val_is_taken_as_its_val(tmp_path):
    for part in ("train", "val"):
        tree(tmp_path / part, CLASSES[:2], each=1 if part == "val" else 3)
    only, = open_elsewhere("pair", str(tmp_path), CLASSES)
    assert only.labels.tolist() == [0, 1]
