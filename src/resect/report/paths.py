"""Paths through the net: how long they are, and what those of each length contribute to the gradient."""

from __future__ import annotations

from typing import Any

import altair as alt

from resect.analyse.effective import narrowest
from resect.report import theme
from resect.report.curves import SIDE
from resect.report.schema import clean_rows
from resect.report.theme import BLUE, FAINT, GREEN, RULE, WIDTH

DECADES = 8  # a log scale shows this many powers of ten below its largest value


def path_lengths(rows: list[dict[str, Any]]) -> Any:
    """Share of the paths by the number of branches on them."""
    rows = sorted(clean_rows("path_lengths", rows), key=lambda row: row["length"])
    low, high, held = narrowest([(row["length"], row["share"] or 0.0) for row in rows])
    name = f"lengths {low} to {high}"
    shown = [
        row
        | {"group": name if low <= row["length"] <= high else "other lengths"}
        | {"from": row["length"] - 0.4, "to": row["length"] + 0.4}
        for row in rows
    ]
    last = max(row["length"] for row in rows)
    mean = sum(row["length"] * (row["share"] or 0) for row in rows) / (sum(row["share"] or 0 for row in rows) or 1)
    x = alt.X(
        "from:Q",
        title="path length (branches on the path)",
        scale=alt.Scale(domain=[-0.7, last + 0.7], nice=False),
        axis=alt.Axis(tickMinStep=1),
    )
    bars = (
        alt.Chart(theme.data(shown))
        .mark_rect()
        .encode(
            x=x,
            x2="to:Q",
            y=alt.Y("share:Q", title="share of all paths", axis=theme.percent_axis(tickCount=6)),
            y2=alt.datum(0),
            color=alt.Color("group:N", scale=alt.Scale(domain=[name, "other lengths"], range=[BLUE, FAINT])),
            tooltip=[
                alt.Tooltip("length:Q"),
                alt.Tooltip("share:Q", format=".3~%", title="share of all paths"),
            ],
        )
    )
    return theme.finish(
        bars.properties(width=WIDTH, height=220),
        f"{theme.percent(held)} of the paths pass {low} to {high} of {last} branches",
        f"Mean length {mean:.1f}. A path takes, at every block, either the branch or the shortcut.",
    )


def _panel(rows: list[dict[str, Any]], column: str, axis: str, look: str, log: bool, zone: Any, width: float) -> Any:
    """One gradient curve over path length; on a log scale what is not positive is left out."""
    values = [value for value in theme.numbers(rows, column) if value > 0]
    top = max(values, default=1.0)
    floor = max(min(values, default=top), top * 10.0**-DECADES)
    bottom = floor if log else 0.0
    drawn = [dict(row) for row in rows if row[column] is not None and (not log or row[column] >= floor)]
    for row in drawn:
        # An interval may reach to zero and below, where a log scale cannot follow: it stops at the floor.
        row["from"] = None if row["low"] is None else max(row["low"], bottom)
        row["to"] = None if row["high"] is None else max(row["high"], bottom)
    banded = column == "sum_of_norms" and any(row["from"] is not None and row["to"] is not None for row in drawn)
    if log:
        scale = alt.Scale(type="log", domain=[floor, top * 2], nice=False, clamp=True)
    else:
        scale = alt.Scale(domainMin=0)
    last = max(row["length"] for row in rows)
    title = "path length (branches on the path)" if log else None
    x = alt.X(
        "length:Q",
        title=title,
        scale=alt.Scale(domain=[-0.5, last + 0.5], nice=False),
        axis=alt.Axis(tickMinStep=1, tickCount=8),
    )
    ticks = theme.log_axis(tickCount=4) if log else alt.Axis(format="~g", tickCount=5)
    y = alt.Y(f"{column}:Q", title=f"{axis}, {'log' if log else 'linear'} scale", scale=scale, axis=ticks)
    base = alt.Chart(theme.data(drawn)).encode(x=x)
    tips = [alt.Tooltip("length:Q"), alt.Tooltip(f"{column}:Q", format=".3e", title=axis)]
    layers = []
    if zone and column == "sum_of_norms":
        span = alt.Chart(theme.data([{"a": zone[0] - 0.5, "b": zone[1] + 0.5}]))
        layers.append(span.mark_rect(color=RULE, opacity=0.7).encode(x=alt.X("a:Q", title=title), x2="b:Q"))
    if banded:
        layers.append(base.mark_area(color=look, opacity=0.25).encode(y=alt.Y("from:Q", scale=scale), y2="to:Q"))
        tips += [alt.Tooltip(f"{end}:Q", format=".3e", title=f"95 % interval, {end}") for end in ("low", "high")]
    layers.append(base.mark_line(color=look, strokeWidth=2).encode(x=x, y=y))
    layers.append(base.mark_point(filled=True, color=look, size=18, opacity=1).encode(x=x, y=y, tooltip=tips))
    return alt.layer(*layers, width=width, height=120 if log else 160)


def gradients(rows: list[dict[str, Any]]) -> Any:
    """Two different quantities, so two panels: exact norm of the sum, and sampled sum of the norms.

    Each is shown on a linear scale, where one sees what matters, and on a log scale, where one sees the rest.
    """
    rows = sorted(clean_rows("gradients", rows), key=lambda row: row["length"])
    shown = [row for row in rows if not row["longer"]]
    longer, rows = len(rows) - len(shown), shown or rows
    sampled = [(row["length"], max(0.0, row["sum_of_norms"] or 0.0)) for row in rows]
    zone = narrowest(sampled) if sum(weight for _, weight in sampled) and not longer else None
    wanted = [
        ("norm_of_sum", "Norm of the summed gradient (exact)", "norm of the sum", BLUE),
        ("sum_of_norms", "Sum of the single norms (sampled)", "sum of the norms", GREEN),
    ]
    wanted = [entry for entry in wanted if theme.numbers(rows, entry[0])]
    panels = []
    for log in (False, True):
        for column, title, axis, look in wanted:
            panel = _panel(rows, column, axis, look, log, zone, SIDE - 8 if len(wanted) > 1 else WIDTH)
            panels.append(panel if log else panel.properties(title=theme.panel_title(title, look)))
    exact = [row for row in rows if row["norm_of_sum"] is not None]
    subtitle = ["Two different quantities: compare the shapes, not the heights."]
    if exact:
        peak = max(exact, key=lambda row: row["norm_of_sum"])["length"]
        title = f"Gradient by path length: the exact norm of the sum is largest at length {peak}"
    if zone:
        low, high, held = zone
        if exact:
            subtitle.insert(0, f"The exact norm of the sum is largest for paths of length {peak}.")
        title = f"Paths of {low} to {high} branches hold {theme.percent(held)} of the summed gradient norms"
        subtitle[-1] += " Grey: those lengths; band: 95 % interval."
    if longer:
        subtitle.append(f"Lengths up to {rows[-1]['length']}; longer paths are not shown.")
    return theme.finish(alt.concat(*panels, columns=len(wanted), spacing=20), title, subtitle)
