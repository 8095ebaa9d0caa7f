"""What every source has: fingerprints, subsets, names, and that it can be sent to a worker."""

import hashlib
import pickle

import numpy as np
import pytest
from helpers.trees import write

from data.datasets import ArraySource, ImageSource, open_source
from data.sources import Names
from runtime.errors import UserError

pytestmark = pytest.mark.usefixtures("root")


def array_source(labels):
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    return ArraySource(images, np.array(labels), ["a", "b", "c"], "made/train")


def test_fingerprint_is_of_the_names_in_order(tmp_path):
    source = open_source(str(write(tmp_path / "x", "a/0.png", "b/é.png")))
    assert source.fingerprint() == hashlib.sha256("a/0.png\nb/é.png\n".encode()).hexdigest()
    other = open_source(str(write(tmp_path / "y", "a/0.png", "b/é.png")))
    assert other.fingerprint() == source.fingerprint()
    assert source.take(np.array([1, 0])).fingerprint() != source.fingerprint()
    assert source.take(np.array([0, 1])).fingerprint() == source.fingerprint()


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.29, 0.5, 0.99])
def test_subset_takes_the_first_of_each_class(fraction):
    labels = np.random.default_rng(0).integers(0, 3, 1000).tolist()
    source = array_source(labels)
    part = source.subset(fraction)
    expected = []
    for c in range(3):
        members = [i for i, label in enumerate(labels) if label == c]
        expected += members[: int(fraction * len(members))]
    assert list(part.names) == [source.names[i] for i in expected]
    assert part.labels.tolist() == [labels[i] for i in expected]
    assert part.classes == source.classes
    assert all(np.asarray(part.open(j))[0, 0, 0] == i % 256 for j, i in enumerate(expected))
    assert f"subset {fraction:g}" in part.description
    assert part.fingerprint() != source.fingerprint()


def test_subset_of_a_hundred_is_not_rounded_down():
    assert len(array_source([0] * 100).subset(0.29)) == 29
    assert len(array_source([0] * 100).subset(0.57)) == 57


def test_whole_subset_is_the_source():
    source = array_source([2, 0, 1])
    assert source.subset(1) is source
    assert source.subset(1.0).fingerprint() == source.fingerprint()


def test_subset_without_labels(tmp_path):
    source = open_source(str(write(tmp_path / "x", *(f"{i}.png" for i in range(10)))))
    assert list(source.subset(0.35).names) == ["0.png", "1.png", "2.png"]


def test_subset_of_files_opens_the_right_files(tmp_path):
    source = open_source(str(write(tmp_path / "x", *(f"{c}/{i}.png" for c in "ab" for i in range(4)))))
    part = source.subset(0.5)
    assert list(part.names) == ["a/0.png", "a/1.png", "b/0.png", "b/1.png"]
    assert [np.asarray(part.open(i))[0, 0, 0] for i in range(4)] == [0, 1, 4, 5]
    assert len(source) == 8


@pytest.mark.parametrize("fraction", [0, -0.5, 1.01, float("nan"), float("inf"), 0.001])
def test_bad_subset(fraction):
    with pytest.raises(UserError) as caught:
        array_source([0, 1, 2]).subset(fraction)
    assert str(caught.value).startswith(f"--subset {fraction:g}")
    assert "\n" not in str(caught.value)


def test_sources_pickle(tmp_path):
    folder = write(tmp_path / "x", "a/0.png", "b/1.png")
    for source in (open_source(str(folder)), array_source([0, 1])):
        again = pickle.loads(pickle.dumps(source))
        assert isinstance(again, ImageSource)
        assert list(again.names) == list(source.names)
        assert np.array_equal(np.asarray(again.open(1)), np.asarray(source.open(1)))


@pytest.mark.parametrize("strings", [[], ["a"], ["", "", "x"], ["é" * 3, "a\nb", "\udcff", "z"]])
def test_names(strings):
    names = Names(iter(strings))
    assert list(names) == strings
    assert len(names) == len(strings)
    assert names[:2] == strings[:2]
    assert names[::-1] == strings[::-1]
    assert [names[-i - 1] for i in range(len(strings))] == strings[::-1]
    for past in (len(strings), -len(strings) - 1):
        with pytest.raises(IndexError):
            names[past]


def test_a_source_that_cannot_open():
    with pytest.raises(NotImplementedError):
        ImageSource(["a"], None, [], "t").open(0)
    assert ImageSource(["a"], None, [], "t").location(0) == "a"
