"""Measurements come back exactly from every format, with where they come from."""

from __future__ import annotations

import json
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from resect.errors import FileError, InputError
from resect.report.figures import redraw_measurements
from resect.report.measurements import FORMATS, read_measurements, write_measurements
from resect.report.provenance import provenance

ROWS = [
    {"net": "7", "block": 'a, "b"\nc', "n": 3, "x": 0.1 + 0.2, "on": True, "gap": None},
    {"net": "nan", "block": "ε", "n": -(2**62), "x": math.nan, "on": False, "gap": -math.inf},
    {"net": "True", "block": "1e5", "n": 0, "x": -0.0, "on": None},
]


def same(rows, others):
    """Equal to the bit: types, the sign of zero, NaN."""
    assert [[(k, type(v), repr(v)) for k, v in sorted(row.items())] for row in rows] == [
        [(k, type(v), repr(v)) for k, v in sorted(row.items())] for row in others
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_rows_and_provenance_come_back(tmp_path, format):
    said = provenance([0, 1], "resect lesion x", model="net")
    path = write_measurements(tmp_path / "new", "lesion", ROWS, format, said)
    assert path == tmp_path / "new" / f"lesion.{format}"
    back = read_measurements(path)
    same(back.rows, [ROWS[0], ROWS[1], ROWS[2] | {"gap": None}])
    assert (back.name, back.provenance) == ("lesion", said)


number = some.floats(width=64) | some.none()
row = some.fixed_dictionaries(
    {
        "text": some.text(some.characters(codec="utf-8", exclude_characters="\r\0"), min_size=1) | some.none(),
        "int": some.integers(-(2**63), 2**63 - 1),
        "number": number,
        "flag": some.booleans() | some.none(),
    }
)


@settings(max_examples=15)
@given(rows=some.lists(row, min_size=1, max_size=4))
def test_any_rows_come_back(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("any")
    for format in FORMATS:
        same(read_measurements(write_measurements(folder, "rows", rows, format)).rows, rows)


@pytest.mark.parametrize("format", FORMATS)
def test_whole_numbers_among_floats_come_back_as_floats(tmp_path, format):
    same(read_measurements(write_measurements(tmp_path, "rows", [{"x": 1}, {"x": 2.5}], format)).rows,
         [{"x": 1.0}, {"x": 2.5}])  # fmt: skip


def test_tensors_are_numbers_and_json_is_strict(tmp_path):
    path = write_measurements(tmp_path, "rows", [{"x": torch.tensor(2.5), "y": math.inf}], "json")

    def refuse(word):
        raise ValueError(word)

    content = json.loads(path.read_text(), parse_constant=refuse)
    assert content["rows"] == [{"x": 2.5, "y": "inf"}]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "no rows"),
        ([{"a": object()}], "'a' holds object"),
        ([{"a": 1}, {"a": "x"}], "'a' holds int, str"),
        ([{"a": 0.5}, {"a": 2**60 + 1}], "'a' holds float, int"),
        ([{"a": True}, {"a": 2}], "'a' holds bool, int"),
        ([{"a": ""}], "empty text"),
    ],
)
def test_what_would_not_come_back_is_refused_and_nothing_written(tmp_path, format, rows, words):
    with pytest.raises(InputError, match=words):
        write_measurements(tmp_path / "new", "rows", rows, format)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_missing_foreign_and_damaged_files_are_named(tmp_path, format):
    path = tmp_path / f"rows.{format}"
    with pytest.raises(FileError, match="does not exist"):
        read_measurements(path)
    write_measurements(tmp_path, "rows", ROWS, format)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FileError, match=str(path)):
        read_measurements(path)


def test_other_formats(tmp_path):
    with pytest.raises(InputError, match="Did you mean 'parquet'"):
        write_measurements(tmp_path, "rows", ROWS, "parket")
    with pytest.raises(FileError, match=r"\.csv, \.json, \.parquet"):
        read_measurements(tmp_path / "rows.txt")
    (tmp_path / "own.json").write_text("[1]")
    with pytest.raises(FileError, match="was not written by"):
        read_measurements(tmp_path / "own.json")


@pytest.mark.parametrize("format", FORMATS)
def test_figures_are_drawn_again_from_measurements(tmp_path, format):
    rows = [{"k": k, "draw": i, "error": 0.1 * k + 0.01 * i} for k in (0, 1, 2) for i in range(3)]
    path = write_measurements(tmp_path, "lesion_random", rows, format)
    write_measurements(tmp_path, "own_table", rows, format)
    assert redraw_measurements(tmp_path) == redraw_measurements(path) == [tmp_path / "lesion_random.png"]
    assert (tmp_path / "lesion_random.svg").read_text().startswith("<svg")
    with pytest.raises(FileError, match="Unknown figure 'own_table'"):
        redraw_measurements(tmp_path / f"own_table.{format}")
    write_measurements(tmp_path, "lesion_random", [{"k": 1}], format)
    with pytest.raises(FileError, match="missing columns 'draw', 'error'"):
        redraw_measurements(path)


@pytest.mark.parametrize(
    "change",
    [
        {"name": None},
        {"columns": []},
        {"columns": {"study": "texts"}},
        {"provenance": None},
        {"rows": 5},
        {"rows": []},
        {"rows": [{}]},
        {"rows": [["each"]]},
        {"columns": {"value": "number"}, "rows": [{"value": "abc"}]},
    ],
)
def test_a_file_that_was_changed_by_hand_is_called_damaged(change, tmp_path):
    whole = {"format": "resect measurements 1", "name": "lesion", "columns": {"study": "text"},
             "rows": [{"study": "each"}], "provenance": {}}  # fmt: skip
    path = tmp_path / "lesion.json"
    path.write_text(json.dumps(whole))
    assert read_measurements(path).rows == [{"study": "each"}]
    path.write_text(json.dumps(whole | change))
    with pytest.raises(FileError, match=r"lesion\.json is damaged"):
        read_measurements(path)
