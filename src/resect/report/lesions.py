"""What happens to a trained net when blocks are deleted: each one singly, or several at random."""

from __future__ import annotations

import statistics
from typing import Any

import altair as alt

from resect.report import theme
from resect.report.measure_axis import spread
from resect.report.schema import clean_rows
from resect.report.theme import BLUE, FAINT, RULE, SOFT, VERMILION, WIDTH


def _stages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where each stage of the first net starts and ends."""
    runs: list[dict[str, Any]] = []
    for row in rows:
        if row["stage"] and (not runs or runs[-1]["stage"] != row["stage"]):
            runs.append({"stage": row["stage"], "from": row["index"] - 0.5, "to": row["index"] + 0.5})
        if row["stage"]:
            runs[-1]["to"] = row["index"] + 0.5
    return [run | {"mid": (run["from"] + run["to"]) / 2, "top": 1.0} for run in runs]


def _error_axis(title: str, top: float) -> alt.Y:
    scale = alt.Scale(domain=[0, top], nice=False)
    return alt.Y("error:Q", title=title, scale=scale, axis=theme.percent_axis(tickCount=5))


def _panel(rows: list[dict[str, Any]], nets: list[str], top: float, main: bool, last_panel: bool) -> Any:
    """Error by deleted block, up to ``top``; stage names and the line for guessing where they fit."""
    last = max(row["index"] for row in rows)
    scale = alt.Scale(domain=[-1, last + 1], nice=False)
    title = "deleted block, in the order of computation" if last_panel else None
    x = alt.X("index:Q", title=title, scale=scale, axis=alt.Axis(tickMinStep=1))
    y = _error_axis("error", top)
    colour = alt.Color("net:N", scale=theme.palette(nets, [BLUE, VERMILION, *theme.SERIES[2:]]))
    shapes = ["block", "downsampling block"]
    layers = []
    stages = _stages([row for row in rows if row["net"] == nets[0]])
    if len(stages) > 1:
        bounds = alt.Chart(theme.data(stages[1:])).mark_rule(color=RULE, strokeWidth=1.5)
        layers.append(bounds.encode(x=alt.X("from:Q", scale=scale, title=title)))
        if main:
            text = alt.Chart(theme.data(stages)).mark_text(color=SOFT, y=9, fontSize=11)
            layers.append(text.encode(x=alt.X("mid:Q", scale=scale, title=title), text="stage:N"))
    for chance in theme.in_order(value for value in theme.numbers(rows, "chance") if value <= top):
        guess = [{"error": chance, "text": f"guessing: {theme.percent(chance)}"}]
        line = alt.Chart(theme.data(guess)).encode(y=y)
        layers.append(line.mark_rule(color=FAINT, strokeDash=[5, 4], strokeWidth=1.4))
        layers.append(line.mark_text(align="right", x="width", dx=-4, dy=15, color=SOFT).encode(text="text:N"))
    shown = [row for row in rows if row["net"] in nets and row["error"] is not None]
    whole = [{"net": row["net"], "error": row["baseline"]} for row in _first(rows, nets)]
    lines = alt.Chart(theme.data(whole)).mark_rule(strokeDash=[4, 3], strokeWidth=1, opacity=0.8)
    points = alt.Chart(theme.data(shown)).mark_point(filled=True, opacity=0.9, strokeWidth=0)
    tips = [
        alt.Tooltip("net:N"),
        alt.Tooltip("name:N", title="deleted block"),
        alt.Tooltip("error:Q", format=".2%"),
        alt.Tooltip("baseline:Q", format=".2%", title="error of the whole net"),
        alt.Tooltip("shortcut:N"),
    ]
    kind = alt.Legend(symbolFillColor=SOFT) if any(row["shape"] != "block" for row in rows) else None
    marks = points.encode(
        x=x,
        y=y,
        color=colour,
        tooltip=tips,
        size=alt.Size("shape:N", scale=alt.Scale(domain=shapes, range=[34, 110]), legend=kind),
        shape=alt.Shape("shape:N", scale=alt.Scale(domain=shapes, range=["circle", "diamond"]), legend=kind),
    )
    layers += [lines.encode(y=y, color=colour), marks]
    return alt.layer(*layers, width=WIDTH, height=230 if main else 110)


def _first(rows: list[dict[str, Any]], nets: list[str]) -> list[dict[str, Any]]:
    """The first row of each net."""
    return [next(row for row in rows if row["net"] == net) for net in nets]


def lesion_each(rows: list[dict[str, Any]]) -> Any:
    """Error after deleting each single block, beside a net without shortcuts; the first net magnified."""
    rows = clean_rows("lesion_each", rows)
    nets = theme.in_order(row["net"] for row in rows)
    rows.sort(key=lambda row: row["index"])
    for row in rows:
        row["shape"] = "downsampling block" if row["shortcut"] in ("projection", "reshape") else "block"
    medians = {}
    for net in nets:
        errors = theme.numbers((row for row in rows if row["net"] == net), "error")
        medians[net] = statistics.median(errors) if errors else None
    first = [row for row in rows if row["net"] == nets[0]]
    worst = max(theme.numbers(first, "error"), default=1.0)
    magnify = worst < 0.5
    panels = [_panel(rows, nets, 1.0, True, not magnify)]
    if magnify:
        title = theme.panel_title(f"The same, “{nets[0]}” only, magnified")
        panels.append(_panel(first, nets[:1], 1.15 * worst + 1e-3, False, True).properties(title=title))
    found = "; ".join(f"{net} {theme.percent(value)}" for net, value in medians.items() if value is not None)
    intact = ", ".join(f"{row['net']} {theme.percent(row['baseline'])}" for row in _first(rows, nets))
    return theme.finish(
        alt.vconcat(*panels, spacing=14),
        f"Median error after deleting one block: {found}",
        f"Error of the whole net (dashed lines): {intact}.",
    )


def lesion_random(rows: list[dict[str, Any]]) -> Any:
    """Error against the number of blocks deleted at random: every draw, the mean and its interval."""
    rows = clean_rows("lesion_random", rows)
    draws = [row for row in rows if row["error"] is not None]
    summary = []
    for k in sorted({row["k"] for row in draws}):
        alike = [row for row in draws if row["k"] == k]
        mean, low, high = spread([row["error"] for row in alike], all(row["every"] for row in alike))
        summary.append({"k": k, "error": mean, "low": max(0.0, low), "high": min(1.0, high)})
    top = min(1.0, max(row["error"] for row in draws) * 1.08 + 0.01)
    most = max(row["k"] for row in draws)
    x_title = "blocks deleted at random (number)"
    x = alt.X(
        "k:Q",
        title=x_title,
        scale=alt.Scale(domain=[-0.6, most + 0.6], nice=False),
        axis=alt.Axis(tickMinStep=1, values=theme.in_order(row["k"] for row in summary)),
    )
    y = _error_axis("error", top)
    # A little sideways scatter, the same in every run, keeps draws of one k apart.
    dots = (
        alt.Chart(theme.data(row | {"x": row["k"] + 0.3 * ((row["draw"] * 0.618034) % 1 - 0.5)} for row in draws))
        .mark_point(filled=True, size=16, color=BLUE, opacity=0.3)
        .encode(
            x=alt.X("x:Q", title=x_title),
            y=y,
            tooltip=["k:Q", "draw:Q", alt.Tooltip("error:Q", format=".2%")],
        )
    )
    base = alt.Chart(theme.data(summary)).encode(x=x)
    band = base.mark_area(color=BLUE, opacity=0.22).encode(y=alt.Y("low:Q"), y2="high:Q")
    line = base.mark_line(color=BLUE, strokeWidth=2).encode(y=y)
    tips = [
        alt.Tooltip("k:Q", title="deleted"),
        alt.Tooltip("error:Q", format=".2%", title="mean error"),
        alt.Tooltip("low:Q", format=".2%", title="95 % interval from"),
        alt.Tooltip("high:Q", format=".2%", title="to"),
    ]
    means = base.mark_point(filled=True, size=46, color=BLUE, stroke="#ffffff", strokeWidth=1, opacity=1)
    first, end = summary[0], summary[-1]
    return theme.finish(
        alt.layer(dots, band, line, means.encode(y=y, tooltip=tips), width=WIDTH, height=270),
        f"Mean error {theme.percent(first['error'])} with {theme.plural(first['k'], 'block')} deleted, "
        f"{theme.percent(end['error'])} with {end['k']}",
        "Dots: single draws; line: their mean; band: 95 % interval of the mean.",
    )
