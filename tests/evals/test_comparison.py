import json

import pytest

from evals.comparison import compared, differences, load_evaluations, long_table
from runtime.errors import UserError


def record(command, table, fingerprint="f", **settings):
    return {"command": command, "table": table, "settings": settings,
            "sources": {"test": {"fingerprint": fingerprint, "images": 5, "title": "t"}}}


A = {"linear": record("linear", [{"of": "best", "top1": 60.0, "epoch": 3}, {"of": "last", "top1": 59.5, "epoch": 9}]),
     "transfer": record("transfer", [{"data": "pets", "metric": "top-1", "score": 70.0, "5-way": "81.20 ± 0.40"}])}
B = {"linear": record("linear", [{"of": "last", "top1": 61.0, "epoch": 9}], "g", epochs=5),
     "knn": record("knn", [{"vote": "k=10", "top1": 40}])}


def test_each_number_has_a_row():
    assert [tuple(row.values()) for row in long_table(A)] == [
        ("linear", "best", "top1", 60.0), ("linear", "best", "epoch", 3), ("linear", "last", "top1", 59.5),
        ("linear", "last", "epoch", 9), ("transfer", "pets, top-1", "score", 70.0),
        ("transfer", "pets, top-1", "5-way", "81.20 ± 0.40")]


def test_side_by_side():
    rows = {tuple(row.values())[:3]: tuple(row.values())[3:] for row in compared(A, B)}
    assert rows["linear", "last", "top1"] == (59.5, 61.0, 1.5)
    assert rows["linear", "best", "top1"] == (60.0, None, None)
    assert rows["knn", "k=10", "top1"] == (None, 40, None)
    assert rows["transfer", "pets, top-1", "5-way"] == (81.2, None, None)
    assert len(rows) == 7


def test_what_is_not_alike_is_said():
    assert differences(A, B) == ["linear: other settings (epochs None and 5)",
                                 "linear: other test images (5 of t and 5 of t)"]
    assert differences(A, A) == []


def test_students_with_other_heads_are_still_paired():
    hows = (("s", 0.5, "both heads"), ("t", 0.75, "student's head, teacher's trunk"))
    a, b = ({"overlap": {**record("overlap", [{"student": name, "CKA": cka, "compared": how}]),
                         "compared": {name: how}}} for name, cka, how in hows)
    assert [tuple(row.values()) for row in compared(a, b)] == [("overlap", "", "CKA", 0.5, 0.75, 0.25)]
    assert long_table(a)[0]["what"] == "s"
    assert differences(a, b) == ["overlap: other features of s (both heads; student's head, teacher's trunk)"]


def test_the_files_that_are_read(tmp_path, capsys):
    path = tmp_path / "x"
    path.write_text(json.dumps({"command": "all", "evaluations": A}))
    assert load_evaluations(path) == A
    path.write_text(json.dumps(A["linear"]))
    assert load_evaluations(path) == {"linear": A["linear"]}
    path.write_text("".join(json.dumps(x) + "\n" for x in (B["linear"], B["knn"], A["linear"])))
    assert load_evaluations(path) == {"linear": A["linear"], "knn": B["knn"]}
    path.write_bytes(path.read_bytes() + b'{"command": "kn\xff')  # a kill; the whole lines count
    assert load_evaluations(path) == {"linear": A["linear"], "knn": B["knn"]}
    assert "1 of 4 lines are not valid records" in capsys.readouterr().err
    for text in ("", "{}", "[1]", "no json", '{"a": 1}\n{"command": "x"}', "[" * 100_000, '{"command": 3}',
                 '{"command": "all", "evaluations": [1]}', '{"command": "x", "table": [3]}',
                 '{"command": "x", "sources": {"test": 3}}', '{"command": "x", "settings": [1]}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"^--compare .*holds no results"):
            load_evaluations(path)
    with pytest.raises(UserError, match="could not be read"):
        load_evaluations(tmp_path / "none")
