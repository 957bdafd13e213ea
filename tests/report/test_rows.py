import os
from pathlib import Path

import pytest

from resect.errors import FileError, InputError
from resect.report.rows import read_json, read_rows, write_json, write_rows


def test_rows_survive_a_round_trip_bit_for_bit(tmp_path: Path) -> None:
    rows = [
        {"name": "layer1.0/conv1", "x": 0.1 + 0.2, "n": 3, "on": True, "gap": None},
        {"name": 'a "quoted", name\nover two lines', "x": 5e-324, "n": -1, "on": False, "gap": 1e300},
    ]
    back = read_rows(write_rows(tmp_path / "deep" / "rows.csv", rows))
    assert back == rows
    assert [[type(value) for value in row.values()] for row in back] == [
        [type(value) for value in row.values()] for row in rows
    ]


def test_text_columns_stay_text(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.csv", [{"name": "7", "other": "007"}])
    assert read_rows(path, {"name": "text"}) == [{"name": "7", "other": "007"}]
    assert read_rows(path) == [{"name": 7, "other": "007"}]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "no rows"),
        ("a,b\n", "no rows"),
        ("a,b\n1\n", "row 1: 1 cells"),
        ("a,a\n1,2\n", "twice"),
        ('a,b\n1,"2\n', "cannot be read"),
        (b"a,b\n\xff\xfe,1\n", "cannot be read"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: str | bytes, words: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(FileError, match=words) as error:
        read_rows(path)
    assert str(path) in str(error.value)


def test_missing_files_and_empty_rows(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="does not exist"):
        read_rows(tmp_path / "none.csv")
    with pytest.raises(InputError, match="no rows"):
        write_rows(tmp_path / "none.csv", [])


def test_a_failing_write_keeps_the_old_file_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.csv", [{"a": 1}])

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(FileError, match="No space left"):
        write_rows(path, [{"a": 2}])
    assert read_rows(path) == [{"a": 1}]
    assert os.listdir(tmp_path) == ["rows.csv"]


def test_json_holds_numbers_of_all_kinds(tmp_path: Path) -> None:
    import numpy
    import torch

    value = {"a": torch.tensor(2.5), "b": numpy.float64(1e-9), "c": float("nan"), "d": (1, "ε"), 5: torch.ones(2)}
    path = write_json(tmp_path / "metrics.json", value)
    assert read_json(path) == {"a": 2.5, "b": 1e-9, "c": None, "d": [1, "ε"], "5": [1.0, 1.0]}
    with pytest.raises(InputError, match="JSON"):
        write_json(path, {"a": object()})
    path.write_text('{"a":')
    with pytest.raises(FileError, match="cannot be read as JSON"):
        read_json(path)
