"""Measurements on disk: rows and where they come from, as CSV, JSON or Parquet; any figure is drawn again from them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from resect.errors import FileError, InputError, check_all, quoted, unknown
from resect.report.rows import Row, plain, read_json, read_rows, write_file, write_rows

Format = Literal["csv", "json", "parquet"]
FORMATS: tuple[str, ...] = get_args(Format)
_MARK = "resect measurements 1"
_KINDS = ("text", "flag", "int", "number")
_KEY = b"resect"  # of Parquet's own metadata


@dataclass(frozen=True)
class Measurements:
    """Rows of one kind, the name they were written under, and their provenance."""

    name: str
    rows: list[Row]
    provenance: dict[str, Any]


def write_measurements(
    folder: str | os.PathLike[str],
    name: str,
    rows: Iterable[Mapping[str, Any]],
    format: str = "csv",
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write ``rows`` with their ``provenance`` to ``folder/name.<format>``, whole or not at all; return that path.

    JSON and Parquet hold the provenance; for CSV it goes into ``name.provenance.json`` beside it. Every number, text,
    truth value and None comes back from ``read_measurements`` as it was, NaN and infinities too; a key that a row
    lacks comes back as None, a whole number among floats as a float.

    Raises
    ------
    InputError: another format, no rows, an empty text, a value that is none of these, a column that mixes kinds.
    FileError: the place cannot be written.
    """
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    target = Path(folder) / f"{name}.{format}"
    table = _whole(rows, target)
    kinds = _kinds(table, target)
    numbers = [key for key, kind in kinds.items() if kind == "number"]
    table = [row | {key: None if row[key] is None else float(row[key]) for key in numbers} for row in table]
    head = {"format": _MARK, "name": name, "columns": kinds, "provenance": plain(provenance or {})}
    if format == "parquet":
        return write_file(target, _parquet(table, head))
    if format == "json":
        shown = [{key: _text_of(value) for key, value in row.items()} for row in table]
        return write_file(target, _json(head | {"rows": shown}))
    write_file(_beside(target), _json(head))
    return write_rows(target, table)


def read_measurements(path: str | os.PathLike[str]) -> Measurements:
    """Read what ``write_measurements`` wrote; FileError if it is missing, damaged, or was not written by it."""
    path = Path(path)
    if path.suffix.removeprefix(".") not in FORMATS:
        raise FileError(f"{path} is not a file of measurements: those end in .{', .'.join(FORMATS)}.")
    if path.suffix == ".parquet":
        rows, head = _read_parquet(path)
    elif path.suffix == ".json":
        head = _checked(read_json(path), path)
        rows = _json_rows(head, path)
    else:
        head = _checked(read_json(_beside(path)), _beside(path))
        rows = [
            {key: None if value == "" else value for key, value in row.items()}
            for row in read_rows(path, head["columns"])
        ]
    return Measurements(head["name"], rows, head["provenance"])


def _beside(path: Path) -> Path:
    return path.with_suffix(".provenance.json")


def _json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _whole(rows: Iterable[Mapping[str, Any]], target: Path) -> list[Row]:
    """The rows with plain values, each with every column."""
    rows = list(rows)
    columns = list(dict.fromkeys(str(key) for row in rows for key in row))
    if not columns:
        raise InputError(f"There are no rows to write to {target}.")
    return [
        {key: row[key].item() if hasattr(row.get(key), "item") else row.get(key) for key in columns} for row in rows
    ]


def _kinds(table: list[Row], target: Path) -> dict[str, str]:
    """What each column holds: text, flag, int or number; raises InputError where that is not one of them."""
    kinds, problems = {}, []
    for key in table[0]:
        types = {type(row[key]) for row in table if row[key] is not None}
        if types <= {int, float} and not (float in types and any(_too_large(row[key]) for row in table)):
            kinds[key] = "number" if float in types else "int"
        elif len(types) == 1 and types <= {str, bool}:
            kinds[key] = "text" if types == {str} else "flag"
        else:
            problems.append(f"column {key!r} holds {', '.join(sorted(kind.__name__ for kind in types))}")
        if any(row[key] == "" for row in table):
            problems.append(f"column {key!r} holds an empty text, which a file cannot tell from None")
    check_all(problems, f"{target} cannot hold these rows")
    return kinds


def _too_large(value: Any) -> bool:
    """Whether a whole number would not survive in a column of floats."""
    return isinstance(value, int) and int(float(value)) != value


def _text_of(value: Any) -> Any:
    """What stands for a value in JSON, which knows no NaN and no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _value_of(value: Any, kind: str | None) -> Any:
    return float(value) if kind == "number" and isinstance(value, str) else value


def _json_rows(head: Mapping[str, Any], path: Path) -> list[Row]:
    kinds, rows = head["columns"], head.get("rows")
    whole = isinstance(rows, list) and all(isinstance(row, dict) and set(row) == set(kinds) for row in rows)
    if not whole or not rows:
        raise FileError(f"{path} is damaged: its rows are not those of its columns.")
    try:
        return [{key: _value_of(value, kinds[key]) for key, value in row.items()} for row in rows]
    except ValueError as error:
        raise FileError(f"{path} is damaged: {error}.") from error


def _parquet(table: list[Row], head: Mapping[str, Any]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    types = {"text": pyarrow.string(), "flag": pyarrow.bool_(), "int": pyarrow.int64(), "number": pyarrow.float64()}
    columns = [pyarrow.field(key, types[kind]) for key, kind in head["columns"].items()]
    schema = pyarrow.schema(columns, metadata={_KEY: json.dumps(head).encode()})
    sink = pyarrow.BufferOutputStream()
    try:
        parquet.write_table(pyarrow.Table.from_pylist(table, schema=schema), sink)
    except (pyarrow.ArrowException, OverflowError) as error:
        raise InputError(f"These rows cannot be written as Parquet: {error}.") from error
    return sink.getvalue().to_pybytes()


def _read_parquet(path: Path) -> tuple[list[Row], dict[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(path).read()
        head = json.loads((table.schema.metadata or {}).get(_KEY, b"null"))
    except FileNotFoundError:
        raise FileError(f"{path} does not exist.") from None
    except (ArrowException, OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read as Parquet: {error}.") from error
    return table.to_pylist(), _checked(head, path)


def _checked(head: Any, path: Path) -> dict[str, Any]:
    """What a file says of itself, or FileError if it says nothing of the kind."""
    if not isinstance(head, dict) or head.get("format") != _MARK:
        raise FileError(f"{path} was not written by this version of Resect (expected format {_MARK!r}).")
    kinds = head.get("columns")
    wrong = [key for key in ("columns", "provenance") if not isinstance(head.get(key), dict)]
    wrong += ["name"] * (not isinstance(head.get("name"), str))
    wrong += ["columns"] * (isinstance(kinds, dict) and any(kind not in _KINDS for kind in kinds.values()))
    if wrong:
        raise FileError(f"{path} is damaged: its {quoted(wrong)} cannot be what was written.")
    return head
