"""What each figure needs: the columns of its CSV file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from resect.errors import InputError, check_all, quoted, unknown

# Kinds: "text"; "int"; "number" (unit in the name, else as the figure says); "fraction" (0 to 1, never
# percent); "flag" (True or False). A trailing "?": the cell may be empty, NaN or infinite, and the column may
# be missing. The order of the rows is the order of models, nets and variants in the figure.
COLUMNS: dict[str, dict[str, str]] = {
    "chain": {
        "model": "text",
        "index": "int",  # 0-based, in the order of computation
        "name": "text",
        "owner": "text",
        "part": "text",  # attention, MLP, conv, or whatever the branch is
        "shortcut": "text",  # identity, projection or reshape
        "parameters": "int",  # of the branch
        "stage": "int?",  # from 1; without it, blocks of one container are one stage
        "gone": "flag?",  # cut out; drawn as an empty outline
    },
    "speed": {
        "model": "text",
        "variant": "text",  # in the order to show; the first of a group is what the others are compared with
        "batch": "int",
        "median_ms": "number",
        "low_ms": "number",  # lower and upper quartile
        "high_ms": "number",
    },
    "training": {
        "net": "text",
        "epoch": "int",
        "train_loss": "number?",
        "test_error": "fraction",
        "muted": "int?",  # number of blocks muted at the end of the epoch; empty for a net without gates
    },
    "lesion_each": {
        "net": "text",  # the first net is the residual one, a second one the contrast
        "index": "int",
        "name": "text",
        "stage": "text?",
        "error": "fraction?",  # after deleting this block alone
        "baseline": "fraction",  # of the whole net
        "shortcut": "text?",
        "chance": "fraction?",  # error of guessing: 0.9 for ten classes; no line without it
    },
    # every: all that there are of this k are here, so that their mean is no estimate
    "lesion_random": {"k": "int", "draw": "int", "error": "fraction", "every": "flag?"},
    "lesion_parts": {
        "index": "int",
        "name": "text",
        "part": "text",
        "stage": "int?",
        "shortcut": "text?",
        "metric": "text",  # top1 and top5 are in %; the same in every row
        "value": "number",  # of the metric, with this block closed
        "baseline": "number",  # of the whole model
    },
    "lesion_many": {
        "study": "text",  # greedy, random or runs
        "k": "int",
        "every": "flag?",
        "metric": "text",
        "value": "number",
        "baseline": "number",
    },
    "lesion_order": {
        "k": "int",  # pairs of layers swapped
        "tau": "number",
        "order": "text?",
        "metric": "text",
        "value": "number",
        "baseline": "number",
    },
    "lesion_pairs": {
        "one": "int",
        "other": "int",
        "one_name": "text",
        "other_name": "text",
        "metric": "text",
        "both": "number",  # change of the metric with both closed
        "apart": "number",  # sum of the changes with each closed
        "interaction": "number",  # both − apart
    },
    "lesion_paths": {
        "k": "int",  # open branches
        "members": "int",  # sub-networks averaged
        "every": "flag?",
        "metric": "text",
        "value": "number",
        "baseline": "number",
    },
    "removal": {"net": "text", "removed": "int", "draw": "int", "error": "fraction"},
    "path_lengths": {"length": "int", "share": "fraction"},
    "gradients": {
        "length": "int",
        "norm_of_sum": "number?",  # exact
        "sum_of_norms": "number?",  # sampled, with its 95 % interval
        "low": "number?",
        "high": "number?",
        "longer": "flag?",  # this row is of all paths of this length or longer
    },
    "gradients_by_moment": {
        "when": "text",  # in the order to show
        "length": "int",
        "norm_of_sum": "number?",
        "sum_of_norms": "number?",
        "longer": "flag?",
    },
    "block_gradients": {
        "index": "int",
        "name": "text",
        "through": "number",  # norm of the gradient of all paths through the branch
        "past": "number",  # of all others
        "full": "number",  # of all paths
    },
    "response": {
        "index": "int",
        "name": "text",
        "shortcut": "text",
        "response": "number?",  # max|f| over the data; NaN and infinity are left out
        "epsilon": "number?",
        "muted": "flag",
    },
    "table_latency": {
        "net": "text",
        "batch": "int",
        "median_ms": "number",
        "low_ms": "number",
        "high_ms": "number",
    },
    "unit_maps": {
        "net": "text",
        "block": "int",
        "unit": "int",
        "line": "int",  # of the map, 0-based from the top
        "responses": "text",  # along the line from the left, numbers with spaces between them
    },
    "unit_similarity": {
        "net": "text",
        "block": "int",
        "other": "int",
        "similarity": "fraction",  # of the units of `block`, as they are found again in `other`
    },
    "block_response": {
        "net": "text",
        "index": "int",
        "name": "text",
        "shortcut": "text?",
        "ratio": "number?",  # of the norms of branch and shortcut
        "angle": "number?",  # between the two, in degrees
        "descent": "number?",  # cosine of the branch with the negative gradient
    },
    "angular_distance": {"net": "text", "depth": "int", "other": "int", "distance": "fraction?"},
    "cka": {"net": "text", "depth": "int", "other": "int", "cka": "number?"},
    "probes": {"net": "text", "depth": "int", "after": "text?", "accuracy": "fraction?", "guessing": "fraction?"},
    "strict_identity": {
        "net": "text",
        "index": "int",
        "name": "text",
        "quantile": "fraction",  # 0.05, 0.25, 0.5, 0.75, 0.95 and 1 are drawn
        "response": "number?",  # of max|f| over the samples
        "epsilon": "number?",
    },
    "gate_closed": {
        "net": "text",
        "index": "int",
        "name": "text",
        "epsilon": "number",
        "batch": "int",
        "closed": "fraction",
    },
    "cut_trade": {
        "choice": "text",  # how the blocks were chosen, ours first; a single net (uncut, recovered) is a choice too
        "removed": "int",  # blocks gone
        "draw": "int",
        "error": "fraction",
        "ms": "number?",  # of one pass, at one batch size for all rows
        "flops": "number?",  # of one pass, in millions
    },
    "cut_classes": {"label": "text", "net": "text", "error": "fraction"},  # the first net is the uncut one
    "cut_latency": {
        "net": "text",  # the first is what the others are compared with
        "way": "text",  # how it runs: eager, compiled, onnxruntime
        "batch": "int",
        "median_ms": "number",
        "low_ms": "number",
        "high_ms": "number",
    },
}

NEEDS_ONE = {
    "lesion_each": ["error"],
    "gradients": ["norm_of_sum", "sum_of_norms"],
    "gradients_by_moment": ["norm_of_sum", "sum_of_norms"],
    "response": ["response"],
    "block_response": ["ratio", "angle", "descent"],
    "angular_distance": ["distance"],
    "cka": ["cka"],
    "probes": ["accuracy"],
    "strict_identity": ["response"],
    "cut_trade": ["ms", "flops"],
}


def _fault(value: Any, kind: str) -> str | None:
    """Why ``value`` is not of this kind, or None."""
    optional = kind.endswith("?")
    if value is None or value == "":
        return None if optional else "is empty"
    kind = kind.rstrip("?")
    if kind == "text":
        return None if isinstance(value, str) else f"is {value!r}, not text"
    if kind == "flag":
        return None if isinstance(value, bool) else f"is {value!r}, not True or False"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"is {value!r}, not a number"
    if not math.isfinite(value):
        return None if optional else f"is {value!r}"
    if kind == "int" and value != int(value):
        return f"is {value!r}, not a whole number"
    if kind == "fraction" and not 0 <= value <= 1:
        return f"is {value!r}, not a fraction from 0 to 1"
    return None


def check_rows(name: str, rows: Sequence[Mapping[str, Any]], where: str | None = None) -> None:
    """Raise InputError unless ``rows`` are what figure ``name`` needs: one problem listed per column."""
    if name not in COLUMNS:
        raise unknown("figure", name, COLUMNS)
    where = where or f"The rows of figure {name!r}"
    if not rows:
        raise InputError(f"{where}: there are none.")
    columns = COLUMNS[name]
    missing = [c for c, kind in columns.items() if not kind.endswith("?") and all(c not in row for row in rows)]
    problems = [f"missing column{'s' * (len(missing) > 1)} {quoted(missing)}"] if missing else []
    for column, kind in columns.items():
        faults = ((number, _fault(row.get(column), kind)) for number, row in enumerate(rows, start=1))
        first = next(((number, fault) for number, fault in faults if fault), None)
        if first and column not in missing:
            problems.append(f"row {first[0]}: {column!r} {first[1]}")
    if not problems and not has_values(name, rows):
        problems.append(f"no value at all in {quoted(NEEDS_ONE[name])}")
    check_all(problems, where)


def has_values(name: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether there is something to show: optional cells are so one by one, and an empty frame is no figure."""
    shown = NEEDS_ONE.get(name, [])
    values = [row.get(column) for row in rows for column in shown]
    return not shown or any(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def clean_rows(name: str, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """``rows`` checked, with exactly the columns of the figure; empty, NaN and infinite cells become None."""
    check_rows(name, rows)

    def clean(value: Any) -> Any:
        return None if value == "" or (isinstance(value, float) and not math.isfinite(value)) else value

    return [{column: clean(row.get(column)) for column in COLUMNS[name]} for row in rows]
