"""What cutting blocks costs and buys: error against speed, class by class, and measured latency."""

from __future__ import annotations

from typing import Any

import altair as alt

from resect.report import theme
from resect.report.bars import WHISKERS, bars, ratios, span
from resect.report.measure_axis import spread
from resect.report.schema import clean_rows
from resect.report.theme import FAINT, INK, WIDTH

LABELS = {"ms": "time per pass (ms)", "flops": "FLOPs of one pass (millions)"}


def cut_trade(rows: list[dict[str, Any]]) -> Any:
    """Error against time and against FLOPs: a line per choice of blocks, single nets as points."""
    rows = clean_rows("cut_trade", rows)
    choices = theme.in_order(row["choice"] for row in rows)
    columns = [column for column in ("ms", "flops") if any(row[column] is not None for row in rows)]
    panels = [_trade([row for row in rows if row[column] is not None], column, choices) for column in columns]
    best = choices[0]
    ours = [row for row in rows if row["choice"] == best]
    whole = next((row for row in rows if not row["removed"]), None)
    cheap, column = [], columns[0]
    if whole is not None and whole[column]:
        seen = _means([row for row in ours if row[column] is not None], column, best)
        cheap = [row["cost"] for row in seen if row["error"] <= whole["error"] + 0.01]
    title = f"Error against {' and '.join('time' if c == 'ms' else 'FLOPs' for c in columns)} as blocks go"
    least = min(cheap, default=None)
    if whole is not None and least is not None and least < whole[column]:
        share, unit = 100 * (1 - least / whole[column]), "time" if column == "ms" else "FLOPs"
        title = f"Chosen by “{best}”: {share:.0f} % of the {unit} goes for at most 1 point more error"
    return theme.finish(
        alt.hconcat(*panels, spacing=34).resolve_scale(color="shared", shape="shared"),
        title,
        "Line: mean over draws, with its 95 % interval where there are several. Further left and lower is better.",
    )


def _means(rows: list[dict[str, Any]], column: str, choice: str) -> list[dict[str, Any]]:
    """Mean error and cost over the draws, for each number of blocks that a choice lets go."""
    found = []
    for removed in sorted({row["removed"] for row in rows if row["choice"] == choice}):
        several = [row for row in rows if (row["choice"], row["removed"]) == (choice, removed)]
        mean, low, high = spread([row["error"] for row in several])
        cost = sum(row[column] for row in several) / len(several)
        found.append({"choice": choice, "removed": removed, "cost": cost, "error": mean,
                      "low": max(0.0, low), "high": min(1.0, high), "draws": len(several)})  # fmt: skip
    return found


def _trade(rows: list[dict[str, Any]], column: str, choices: list[str]) -> Any:
    """One panel: error up, what a pass costs across."""
    summary = [row for choice in choices for row in _means(rows, column, choice)]
    lines = {choice for choice in choices if sum(row["choice"] == choice for row in summary) > 1}
    top = min(1.0, 1.05 * max(row["high"] for row in summary) + 0.01)
    ticks = [tick for tick in (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1) if tick <= top]
    low, high = min(row["cost"] for row in summary), max(row["cost"] for row in summary)
    room = 0.05 * (high - low) or 0.05 * high or 1.0
    x = alt.X("cost:Q", title=LABELS[column], scale=alt.Scale(domain=[max(0, low - room), high + room], nice=False),
              axis=alt.Axis(tickCount=5))  # fmt: skip
    y = alt.Y("error:Q", title="error (square-root scale)", axis=theme.percent_axis(values=ticks),
              scale=alt.Scale(type="sqrt", domain=[0, top], nice=False))  # fmt: skip
    colour = alt.Color(
        "choice:N", scale=theme.palette(choices), legend=alt.Legend(symbolType="circle", symbolOpacity=1, columns=4)
    )
    shown = [row for row in summary if row["choice"] in lines]
    base = alt.Chart(theme.data(shown)).encode(x=x, color=colour)
    tips = [
        alt.Tooltip("choice:N"),
        alt.Tooltip("removed:Q", title="blocks gone"),
        alt.Tooltip("error:Q", format=".2%"),
        alt.Tooltip("cost:Q", format=".4g", title=LABELS[column]),
        alt.Tooltip("draws:Q"),
    ]
    whiskers = base.mark_rule(opacity=0.5, strokeWidth=1.4).encode(
        y=alt.Y("low:Q", title="error (square-root scale)"), y2="high:Q"
    )
    line = base.mark_line(strokeWidth=2).encode(y=y, order="removed:Q")
    dots = base.mark_point(filled=True, size=34, opacity=1).encode(y=y, tooltip=tips)
    single = [row for row in summary if row["choice"] not in lines]
    points = (
        alt.Chart(theme.data(single))
        .mark_point(filled=True, size=130, shape="diamond", stroke=INK, strokeWidth=1, opacity=1)
        .encode(x=x, y=y, color=colour, tooltip=tips)
    )
    layers = ([whiskers, line, dots] if shown else []) + ([points] if single else [])
    return alt.layer(*layers, width=(WIDTH - 90) // 2, height=290)


def cut_classes(rows: list[dict[str, Any]]) -> Any:
    """Error of every class: whole and cut, joined, the classes that lose most on top."""
    rows = clean_rows("cut_classes", rows)
    nets = theme.in_order(row["net"] for row in rows)
    labels = theme.in_order(row["label"] for row in rows)
    of = {(row["label"], row["net"]): row["error"] for row in rows}

    def change(label: str) -> float:
        return of.get((label, nets[-1]), 0.0) - of.get((label, nets[0]), 0.0)

    labels.sort(key=change, reverse=True)
    shown = labels if len(labels) <= 30 else labels[:20] + labels[-10:]
    points = [row for label in shown for row in rows if row["label"] == label]
    spans = [
        {"label": label, "low": min(found), "high": max(found)}
        for label in shown
        for found in [[row["error"] for row in rows if row["label"] == label]]
    ]
    top = min(1.0, 1.06 * max(row["error"] for row in points) + 0.005)
    axis = alt.Axis(labelColor=INK, labelLimit=200, domain=False, labelPadding=12)  # room for dots at 0
    y = alt.Y("label:N", sort=shown, title=None, axis=axis)
    x = alt.X("error:Q", title="error on images of the class", axis=theme.percent_axis(tickCount=6),
              scale=alt.Scale(domain=[0, top], nice=False))  # fmt: skip
    link = alt.Chart(theme.data(spans)).mark_rule(color=FAINT, strokeWidth=2.5).encode(y=y, x="low:Q", x2="high:Q")
    dots = (
        alt.Chart(theme.data(points))
        .mark_point(filled=True, size=90, opacity=1)
        .encode(
            x=x,
            y=y,
            color=alt.Color("net:N", scale=theme.palette(nets), legend=alt.Legend(symbolType="circle")),
            tooltip=[alt.Tooltip("label:N", title="class"), "net:N", alt.Tooltip("error:Q", format=".2%")],
        )
    )
    worst = labels[0]
    said = f"{100 * change(worst):+.1f} points".replace("-", "−")
    title = f"The class that the cut costs most: {worst}, {said}" if change(worst) > 0 else "The cut costs no class"
    if change(worst) < 0:
        title = f"Every class gains by the cut; {worst} gains least: {said}"
    title = title if len(nets) > 1 else "Error by class"
    note = "Error on the test images of each class, the class that loses most on top."
    if shown != labels:
        note = f"Of {len(labels)} classes the 20 that lose most and the 10 that gain most."
    return theme.finish(alt.layer(link, dots, width=WIDTH - 70, height={"step": 24}), title, note)


def cut_latency(rows: list[dict[str, Any]]) -> Any:
    """Measured latency of the whole and the cut net, a panel per way to run them and batch size."""
    rows = clean_rows("cut_latency", rows)
    nets = theme.in_order(row["net"] for row in rows)
    found = ratios(rows, "net", ["way", "batch"], nets[-1])
    title = f"“{nets[-1]}” takes {span(found)} of the time of “{nets[0]}”" if found and len(nets) > 1 else "Latency"
    return theme.finish(bars(rows, "net", ["way", "batch"]), title, WHISKERS + "Each panel has its own scale.")
