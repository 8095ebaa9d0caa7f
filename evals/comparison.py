"""Several evaluations in one long table, and two of these side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evals.results import read_results
from runtime.errors import UserError
from runtime.state import load_json

NOT_A_NAME = {"compared"}  # text columns that describe how a number was computed; differences() reports them
Evaluations = Mapping[str, Mapping[str, Any]]  # name -> record


def long_table(evaluations: Evaluations, name_one: bool = True) -> list[dict[str, Any]]:
    """A row for each number of each evaluation's own table: ``evaluation``, ``what`` (the texts that name the row),
    ``metric``, ``value``. A cell such as 71.2 ± 0.4 counts as a number with an interval. ``name_one``: a student is
    named where it is the only one, too."""
    rows = []
    for name, record in evaluations.items():
        table = record.get("table", ())
        unnamed = NOT_A_NAME | ({"student"} if len(table) == 1 and not name_one else set())
        for row in table:
            what = ", ".join(value for column, value in row.items()
                             if column not in unnamed and isinstance(value, str) and number(value) is None)
            rows += [{"evaluation": name, "what": what, "metric": metric, "value": value}
                     for metric, value in row.items() if number(value) is not None]
    return rows


def number(value: Any) -> float | None:
    """The number that a cell holds; None for a text."""
    if isinstance(value, str):
        found = re.match(r"(-?\d+(?:\.\d+)?) ± ", value)
        return float(found[1]) if found else None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def load_evaluations(path: Path, flag: str = "--compare") -> dict[str, dict[str, Any]]:
    """Records by name, from an all.json, from one record, or from a results.jsonl, of which the newest line of each
    command counts. Raises :class:`UserError` for anything else."""
    try:
        try:
            records = [load_json(path)]
        except ValueError:
            records = read_results(path)
    except OSError as error:
        raise UserError(f"{flag} {path} could not be read ({error.strerror}); give an all.json or a results.jsonl"
                        ) from None
    found: Any = None
    if records and all(isinstance(record, dict) and isinstance(record.get("command"), str) for record in records):
        found = records[-1].get("evaluations", {record["command"]: record for record in records})
    if not isinstance(found, dict) or not all(map(_is_record, found.values())):
        raise UserError(f"{flag} {path} holds no results of evaluate.py; give an all.json or a results.jsonl")
    return found


def _is_record(record: Any) -> bool:
    """Whether the fields of a record that are used here have the types that evaluate.py writes."""
    return (isinstance(record, dict)
            and isinstance(record.get("table", []), list) and all(isinstance(x, dict) for x in record.get("table", []))
            and all(isinstance(record.get(key, {}), dict) for key in ("sources", "settings", "compared"))
            and all(isinstance(x, dict) and {"fingerprint", "images", "title"} <= x.keys() and isinstance(
                x["images"], int) for x in record.get("sources", {}).values()))


def compared(first: Evaluations, second: Evaluations) -> list[dict[str, Any]]:
    """A row for each number in either: ``A``, ``B`` and ``B - A``, None if one lacks it."""
    tables = [{(row["evaluation"], row["what"], row["metric"]): number(row["value"])
               for row in long_table(each, name_one=False)} for each in (first, second)]
    rows = []
    for key in dict.fromkeys([*tables[0], *tables[1]]):
        a, b = (table.get(key) for table in tables)
        rows.append({"evaluation": key[0], "what": key[1], "metric": key[2], "A": a, "B": b,
                     "B - A": None if a is None or b is None else b - a})
    return rows


def differences(first: Evaluations, second: Evaluations) -> list[str]:
    """Warnings about evaluations that are not comparable: different images, settings or features of a
    network."""
    said = []
    for name in first.keys() & second.keys():
        a, b = first[name], second[name]
        for role in a.get("sources", {}).keys() & b.get("sources", {}).keys():
            images = [each["sources"][role] for each in (a, b)]
            if images[0]["fingerprint"] != images[1]["fingerprint"]:
                said.append(f"{name}: other {role} images ({images[0]['images']:,} of {images[0]['title']} and "
                            f"{images[1]['images']:,} of {images[1]['title']})")
        one, two = (each.get("settings", {}) for each in (a, b))
        other = [f"{key} {one.get(key)} and {two.get(key)}" for key in sorted(one.keys() | two.keys())
                 if one.get(key) != two.get(key)]
        if other:
            said.append(f"{name}: other settings ({'; '.join(other[:6])})")
        one, two = (each.get("compared", {}) for each in (a, b))
        if len(one) == len(two) == 1:  # whatever they are called
            two = dict(zip(one, two.values(), strict=True))
        said += [f"{name}: other features of {student} ({one[student]}; {two[student]})"
                 for student in one.keys() & two.keys() if one[student] != two[student]]
    return sorted(said)
