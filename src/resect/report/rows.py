"""Rows (a list of dicts) as CSV and metrics as JSON, written whole or not at all."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from resect.errors import FileError, InputError
from resect.files import write_with

Row = dict[str, Any]


def write_file(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write a file whole or not at all; a full disk or a missing right raises FileError."""
    target = Path(path)
    data = content.encode() if isinstance(content, str) else content
    write_with(target, lambda temporary: temporary.write_bytes(data))
    return target


def _cell(value: Any) -> str:
    """One CSV cell. ``repr`` of a float is the shortest text that reads back as the same float."""
    value = value.item() if hasattr(value, "item") else value  # numpy and torch numbers
    if value is None:
        return ""
    return repr(value) if isinstance(value, float) else str(value)


def _value(cell: str) -> Any:
    """The value of a CSV cell: a number or a truth value only if it would be written in just this way."""
    if cell == "":
        return None
    if cell in ("True", "False"):
        return cell == "True"
    for read in (int, float):
        try:
            value = read(cell)
        except ValueError:
            continue
        if _cell(value) == cell:
            return value
    return cell


def write_rows(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write ``rows`` as CSV, atomically. The columns are the keys, in the order in which they appear.

    ``None`` becomes an empty cell. There must be at least one row, or the columns would be unknown.
    """
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        raise InputError(f"There are no rows to write to {path}.")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(row.get(column)) for column in columns] for row in rows)
    return write_file(path, text.getvalue())


def read_rows(path: str | os.PathLike[str], columns: Mapping[str, str] | None = None) -> list[Row]:
    """Read what ``write_rows`` wrote; FileError if the file is missing, damaged or empty.

    Cells become int, float, bool, None or text by their looks. Columns that ``columns`` calls "text"
    stay text, so that a block named ``7`` does not turn into a number.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = [line for line in csv.reader(file, strict=True) if line]
    except FileNotFoundError:
        raise FileError(f"{path} does not exist.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path} cannot be read as CSV: {error}.") from error
    if len(lines) < 2:
        raise FileError(f"{path} holds no rows: expected a header and at least one row.")
    header, *body = lines
    if len(set(header)) < len(header):
        raise FileError(f"{path} names a column twice in its header.")
    text = {name for name, kind in (columns or {}).items() if kind.rstrip("?") == "text"}
    rows = []
    for number, line in enumerate(body, start=1):
        if len(line) != len(header):
            raise FileError(f"{path}, row {number}: {len(line)} cells, but the header has {len(header)} columns.")
        rows.append({name: cell if name in text else _value(cell) for name, cell in zip(header, line, strict=True)})
    return rows


def plain(value: Any) -> Any:
    """``value`` with numpy and torch values as plain ones; NaN and infinity, unknown to JSON, as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write ``value`` as indented JSON, atomically; NaN and infinity become null."""
    try:
        text = json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)
    except TypeError as error:
        raise InputError(f"{path} cannot hold this as JSON: {error}.") from error
    return write_file(path, text + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file; FileError if it is missing or damaged."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(f"{path} does not exist.") from None
    except (OSError, ValueError) as error:
        raise FileError(f"{path} cannot be read as JSON: {error}.") from error
