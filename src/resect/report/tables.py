"""Rows as a table for people: units in the header, decimals that line up, a marked best value where asked."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from resect.errors import unknown
from resect.report.theme import in_order


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _decimals(values: Sequence[float]) -> int:
    """Decimals with which the smallest value still shows three figures; at most 3, none for whole numbers."""
    sizes = [abs(value) for value in values if math.isfinite(value) and value]
    if not sizes or all(isinstance(value, int) for value in values):
        return 0
    return min(3, max(0, 2 - math.floor(math.log10(min(sizes)))))


def _text(value: Any, decimals: int) -> str:
    """A cell as it is read: 1,234.5 with a thin space for the comma and a proper minus sign."""
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not _is_number(value):
        return str(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.{decimals}f}".replace(",", "\u202f").replace("-", "−")


def table(rows: Sequence[Mapping[str, Any]], best: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Headers and cells for the template.

    A column named ``latency (ms)`` gets ``ms`` as its unit. ``best`` maps a column to "low" or "high": its
    best values are marked, all of them on a tie.
    """
    columns = in_order(key for row in rows for key in row)
    for column, direction in (best or {}).items():
        if column not in columns:
            raise unknown("column", column, columns)
        if direction not in ("low", "high"):
            raise unknown("direction", direction, ["low", "high"])
    heads: list[dict[str, Any]] = []
    cells: list[list[dict[str, Any]]] = [[] for _ in rows]
    for column in columns:
        values = [row.get(column) for row in rows]
        numbers: list[Any] = [value for value in values if _is_number(value)]
        # Text such as "1.8 ± 0.2" lines up on the right as well.
        filled = [value for value in values if value is not None and value != ""]
        right = bool(filled) and all(_is_number(v) or re.match(r"[-−+]?\d", str(v)) for v in filled)
        name, unit = re.fullmatch(r"(.*?)(?:\s*\(([^()]*)\))?", str(column), re.DOTALL).groups()  # type: ignore[union-attr]
        heads.append({"name": name, "unit": unit, "right": right})
        finite = [value for value in numbers if math.isfinite(value)]
        pick = {"low": min, "high": max}.get((best or {}).get(column, ""))
        winner = pick(finite) if pick and finite else None
        decimals = _decimals(numbers)
        for line, value in zip(cells, values, strict=True):
            mark = winner is not None and _is_number(value) and value == winner
            line.append({"text": _text(value, decimals), "right": right, "best": mark})
    return {"heads": heads, "rows": cells}
