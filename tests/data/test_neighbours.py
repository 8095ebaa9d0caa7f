"""A neighbour file comes back as it was written, and one that does not belong is refused in one sentence."""

import json
import pickle
import zlib

import numpy as np
import pytest

import data.neighbours
import runtime.npy
from data.neighbours import KeptNeighbours, left_out_rows, load_neighbours, place_neighbours, row_reader, same_left_out
from runtime.errors import UserError

N, K = 50, 6
IDS = (np.arange(N)[:, None] + np.arange(1, K + 1)) % N
INFO = {
    "fingerprint": "f" * 64,
    "images": N,
    "source": "/data/x/train",
    "teacher_sha256": "a" * 64,
    "teacher_arch": "resnet50",
    "transform": "resize 235",
    "image_size": 224,
    "k": K,
    "metric": "cosine",
}


def checksums_of(ids, rows=20):
    """Of blocks of so many rows."""
    return [[first, min(first + rows, len(ids)), zlib.crc32(ids[first:first + rows].astype("<i8").tobytes())]
            for first in range(0, len(ids), rows)]


def save_neighbours(folder, name, ids, info):
    """As mining leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "rows.npy", ids.astype(np.int64))
    return place_neighbours(folder / "rows.npy", folder, name, info, checksums_of(ids))


@pytest.fixture
def saved(tmp_path):
    return save_neighbours(tmp_path, "closek_info", IDS, INFO)


def load(path, fingerprint="f" * 64, num_images=N, total_k=K, **options):
    return load_neighbours(path, fingerprint, num_images, total_k, **options)


def refusal(path, **options):
    with pytest.raises(UserError) as caught:
        load(path, **options)
    text = str(caught.value)
    assert text.startswith("--closek-info")
    assert str(path) in text
    assert "\n" not in text
    assert caught.value.__cause__ is None
    return text


@pytest.mark.parametrize("name", ["closek_info", "fark_info"])
def test_round_trip(tmp_path, name):
    path = save_neighbours(tmp_path, name, IDS, INFO)
    assert path == tmp_path / f"{name}.npy"
    assert sorted(file.name for file in path.parent.iterdir()) == [f"{name}.json", f"{name}.npy"]
    plain = np.load(path)  # as the original's code reads it
    assert plain.dtype == np.int64
    assert (plain == IDS).all()
    assert json.loads(path.with_suffix(".json").read_text()) == {**INFO, "checksums": checksums_of(IDS)}
    ids, warnings = load(path, teacher={"teacher_sha256": "a" * 64})
    assert warnings == []
    assert isinstance(ids, np.memmap)
    assert (ids == IDS).all()


def test_counts_in_the_twin_are_the_arrays_own(tmp_path):
    path = save_neighbours(tmp_path, "closek_info", IDS[:, :2], {**INFO, "images": 1, "k": 99})
    twin = json.loads(path.with_suffix(".json").read_text())
    assert (twin["images"], twin["k"]) == (N, 2)


def test_overwriting_leaves_the_new_pair(saved):
    save_neighbours(saved.parent, "closek_info", IDS[:, ::-1].copy(), {**INFO, "fingerprint": "e" * 64})
    ids, _ = load(saved, fingerprint="e" * 64)
    assert (ids == IDS[:, ::-1]).all()


def test_a_failed_write_leaves_no_twin_of_other_numbers(saved, monkeypatch):
    def fail(info, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(data.neighbours, "save_json", fail)
    with pytest.raises(OSError, match="No space left on device"):
        save_neighbours(saved.parent, "closek_info", IDS[:, ::-1], INFO)
    assert [file.name for file in saved.parent.iterdir()] == ["closek_info.npy"]
    ids, warnings = load(saved)  # the new numbers, whole, and no longer vouched for
    assert (ids == IDS[:, ::-1]).all()
    assert len(warnings) == 1


@pytest.mark.parametrize("dtype", ["<i4", "<i8", ">i8", "<u4", "<i2"])
def test_any_integer_type_is_read(tmp_path, dtype):
    np.save(tmp_path / "closek_info.npy", IDS.astype(dtype))
    ids, warnings = load(tmp_path / "closek_info.npy")
    assert (ids == IDS).all()
    assert len(warnings) == 1


@pytest.mark.parametrize("dtype", ["<i4", ">i8", "<u2"])
def test_rows_of_a_file_and_of_an_array(tmp_path, dtype):
    generator = np.random.default_rng(0)
    ids = generator.integers(60_000, size=(N, K)).astype(dtype)
    rows, columns = generator.integers(N, size=20), generator.integers(K, size=(20, 3))
    expected = [[int(ids[row, column]) for column in line] for row, line in zip(rows, columns, strict=True)]
    np.save(tmp_path / "rows.npy", ids)
    np.save(tmp_path / "columns.npy", np.asfortranarray(ids))
    np.save(tmp_path / "more.npy", np.concatenate([ids[:7], ids]))
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    tables = [ids, mapped, np.load(tmp_path / "columns.npy", mmap_mode="r"), np.load(tmp_path / "more.npy", "r")[7:]]
    for table in tables:
        found = row_reader(table)(rows, columns)
        assert found.dtype == np.int64
        assert found.tolist() == expected


def test_a_file_written_anew_does_not_change_what_is_read(saved):
    """Mining again into the folder of a training that is under way."""
    read = row_reader(load(saved)[0])
    save_neighbours(saved.parent, "closek_info", IDS[:, ::-1].copy(), INFO)
    assert (read(np.arange(N), np.tile(np.arange(K), (N, 1))) == IDS).all()


def test_the_originals_file_has_no_twin_and_warns(tmp_path):
    path = tmp_path / "closek_info.npy"
    np.save(path, IDS)
    _, warnings = load(path, fingerprint="anything", total_k=2)
    assert len(warnings) == 1
    assert str(path) in warnings[0]
    assert "closek_info.json" in warnings[0]
    assert "\n" not in warnings[0]


@pytest.mark.parametrize("total_k", range(K + 1))
def test_fewer_columns_may_be_asked_for(saved, total_k):
    assert load(saved, total_k=total_k)[0].shape == (N, K)


def test_too_few_columns(saved):
    text = refusal(saved, total_k=K + 1)
    assert "6 neighbours" in text
    assert "--total-k" in text
    assert "7" in text


@pytest.mark.parametrize("num_images", [N - 1, N + 1, 0])
def test_another_number_of_images(saved, num_images):
    text = refusal(saved, num_images=num_images)
    assert "50 images" in text
    assert str(num_images) in text


def test_another_data_set(saved):
    text = refusal(saved, fingerprint="b" * 64)
    assert "other images" in text
    assert "/data/x/train" in text


def test_another_teacher_warns(saved):
    _, warnings = load(saved, teacher={"teacher_sha256": "b" * 64})
    assert len(warnings) == 1
    assert "resnet50" in warnings[0]
    assert "another teacher" in warnings[0]
    assert load(saved, teacher=None)[1] == []


def test_another_feature_of_the_same_teacher_is_refused_and_another_size_is_said(tmp_path):
    path = save_neighbours(tmp_path, "closek_info", IDS, {**INFO, "feature": "mean", "image_size": 224})
    used = {"teacher_sha256": "a" * 64, "feature": "cls", "image_size": 112}
    text = refusal(path, teacher=used)
    assert "feature 'mean', but the current one is 'cls'; give --teacher-feature mean, or mine again" in text
    _, warnings = load(path, teacher={**used, "feature": "mean"})
    assert warnings == [f"{path} was made with images of 224 pixels, but the teacher now gets 112"]
    assert load(path, teacher={**used, "feature": "mean", "image_size": 224})[1] == []
    assert "another teacher" in load(path, teacher={**used, "teacher_sha256": "b" * 64})[1][0]


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", '{"images": 50}', "[" * 100_000, "\xff"])
def test_unreadable_twin(saved, text):
    saved.with_suffix(".json").write_bytes(text.encode("latin1"))
    assert "closek_info.json" in refusal(saved)


@pytest.mark.parametrize("value", [-1, N, 2**40])
@pytest.mark.parametrize("row", [0, 7, N - 1])
def test_index_outside_the_data(tmp_path, monkeypatch, value, row):
    monkeypatch.setattr(runtime.npy, "PIECE", 8 * K * 8)
    ids = IDS.copy()
    ids[row, 3] = value
    text = refusal(save_neighbours(tmp_path, "closek_info", ids, INFO))
    assert f"image {row} " in text
    assert str(value) in text


@pytest.mark.parametrize("piece", [1, 1 << 20])
def test_an_image_as_its_own_neighbour_and_one_twice(tmp_path, monkeypatch, piece):
    """In the original's file, which has no checksums, and among the columns that are used."""
    monkeypatch.setattr(runtime.npy, "PIECE", piece)
    path, ids = tmp_path / "closek_info.npy", IDS.copy()
    ids[[5, 9, 20], 3] = 5, 9, 20
    np.save(path, ids)
    assert "3 images are their own neighbour (image 5 first); mine again" in refusal(path, total_k=4)
    assert len(load(path, total_k=3)[1]) == 1
    ids[17, 4] = ids[17, 0]
    np.save(path, ids)
    assert "(image 5 first) and 1 images have a neighbour twice (image 17 first)" in refusal(path, total_k=None)
    ids[[5, 9, 20]] = IDS[[5, 9, 20]]
    np.save(path, ids)
    assert "valid neighbour file: 1 images have a neighbour twice" in refusal(path, total_k=5)
    assert len(load(path, total_k=4)[1]) == 1


@pytest.mark.parametrize("place", [0, N * K // 2, N * K - 1])
def test_a_changed_number_is_found_by_the_checksums(saved, place):
    ids = IDS.copy()
    ids.flat[place] = (ids.flat[place] + 7) % N  # in range, no double
    np.save(saved, ids)
    first = place // K // 20 * 20
    assert f"rows {first} to {min(first + 20, N) - 1} were changed after they were written; mine" in refusal(saved)
    saved.with_suffix(".json").unlink()
    load(saved)


@pytest.mark.parametrize("wrong", [None, [], {}, [[0, N]], [[0, N, "x"]], [[0, N, -1]], [[0, N, 1.5]], "checksums_of",
                                   checksums_of(IDS)[:2], checksums_of(IDS)[1:], checksums_of(IDS)[::-1]])
def test_a_twin_without_whole_checksums_is_refused(saved, wrong):
    twin = json.loads(saved.with_suffix(".json").read_text())
    saved.with_suffix(".json").write_text(json.dumps({**twin, "checksums": wrong}))
    assert "is damaged: its " in refusal(saved)


def test_missing_file_and_folder(tmp_path):
    assert "does not exist" in refusal(tmp_path / "closek_info.npy")
    assert "is a folder" in refusal(tmp_path)


def not_npy(path, content):
    path.write_bytes(content)
    return refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello world",
        pickle.dumps(IDS),
        b"\x93NUMPY",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<i8'",
        bytes(300),
    ],
)
def test_not_an_npy_file(tmp_path, content):
    assert "compute_knn.py" in not_npy(tmp_path / "closek_info.npy", content)


@pytest.mark.parametrize("kept", [10, 60, 128, 129, 500, 2500])
def test_truncated_file(saved, kept):
    not_npy(saved, saved.read_bytes()[:kept])


def test_other_arrays(tmp_path):
    path = tmp_path / "closek_info.npy"
    others = [IDS.astype(np.float32), IDS[0], IDS[None], IDS > 3, np.array("text"), IDS.astype(complex)]
    for other in others:
        np.save(path, other)
        assert "integers [images, k]" in refusal(path)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refusal(path)
    with path.open("wb") as file:
        np.savez(file, ids=IDS)
    refusal(path)
    np.save(path, IDS[:0])
    refusal(path)


# ---- images that could not be opened


GONE = np.array([3, 30])
HOLED = np.where(np.isin(np.arange(N), GONE)[:, None], -1, np.where(np.isin(IDS, GONE), (IDS + K) % N, IDS))


def save_holed(folder, ids=HOLED, left_out=2):
    return save_neighbours(folder, "closek_info", ids, {**INFO, "left_out": left_out})


def test_rows_of_minus_one_are_left_out(tmp_path):
    ids, warnings = load(save_holed(tmp_path))
    assert warnings == []
    assert left_out_rows(ids).tolist() == GONE.tolist()
    kept = np.delete(np.arange(N), GONE)
    table = KeptNeighbours(ids, kept)
    assert (len(table), table.shape) == (N - 2, (N - 2, K))
    rows, columns = np.arange(N - 2), np.tile(np.arange(K), (N - 2, 1))
    found = row_reader(table)(rows, columns)
    assert (kept[found] == HOLED[kept]).all()
    (tmp_path / "closek_info.json").unlink()
    assert left_out_rows(load(tmp_path / "closek_info.npy")[0]).tolist() == GONE.tolist()


def test_what_is_left_out_must_fit_together(tmp_path):
    assert "says 1;" in refusal(save_holed(tmp_path, left_out=1))
    assert "says 0;" in refusal(save_neighbours(tmp_path, "closek_info", HOLED, INFO))
    partly = HOLED.copy()
    partly[7, 2] = -1
    assert "gives image 7 the neighbour -1" in refusal(save_holed(tmp_path, partly))
    ghost = HOLED.copy()
    ghost[9, 1] = 30
    assert "gives image 9 the neighbour 30, which it leaves out" in refusal(save_holed(tmp_path, ghost))
    assert "leaves out all" in refusal(save_holed(tmp_path, np.full_like(IDS, -1), N))


def test_files_used_together_leave_out_the_same():
    assert same_left_out({"--closek-info": GONE, "--fark-info": GONE}).tolist() == GONE.tolist()
    with pytest.raises(UserError, match=r"--closek-info leaves out 2 .* --cluster-info leaves out 1"):
        same_left_out({"--closek-info": GONE, "--cluster-info": GONE[:1]})
