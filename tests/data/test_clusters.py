"""A cluster file comes back as it was written, the original's too, and one that does not belong is refused."""

import json
import pickle

import numpy as np
import pytest
import torch

import data.clusters
from data.clusters import load_clusters, save_clusters
from runtime.errors import UserError

N, K = 50, 7
LABELS = np.random.default_rng(0).integers(K - 1, size=N)  # the last cluster is empty
INFO = {"fingerprint": "f" * 64, "source": "/data/x/train", "teacher_sha256": "a" * 64, "teacher_arch": "resnet50",
        "transform": "resize 235", "image_size": 224, "metric": "euclidean"}


@pytest.fixture
def saved(tmp_path):
    return save_clusters(tmp_path, LABELS, K, INFO)


def load(path, fingerprint="f" * 64, num_images=N, **options):
    return load_clusters(path, fingerprint, num_images, **options)


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        load(path, **options)
    text = str(caught.value)
    assert text.startswith(f"--cluster-info {path}")
    assert "\n" not in text
    return text


def test_round_trip(tmp_path):
    path = save_clusters(tmp_path / "new", LABELS, K, INFO)
    assert path == tmp_path / "new" / "clusters_7.pth"
    assert sorted(file.name for file in path.parent.iterdir()) == ["clusters_7.json", "clusters_7.pth"]
    content = torch.load(path, weights_only=True)
    assert content == {"batches": {c: [i for i in range(N) if LABELS[i] == c] for c in range(K)}}
    assert all(type(i) is int for images in content["batches"].values() for i in images)
    twin = json.loads(path.with_suffix(".json").read_text())
    sizes = [int((c == LABELS).sum()) for c in range(K)]
    assert twin == {**INFO, "images": N, "left_out": 0, "num_clusters": K, "empty": 1, "smallest": 0,
                    "median": sorted(sizes)[3], "largest": max(sizes)}
    labels, warnings = load(path, teacher={"teacher_sha256": "a" * 64})
    assert warnings == []
    assert labels.dtype == np.int32
    assert (labels == LABELS).all()


def test_labels_outside_the_clusters_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="label 5 is not one of 3"):
        save_clusters(tmp_path, np.array([0, 5, 1]), 3, INFO)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_no_half_file(saved, monkeypatch):
    def fail(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.clusters.torch, "save", fail)
    with pytest.raises(UserError, match="No space left on device"):
        save_clusters(saved.parent, LABELS, K, INFO)
    assert [file.name for file in saved.parent.iterdir()] == ["clusters_7.pth"]
    monkeypatch.undo()
    assert len(load(saved)[1]) == 1  # the old clusters, whole, and no longer vouched for


@pytest.mark.parametrize("make", [list, tuple, torch.tensor])
def test_the_originals_file_and_its_kin(tmp_path, make):
    """No twin; keys in any order, and tensors where the lists are."""
    path = tmp_path / "clusters_3_subset_None_euclidean.pth"
    torch.save({"batches": {2: make([5, 1]), 0: make([0, 3]), 1: make([4, 2])}}, path)
    labels, warnings = load(path, fingerprint="anything", num_images=6)
    assert labels.tolist() == [0, 2, 1, 0, 1, 2]
    *converted, warning = warnings
    assert "it is unknown whether it belongs" in warning
    assert ["which was read as a list" in sentence for sentence in converted] == [True] * (make is not list)


def test_numbers_in_text_are_read_as_numbers_and_said(tmp_path):
    """In the order of the numbers, which is not that of the texts."""
    path = tmp_path / "c.pth"
    torch.save({"batches": {str(c): torch.tensor([c], dtype=torch.uint8) for c in range(12)}}, path)
    labels, warnings = load(path, num_images=12)
    assert labels.tolist() == list(range(12))
    assert "has text ('0') for the numbers of clusters" in warnings[0]
    assert "holds a Tensor instead of a list" in warnings[1]


@pytest.mark.parametrize("keys", [(0, "1"), ("0", "00"), ("a", "b"), (0.0, 1.0), (True, False), ("-1", "0"), (None, 1)])
def test_clusters_without_numbers_are_refused(tmp_path, keys):
    torch.save({"batches": dict.fromkeys(keys, [0])}, tmp_path / "c.pth")
    assert "has a cluster called" in refusal(tmp_path / "c.pth", num_images=1)


@pytest.mark.parametrize("member", [torch.ones(2), torch.tensor([True]), torch.zeros(1, 1).int(), torch.zeros(2).half(),
                                    torch.zeros(2).bfloat16(), torch.zeros(2, dtype=torch.complex64)])
def test_tensors_of_other_numbers_are_refused(tmp_path, member):
    torch.save({"batches": {0: member, 1: [1]}}, tmp_path / "c.pth")
    assert f"cluster 0 holds a {member.dtype} that does not consist of image indices" in refusal(tmp_path / "c.pth")


def test_a_changed_byte_is_found_by_the_zips_checksum(saved):
    content = saved.read_bytes()
    place = content.index(b"batches") + 40
    saved.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
    assert "does not have the CRC-32" in refusal(saved)


def test_another_data_set_or_teacher(saved):
    assert "/data/x/train" in refusal(saved, fingerprint="b" * 64)
    _, warnings = load(saved, teacher={"teacher_sha256": "b" * 64})
    assert len(warnings) == 1
    assert "another teacher" in warnings[0]


@pytest.mark.parametrize("num_images", [0, N - 1, N + 1])
def test_another_number_of_images(saved, num_images):
    assert f"50 images and --data has {num_images}" in refusal(saved, num_images=num_images)


@pytest.mark.parametrize(("batches", "words"), [
    ({0: [0, 1], 1: [2, 4]}, "image 4, outside the 4 images"),
    ({0: [0, 1], 1: [2, -1]}, "image -1, outside"),
    ({0: [0, 1], 1: [1, 2]}, "image 1 2 times"),
])
def test_not_each_image_once(tmp_path, batches, words):
    torch.save({"batches": batches}, tmp_path / "c.pth")
    assert words in refusal(tmp_path / "c.pth", num_images=4)


@pytest.mark.parametrize("content", [
    {}, [], 3, torch.zeros(3), {"batches": []}, {"batches": {}}, {"batches": {0: []}}, {"batches": {0: [0.5]}},
    {"batches": {0: "text"}}, {"batches": {0: [[1, 2]]}}, {"batches": {0: [0, [1]]}}, {"batches": {0: 1}},
    {"batches": {0: [2**70]}}, {"batches": {0: [0], "a": [1]}}, {"batches": {0: [True]}}, {"batches": {0: None}},
    {"batches": {0: ["x"]}}, {"state_dict": {"w": torch.zeros(2)}},
])
def test_other_contents(tmp_path, content):
    torch.save(content, tmp_path / "c.pth")
    assert "{'batches': {cluster: [indices]}}" in refusal(tmp_path / "c.pth")


class Harm:
    def __reduce__(self):
        return print, ("code of a cluster file was run",)


def test_no_code_is_run(tmp_path, capsys):
    torch.save({"batches": {0: [0]}, "more": Harm()}, tmp_path / "c.pth")
    refusal(tmp_path / "c.pth")
    (tmp_path / "p.pth").write_bytes(pickle.dumps(Harm(), protocol=2))
    refusal(tmp_path / "p.pth")
    assert capsys.readouterr().out == ""


def test_files_that_are_none(saved, tmp_path):
    assert "does not exist" in refusal(tmp_path / "nowhere.pth")
    assert "is a folder" in refusal(tmp_path)
    content = saved.read_bytes()
    for kept in (0, 10, len(content) // 2, len(content) - 1):
        saved.write_bytes(content[:kept])
        refusal(saved)


def test_images_in_no_cluster(tmp_path):
    labels = LABELS.copy()
    labels[[4, 9]] = -1
    path = save_clusters(tmp_path, labels, K, INFO)
    assert json.loads(path.with_suffix(".json").read_text())["left_out"] == 2
    assert load(path)[0].tolist() == labels.tolist()
    path.with_suffix(".json").unlink()
    assert f"holds {N - 2} images and --data has {N}" in refusal(path)
