"""The rows of a lesion study, as `LesionStudy.rows` and files hold them, as the rows of each figure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from resect.report.measure_axis import is_error

Rows = list[dict[str, Any]]


def lesion_figures(rows: Iterable[Mapping[str, Any]], net: str = "this model") -> dict[str, Rows]:
    """Return per figure that these rows are enough for its own rows; ``net`` is what the model is called."""
    of: dict[str, Rows] = {}
    errors = False
    for row in rows:
        of.setdefault(row["study"], []).append(dict(row))
        errors = is_error(row["metric"])
    each, random = of.get("each", []) + of.get("layers", []), of.get("random", [])
    figures: dict[str, Rows] = {"lesion_parts": [r | {"name": r["label"]} for r in of.get("each", [])]}
    if errors:
        figures["lesion_each"] = [
            {"net": row.get("net") or net, "index": row["index"], "name": row["label"], "stage": _stage(row["stage"]),
             "error": row["value"] / 100, "baseline": row["baseline"] / 100, "shortcut": row["shortcut"]}
            for row in each
        ]  # fmt: skip
        figures["lesion_random"] = [
            {"k": r["k"], "draw": r["draw"], "error": r["value"] / 100, "every": r.get("every")} for r in random
        ]
    figures["lesion_many"] = [*of.get("greedy", []), *random, *of.get("runs", [])]
    figures["lesion_order"] = [row | {"order": row["label"]} for row in of.get("swaps", [])]
    figures["lesion_pairs"] = _interactions(of.get("pairs", []), each)
    figures["lesion_paths"] = [*of.get("paths", []), *of.get("ensembles", [])]
    return {name: found for name, found in figures.items() if found}


def _interactions(pairs: Rows, each: Rows) -> Rows:
    alone = {row["label"]: row for row in each}
    found = []
    for row in pairs:
        one, other = (alone[name] for name in row["closed"].split(" "))
        apart = one["change"] + other["change"]
        found.append(
            {"one": one["index"], "other": other["index"], "one_name": one["label"], "other_name": other["label"],
             "metric": row["metric"], "both": row["change"], "apart": apart, "interaction": row["change"] - apart}
        )  # fmt: skip
    return found


def _stage(stage: Any) -> str | None:
    return f"stage {stage:g}" if isinstance(stage, (int, float)) else stage
