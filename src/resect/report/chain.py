"""The chain of residual blocks as a picture: a shortcut line, and branches that leave it and come back."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, takewhile
from typing import Any

import altair as alt

from resect.blocks.block import Blocks
from resect.blocks.choose import layer_of
from resect.blocks.show import part_name
from resect.report import theme
from resect.report.schema import clean_rows
from resect.report.theme import AMBER, BLUE, FAINT, GREEN, INK, PURPLE, SKY, SOFT, VERMILION, WIDTH

PARTS = {"conv": BLUE, "attention": VERMILION, "MLP": GREEN}
STEM, TOP = 14, 96  # px: from the line up to the foot of a box; height of the tallest box


def chain_rows(model: str, blocks: Blocks) -> list[dict[str, Any]]:
    """Return one row per block for the picture of the chain."""
    return [
        {
            "model": model,
            "index": block.index,
            "name": block.name,
            "owner": block.owner or block.name,
            "part": part_name(block.part),
            "shortcut": block.shortcut,
            "parameters": block.parameters,
            "stage": block.stage,
        }
        for block in blocks
    ]


def _stage(row: dict[str, Any]) -> Any:
    """The block's stage: its number, or else ``layer3`` for ``layer3.4``, ``blocks`` for ``blocks.11``."""
    owner = row["owner"]
    return row["stage"] or layer_of(owner).rpartition(".")[0] or owner


def _common(owners: list[str]) -> str:
    """The modules that all layers lie in: ``encoder.layer`` for ``encoder.layer.0.output`` and ``encoder.layer.1``."""
    paths = [layer_of(owner).split(".")[:-1] or [owner] for owner in owners]
    return ".".join(same[0] for same in takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False)))


def _runs(rows: list[dict[str, Any]], key: Callable[[dict[str, Any]], Any]) -> list[dict[str, Any]]:
    """Runs of neighbouring blocks with one key, as brackets below the line."""
    runs = []
    for _, group in groupby(rows, key):
        members = list(group)
        first, last = members[0]["index"], members[-1]["index"]
        owners = theme.in_order(row["owner"] for row in members)
        layers = len(set(map(layer_of, owners)))
        many = f" ×{layers}" if layers == len(members) else f": {theme.plural(layers, 'layer')}"
        runs.append(
            {
                "first": first,
                "last": last,
                "from": first - 0.42,
                "to": last + 0.42,
                "mid": (first + last) / 2,
                "stage": _common(owners),
                "label": _common(owners) + many,
            }
        )
    return runs


def _stages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The stages, each with a label as wide as its bracket at most."""
    runs = _runs(rows, _stage)
    # A label wider than its bracket would run into its neighbour.
    cell = WIDTH / (len(rows) + 1.6)
    for run in runs:
        room = (run["last"] - run["first"] + 1) * cell
        if len(run["label"]) * 6.2 > room:
            run["label"] = run["stage"] if len(run["stage"]) * 6.2 <= room else ""
    return runs


def _labels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The number of parameters, over the largest box of each part and stage."""
    largest: dict[tuple[Any, str], dict[str, Any]] = {}
    for row in rows:
        key = (_stage(row), row["part"])
        if key not in largest or row["parameters"] > largest[key]["parameters"]:
            largest[key] = row
    wide = WIDTH / (len(rows) + 1.6) > 20
    chosen = list(largest.values()) if wide else [max(largest.values(), key=lambda row: row["parameters"])]
    return [row | {"label": theme.count(row["parameters"])} for row in chosen if row["parameters"]]


def _strip(model: str, rows: list[dict[str, Any]], parts: list[str], kinds: list[str]) -> Any:
    """One model: the line, its branches, and the stages underneath."""
    rows = sorted(rows, key=lambda row: row["index"])
    last, biggest = rows[-1]["index"], max(row["parameters"] for row in rows) or 1
    total = sum(row["parameters"] for row in rows) or 1
    boxes = [
        row
        | {
            "left": row["index"] - 0.36,
            "right": row["index"] + 0.36,
            "foot": STEM,
            "head": STEM + max(3.0, TOP * row["parameters"] / biggest),
            "share": row["parameters"] / total,
        }
        for row in rows
    ]
    x = alt.Scale(domain=[-0.95, last + 0.95], nice=False, zero=False)
    y = alt.Scale(domain=[-34, STEM + TOP + 14], nice=False)

    def at(rows: list[dict[str, Any]], left: str, bottom: str) -> Any:
        return alt.Chart(theme.data(rows)).encode(
            x=alt.X(left, type="quantitative", scale=x, axis=None),
            y=alt.Y(bottom, type="quantitative", scale=y, axis=None),
        )

    tips = [
        alt.Tooltip("name:N", title="block"),
        alt.Tooltip("part:N", title="branch"),
        alt.Tooltip("shortcut:N"),
        alt.Tooltip("parameters:Q", format=",", title="parameters of the branch"),
        alt.Tooltip("share:Q", format=".1%", title="share of all branches"),
    ]
    others = [PURPLE, SKY, "#8a94a6", "#44546a"]
    extra = [part for part in parts if part not in PARTS]
    look = PARTS | {part: others[place % len(others)] for place, part in enumerate(extra)}
    scale = alt.Scale(domain=parts, range=[look[part] for part in parts])
    colour = alt.Color("part:N", scale=scale, legend=alt.Legend(symbolType="square"))
    ends = [{"a": -0.95, "b": last + 0.86, "y": 0}]
    line = at(ends, "a", "y").mark_rule(strokeWidth=2, color=INK).encode(x2="b:Q")
    arrow = at(ends, "b", "y").mark_point(shape="triangle-right", size=60, filled=True, color=INK, opacity=1)
    legs = [{"x": box[side], "foot": 0, "head": STEM} for box in boxes for side in ("left", "right")]
    stems = at(legs, "x", "foot").mark_rule(strokeWidth=1.1, color=SOFT).encode(y2="head:Q")
    gone = [box for box in boxes if box["gone"]]
    outlines = (
        at(gone, "left", "foot")
        .mark_rect(cornerRadius=2.5, filled=False, strokeWidth=1.3, strokeDash=[3, 2])
        .encode(x2="right:Q", y2="head:Q", stroke=alt.Color("part:N", scale=scale, legend=None), tooltip=tips)
    )
    branches = (
        at([box for box in boxes if not box["gone"]], "left", "foot")
        .mark_rect(cornerRadius=2.5, opacity=0.92)
        .encode(x2="right:Q", y2="head:Q", color=colour, tooltip=tips)
    )
    sums = at([box | {"zero": 0} for box in boxes], "right", "zero").mark_point(
        size=22, filled=True, fill="#ffffff", stroke=INK, strokeWidth=1.2, opacity=1
    )
    marks = [box | {"zero": 0} for box in boxes if box["shortcut"] != "identity"]
    special = (
        at(marks, "index", "zero")
        .mark_point(filled=True, size=72 if len(rows) < 32 else 40, color=AMBER, stroke=INK, strokeWidth=1, opacity=1)
        .encode(
            shape=alt.Shape(
                "shortcut:N",
                scale=alt.Scale(domain=kinds, range=["diamond", "square"]),
                legend=alt.Legend(symbolFillColor=AMBER, symbolStrokeColor=INK, labelExpr="datum.label + ' shortcut'"),
            ),
            tooltip=tips,
        )
    )
    runs = [run | {"text": -26} for run in _stages(rows)]
    layers_of_two = len({layer_of(row["owner"]) for row in rows}) < len(rows)
    spans = _runs(rows, (lambda row: layer_of(row["owner"])) if layers_of_two else _stage)
    brackets = (
        at([{"from": span["from"], "to": span["to"], "y": -14} for span in spans], "from", "y")
        .mark_rule(color=FAINT, strokeWidth=1.2)
        .encode(x2="to:Q")
    )
    names = at(runs, "mid", "text").mark_text(color=SOFT, fontSize=11).encode(text="label:N")
    sizes = (
        at(
            [row | {"head": next(b["head"] for b in boxes if b["index"] == row["index"])} for row in _labels(rows)],
            "index",
            "head",
        )
        .mark_text(dy=-7, fontSize=10, color=SOFT)
        .encode(text="label:N")
    )
    detour = at(marks, "left", "zero").mark_rule(strokeWidth=4, color=AMBER).encode(x2="right:Q")
    layers = (
        [line]
        + ([detour] if marks else [])
        + [arrow, stems, branches]
        + ([outlines] if gone else [])
        + [sums, brackets, names, sizes]
        + ([special] if marks else [])
    )
    head = alt.Title(
        f"{model}: {theme.plural(len(rows), 'block')}, {theme.count(total)} parameters",
        fontSize=12.5,
        fontWeight=500,
        offset=2,
    )
    return alt.layer(*layers, width=WIDTH, height=150, title=head)


def chain(rows: list[dict[str, Any]]) -> Any:
    """One strip per model: box height = parameters of the branch, colour = what the branch is."""
    rows = clean_rows("chain", rows)
    models, parts = theme.in_order(r["model"] for r in rows), theme.in_order(r["part"] for r in rows)
    kinds = [kind for kind in ("projection", "reshape") if any(row["shortcut"] == kind for row in rows)]
    strips = [_strip(model, [r for r in rows if r["model"] == model], parts, kinds) for model in models]
    identity = sum(row["shortcut"] == "identity" for row in rows)
    many = "all" if identity == len(rows) > 1 else f"{identity} of them"
    title = f"{theme.plural(len(rows), 'residual block')} found, {many} with an identity shortcut"
    notes = ["Box height: parameters of the branch, to scale within each model. The data flow from left to right."]
    gone = [row["parameters"] for row in rows if row["gone"]]
    if gone:
        share = 100 * sum(gone) / (sum(row["parameters"] for row in rows) or 1)
        title = f"{len(gone)} of {theme.plural(len(rows), 'residual block')} gone: {share:.0f} % of their parameters"
        notes.append("Empty outlines: blocks that are gone; their shortcuts stay.")
    return theme.finish(alt.vconcat(*strips, spacing=22), title, notes)
