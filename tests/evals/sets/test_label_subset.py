import numpy as np
import pytest

from data.sources import FileSource
from evals.sets.label_subset import balanced_subset, listed_subset
from runtime.errors import UserError


def source(counts=(50, 50, 30), extra=()):
    names = [f"n{label}/n{label}_{i}.JPEG" for label, count in enumerate(counts) for i in range(count)]
    labels = np.repeat(np.arange(len(counts)), counts)
    return FileSource("/d", [*names, *extra], np.append(labels, [0] * len(extra)), list("abc"), "d")


def test_equally_many_of_each_class_and_seeded():
    taken = balanced_subset(source(), 0.3, 0)  # 39 of 130
    assert np.bincount(taken.labels).tolist() == [13, 13, 13]
    assert list(taken.names) == list(balanced_subset(source(), 0.3, 0).names)
    assert list(taken.names) != list(balanced_subset(source(), 0.3, 1).names)
    assert set(balanced_subset(source(), 0.1, 0).names) < set(taken.names)


def test_a_class_that_has_fewer_gives_all():
    assert np.bincount(balanced_subset(source((50, 50, 3)), 0.3, 0).labels).tolist() == [10, 10, 3]
    assert len(balanced_subset(source(), 1, 0)) == 130


@pytest.mark.parametrize("share", [0, -1, 1.5, float("nan"), 0.001])
def test_shares_that_leave_nothing(share):
    with pytest.raises(UserError, match=r"^--labels "):
        balanced_subset(source(), share, 0)


def test_a_list_of_file_names_or_paths(tmp_path):
    path = tmp_path / "1percent.txt"
    path.write_text("n2_7.JPEG\n\nn0/n0_3.JPEG\nn0_1.JPEG\n")
    taken = listed_subset(source(), path)
    assert list(taken.names) == ["n0/n0_1.JPEG", "n0/n0_3.JPEG", "n2/n2_7.JPEG"]
    assert taken.labels.tolist() == [0, 0, 2]


@pytest.mark.parametrize(("text", "words"), [
    ("n0_1.JPEG\nn9_9.JPEG\n", "lists 1 of 2 images that d lacks, the first is n9_9.JPEG"),
    ("\n", "lists no image"), ("same.JPEG\n", "2 images of d are so called")])
def test_lists_that_do_not_fit(text, words, tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        listed_subset(source(extra=("a/same.JPEG", "b/same.JPEG")), path)


def test_a_list_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"--labels .*none.txt could not be read"):
        listed_subset(source(), tmp_path / "none.txt")
    (tmp_path / "image.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(UserError, match="image.jpg lists 1 of 1 images that .* lacks"):
        listed_subset(source(), tmp_path / "image.jpg")


def test_names_that_are_not_utf8(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"odd\xff.JPEG\n")
    found = listed_subset(source(extra=("a/odd\udcff.JPEG", "b/other.JPEG")), tmp_path / "list.txt")
    assert list(found.names) == ["a/odd\udcff.JPEG"]
