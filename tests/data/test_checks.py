"""What check says of sound and unsound files, and the picture it draws."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import checks
from data.checks import check_clusters, check_neighbours, cluster_rows, contact_sheet, neighbour_rows
from data.clusters import save_clusters
from data.neighbours import place_neighbours
from data.sources import ArraySource, FileSource
from runtime.errors import UserError

N, K, CLASSES = 30, 6, 3
LABELS = np.arange(N) % CLASSES
COLOURS = np.random.default_rng(0).integers(256, size=(N, 3)).astype(np.uint8)
SOURCE = ArraySource(np.broadcast_to(COLOURS[:, None, None], (N, 8, 16, 3)), LABELS, ["ant", "bee", "fly"], "insects")
UNLABELLED = ArraySource(SOURCE.images, None, [], "insects")
IDS = (np.arange(N)[:, None] + np.arange(1, K + 1)) % N
FAR = (np.arange(N)[:, None] + 15 + np.arange(K)) % N
INFO = {"fingerprint": SOURCE.fingerprint(), "source": "insects", "teacher_sha256": "a" * 64,
        "teacher_arch": "resnet50", "transform": "resize 235", "image_size": 224, "metric": "cosine"}


def save_neighbours(folder, name, ids, info):
    """As mining leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "rows.npy", ids.astype(np.int64))
    return place_neighbours(folder / "rows.npy", folder, name, info, [(0, len(ids), zlib.crc32(ids.tobytes()))])


@pytest.fixture
def path(tmp_path):
    return save_neighbours(tmp_path, "closek_info", IDS, INFO)


def refusal(path, source=SOURCE, check=check_neighbours):
    with pytest.raises(UserError) as caught:
        check(path, source)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text


def test_a_sound_file(path):
    said = check_neighbours(path, SOURCE)
    assert said[0] == f"{path} belongs to insects: 30 images of the same names in the same order."
    assert said[1] == ("It was made in the space of resnet50 (SHA-256 aaaaaaaaaaaaaaaa), metric cosine, "
                       "transform resize 235.")
    assert said[2].startswith("Each image has 6 neighbours")
    same = np.mean([LABELS[j] == LABELS[i] for i in range(N) for j in IDS[i]])
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j]
    chance = np.mean([LABELS[i] == LABELS[j] for i, j in pairs])
    assert said[3] == (f"{100 * same:.1f} % of the nearest 6 neighbours have the class of their image "
                       f"({100 * chance:.1f} % by chance).")
    assert len(said) == 4
    assert check_neighbours(path, UNLABELLED) == said[:3]


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, ">i8"])
def test_the_originals_file(tmp_path, dtype):
    np.save(tmp_path / "closek_info.npy", IDS.astype(dtype))
    said = check_neighbours(tmp_path / "closek_info.npy", UNLABELLED)
    assert said[0].endswith("has as many images as insects, 30.")
    assert "closek_info.json" in said[1]
    assert len(said) == 3


def test_own_neighbours_and_doubles_are_counted(tmp_path):
    ids = IDS.copy()
    ids[[5, 9, 20], 2] = 5, 9, 20
    text = refusal(save_neighbours(tmp_path, "closek_info", ids, INFO))
    assert "3 images are their own neighbour (image 5 first)" in text
    assert "twice" not in text
    ids[17, 5] = ids[17, 0]
    text = refusal(save_neighbours(tmp_path, "closek_info", ids, INFO))
    assert "3 images are their own neighbour (image 5 first) and 1 images have a neighbour twice (image 17" in text


def test_files_of_other_data(path, tmp_path):
    other = ArraySource(SOURCE.images, LABELS, SOURCE.classes, "others")
    assert "was made from other images (insects)" in refusal(path, other)
    assert "holds neighbours of 30 images and --data has 10" in refusal(path, SOURCE.take(np.arange(10)))
    ids = IDS.copy()
    ids[3, 3] = N
    assert f"image 3 the neighbour {N}" in refusal(save_neighbours(tmp_path / "x", "closek_info", ids, INFO))
    refusal(tmp_path / "nowhere.npy")
    path.write_bytes(b"text")
    refusal(path)


def test_clusters(tmp_path):
    clusters = np.repeat([0, 1, 3], [18, 9, 3])
    path = save_clusters(tmp_path, clusters, 4, INFO)
    said = check_clusters(path, SOURCE)
    assert said[0].startswith(f"{path} belongs to insects")
    assert said[2] == "Each image is in one of 3 clusters of 3 to 18 images (median 9)."
    assert said[3] == ("33.3 % of the images have the most common class of their cluster (33.3 % with a single "
                       "cluster).")
    pure = save_clusters(tmp_path, LABELS, 3, INFO)
    assert check_clusters(pure, SOURCE)[3].startswith("100.0 % ")
    assert len(check_clusters(pure, UNLABELLED)) == 3
    torch.save({"batches": {0: [0, 0]}}, tmp_path / "bad.pth")
    refusal(tmp_path / "bad.pth", check=check_clusters)


# ---- the picture


def test_rows_of_a_neighbour_file(path):
    rows, notes = neighbour_rows(path, SOURCE, 4, 3, seed=0)
    assert notes == []
    assert len(rows) == 4
    for (name, anchor), (other, nearest) in rows:
        assert (name, other) == ("anchor", "nearest")
        assert nearest == IDS[anchor[0], :3].tolist()
    assert rows == neighbour_rows(path, SOURCE, 4, 3, seed=0)[0]
    assert rows != neighbour_rows(path, SOURCE, 4, 3, seed=1)[0]
    assert len(neighbour_rows(path, SOURCE, 99, 99, seed=0)[0]) == N


def test_the_farthest_beside_it_are_shown(path):
    far = save_neighbours(path.parent, "fark_info", FAR, INFO)
    for given in (path, far):
        rows, notes = neighbour_rows(given, SOURCE, 4, 3, seed=0)
        assert notes == []
        for (_, anchor), (near_name, nearest), (far_name, farthest) in rows:
            assert (near_name, far_name) == ("nearest", "farthest")
            assert nearest == IDS[anchor[0], :3].tolist()
            assert farthest == FAR[anchor[0], :3].tolist()
    np.save(far, FAR[:5])
    rows, notes = neighbour_rows(path, SOURCE, 4, 3, seed=0)
    assert all(len(row) == 2 for row in rows)
    assert len(notes) == 1
    assert "Not in the picture" in notes[0]
    assert str(far) in notes[0]


def test_rows_of_a_cluster_file(tmp_path):
    clusters = np.repeat([0, 1, 3], [18, 9, 3])
    path = save_clusters(tmp_path, clusters, 4, INFO)
    rows = cluster_rows(path, SOURCE, 10, 4, seed=0)
    assert len(rows) == 3
    for number, ((_, first), (_, others)) in zip((0, 1, 3), rows, strict=True):
        images = first + others
        assert len(set(images)) == len(images) == min(5, (clusters == number).sum())
        assert set(clusters[images]) == {number}


def test_the_picture_shows_the_right_images_in_order(tmp_path):
    """Each image is one colour: read back from the middle of each tile, left to right, row after row."""
    rows = [[("anchor", [3]), ("nearest", [4, 5, 6])], [("anchor", [29]), ("nearest", [0, 1])]]
    path = contact_sheet(SOURCE, rows, tmp_path / "sheet.png")
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    centres = {}
    for i in range(N):
        hits = np.argwhere((np.abs(pixels - COLOURS[i].astype(int)) <= 1).all(axis=2))
        if len(hits) > 1000:
            centres[i] = hits.mean(axis=0)
            # the 8 x 16 picture is enlarged to 48 x 96 and keeps its shape
            assert np.ptp(hits[:, 1]) + 1 == checks.TILE
            assert np.ptp(hits[:, 0]) + 1 == checks.TILE // 2
    assert set(centres) == {3, 4, 5, 6, 29, 0, 1}
    for line in ([3, 4, 5, 6], [29, 0, 1]):
        assert len({round(centres[i][0]) for i in line}) == 1
        assert [centres[i][1] for i in line] == sorted(centres[i][1] for i in line)
    assert centres[3][0] < centres[29][0]
    assert centres[3][1] == pytest.approx(centres[29][1])
    assert (pixels[:26] < 100).any()  # headings
    with Image.open(contact_sheet(SOURCE, rows, tmp_path / "cosines.png", [{4: 0.5}, {}])) as image:
        assert image.height == len(pixels) + 2 * checks.LINE
    assert checks._caption(FileSource(Path("x"), [f"a/{'b' * 30}.png"], LABELS[:1], ["moth"], "x"), 0, {0: -0.25}) == (
        f"..{'b' * 14}.png\n0 moth\ncosine -0.250")


def test_a_broken_image_leaves_a_grey_tile(tmp_path):
    class Broken(ArraySource):
        def open(self, i):
            raise checks.BadImage("truncated")

    source = Broken(SOURCE.images, LABELS, ["é", "日本", "\udcff"], "insects")
    assert contact_sheet(source, [[("anchor", [0]), ("nearest", [1, 2])]], tmp_path / "s.png").is_file()


def test_images_of_a_name():
    source = FileSource(Path("root"), ["a/1.png", "b/1.png", "b/11.png", "1.png"], None, [], "x")
    assert list(checks.images_called(source, "1.png")) == ["root/a/1.png", "root/b/1.png", "root/1.png"]


def test_results_do_not_go_among_the_images(tmp_path):
    data = tmp_path / "data"
    for name in ("train/a/1.JPG", "runs/one/config.json", "empty"):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch() if "." in name else (data / name).mkdir()
    (tmp_path / "link").symlink_to(data)
    for folder in (data, data / "train", data / "train" / "a", tmp_path / "link"):
        with pytest.raises(UserError, match=f"--output {folder} is one of the image folders of --data {data}"):
            checks.check_apart(folder, str(data))
    for folder in (data / "runs", data / "runs" / "one", data / "empty", data / "new", tmp_path, tmp_path / "new"):
        checks.check_apart(folder, str(data))
    checks.check_apart(data, None)
    checks.check_apart(data, "cifar10")


def test_a_failed_picture_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, file, format):  # noqa: A002
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checks.Image.Image, "save", fail)
    with pytest.raises(UserError, match="No space left"):
        contact_sheet(SOURCE, [[("anchor", [0]), ("nearest", [1])]], tmp_path / "s.png")
    assert not list(tmp_path.iterdir())
