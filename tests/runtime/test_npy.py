"""Arrays are mapped whole or refused, whatever a header says; zlib over the bytes is the checksums' oracle."""

import zlib

import numpy as np
import pytest

import runtime.npy
from runtime.errors import Damaged
from runtime.npy import check_rows, checksum, map_array, pieces

ROWS = np.random.default_rng(0).integers(1000, size=(30, 4))


def test_a_damaged_header_is_one_kind_of_error(tmp_path):
    """Each byte of the header set to a few others: another array may come out, but of all bytes of the file."""
    path = tmp_path / "a.npy"
    np.save(path, ROWS)
    good, refused = path.read_bytes(), 0
    for place in range(128):
        for value in b"\x00\xff(,'9[{\\\n-":
            path.write_bytes(good[:place] + bytes([value]) + good[place + 1:])
            try:
                assert map_array(path).tobytes() == ROWS.tobytes()
            except Damaged as error:
                assert "\n" not in str(error)
                refused += 1
    assert refused > 500


@pytest.mark.parametrize("shape", ["(10**400,)", f"({10 ** 30}, 4)", "(-30, 4)", "(30, 4.0)", "(30, 1)", "(31, 4)",
                                   "(0, 4)", "()", "(30, -4)", "(" * 90 + ")" * 90,
                                   f"({2 ** 62}, {2 ** 62}, 4)"])
def test_shapes_that_the_file_does_not_have(tmp_path, shape):
    header = f"{{'descr': '<i8', 'fortran_order': False, 'shape': {shape}, }}".ljust(1013) + "\n"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
                                     + ROWS.tobytes())
    with pytest.raises(Damaged):
        map_array(tmp_path / "a.npy")


@pytest.mark.parametrize("make", [lambda file: np.savez(file, a=ROWS), lambda file: file.write(b""),
                                  lambda file: np.save(file, np.array([{}], dtype=object), allow_pickle=True)])
def test_other_files(tmp_path, make):
    with (tmp_path / "a.npy").open("wb") as file:
        make(file)
    with pytest.raises(Damaged):
        map_array(tmp_path / "a.npy")


@pytest.mark.parametrize("piece", [1, 100, 1 << 20])
def test_pieces_are_the_rows_in_order_and_each_changed_one_is_found(monkeypatch, piece):
    monkeypatch.setattr(runtime.npy, "PIECE", piece)
    blocks = [(first, last, zlib.crc32(ROWS[first:last].tobytes())) for first, last in ((0, 7), (7, 8), (8, 30))]
    for table, checksums in ((ROWS, blocks), (ROWS, None), (np.asfortranarray(ROWS), blocks), (ROWS[::-1], None)):
        starts, parts = zip(*pieces(table, checksums), strict=True)
        assert np.array_equal(np.concatenate(parts), table)
        assert list(starts) == [sum(map(len, parts[:i])) for i in range(len(parts))]
    for row in range(30):
        changed = ROWS.copy()
        changed[row, row % 4] ^= 1 << row
        with pytest.raises(Damaged, match="were changed"):
            list(pieces(changed, blocks))
        found = [part for part in range(2) if not _holds(changed, blocks, part)]
        assert found == [1 if row == 7 else 0]  # of two processes, the one whose block it is


def _holds(rows, blocks, part):
    try:
        check_rows(rows, blocks, part, 2)
    except Damaged:
        return False
    return True


@pytest.mark.parametrize("wrong", [[], [(0, 29)], [(1, 30)], [(0, 30), (0, 30)], [(0, 20), (19, 30)],
                                   [(0, 10), (20, 30)]])
def test_checksums_must_be_of_all_rows(wrong):
    blocks = [(first, last, zlib.crc32(ROWS[first:last].tobytes())) for first, last in wrong]
    for use in (check_rows, lambda *of: list(pieces(*of))):
        with pytest.raises(Damaged, match="not those of 30 rows"):
            use(ROWS, blocks)


def test_no_rows():
    assert list(pieces(ROWS[:0])) == []
    assert checksum(ROWS[:0]) == 0
