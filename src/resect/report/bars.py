"""Latencies as bars with whiskers from the lower to the upper quartile."""

from __future__ import annotations

from typing import Any

import altair as alt

from resect.report import theme
from resect.report.schema import clean_rows
from resect.report.theme import BLUE, INK, WIDTH

SHADES = [
    "#8a94a6",
    "#56B4E9",
    BLUE,
    "#00936C",
    "#A6518A",
]  # the first, grey, is what the others are compared with


def _panel(rows: list[dict[str, Any]], label: str, title: str, names: list[str], axis: str | None) -> Any:
    """Bars of one group: what is compared downwards, time across, each with its number and the change."""
    first = rows[0]["median_ms"]
    shown = []
    for place, row in enumerate(rows):
        change = f"   ({row['median_ms'] / first - 1:+.0%})" if place and first else ""
        shown.append(row | {"text": f"{row['median_ms']:.3g} ms{change}".replace("-", "−").replace("%", " %")})
    limit = 1.22 * max(row["high_ms"] for row in rows)
    base = alt.Chart(theme.data(shown)).encode(
        y=alt.Y(
            f"{label}:N",
            sort=None,
            title=None,
            axis=alt.Axis(labelColor=INK, labelFontSize=12, labelLimit=220),
        )
    )
    scale = alt.Scale(domain=[0, limit], nice=False)
    x = alt.X("median_ms:Q", title=axis, scale=scale, axis=alt.Axis(tickCount=6))
    tips = [
        alt.Tooltip(f"{label}:N"),
        alt.Tooltip("batch:Q", title="batch size"),
        alt.Tooltip("median_ms:Q", format=".4g", title="median (ms)"),
        alt.Tooltip("low_ms:Q", format=".4g", title="lower quartile (ms)"),
        alt.Tooltip("high_ms:Q", format=".4g", title="upper quartile (ms)"),
    ]
    boxes = base.mark_bar(height={"band": 0.72}, cornerRadiusEnd=2).encode(
        x=x,
        color=alt.Color(f"{label}:N", scale=theme.palette(names, SHADES), legend=None),
        tooltip=tips,
    )
    whiskers = base.mark_rule(color=INK, strokeWidth=1.4).encode(x="low_ms:Q", x2="high_ms:Q")
    caps = [base.mark_tick(color=INK, size=9, thickness=1.4).encode(x=f"{end}:Q") for end in ("low_ms", "high_ms")]
    text = base.mark_text(align="left", dx=8, color=INK).encode(x="high_ms:Q", text="text:N")
    head = theme.panel_title(title)
    return alt.layer(boxes, whiskers, *caps, text, width=WIDTH - 70, height={"step": 27}, title=head)


def bars(rows: list[dict[str, Any]], label: str, group: list[str]) -> Any:
    """One panel per group, each with a time axis of its own that starts at zero."""
    names = theme.in_order(row[label] for row in rows)
    keys = theme.in_order(tuple(row[column] for column in group) for row in rows)
    panels = []
    for key in keys:
        members = [row for row in rows if tuple(row[column] for column in group) == key]
        title = ", ".join(f"batch {v}" if c == "batch" else str(v) for c, v in zip(group, key, strict=True))
        axis = "time per pass (ms)" if key == keys[-1] else None
        panels.append(_panel(members, label, title, names, axis))
    return alt.vconcat(*panels, spacing=20)


def ratios(rows: list[dict[str, Any]], label: str, group: list[str], last: str) -> list[float]:
    """Median of ``last`` over the median of the first row, per group."""
    found = []
    for key in theme.in_order(tuple(row[c] for c in group) for row in rows):
        members = [row for row in rows if tuple(row[c] for c in group) == key]
        end = [row for row in members if row[label] == last]
        if end and members[0]["median_ms"]:
            found.append(end[0]["median_ms"] / members[0]["median_ms"])
    return found


def span(shares: list[float]) -> str:
    """``47 %`` or ``47 to 58 %``."""
    low, high = f"{100 * min(shares):.0f}", f"{100 * max(shares):.0f}"
    return f"{low} %" if low == high else f"{low} to {high} %"


WHISKERS = "Bars: median; whiskers: lower and upper quartile; in brackets: change against the first bar. "


def speed(rows: list[dict[str, Any]]) -> Any:
    """Latency of each model whole, with half its blocks closed and with half removed."""
    rows = clean_rows("speed", rows)
    variants = theme.in_order(row["variant"] for row in rows)
    found = ratios(rows, "variant", ["model", "batch"], variants[-1])
    title = f"“{variants[-1]}” takes {span(found)} of the time of “{variants[0]}”" if found else "Latency"
    return theme.finish(bars(rows, "variant", ["model", "batch"]), title, WHISKERS + "Each panel has its own scale.")


def table_latency(rows: list[dict[str, Any]]) -> Any:
    """Latency of the nets of the table, one panel per batch size."""
    rows = sorted(clean_rows("table_latency", rows), key=lambda row: row["batch"])
    nets = theme.in_order(row["net"] for row in rows)
    fastest = []
    for batch in theme.in_order(row["batch"] for row in rows):
        best = min((r for r in rows if r["batch"] == batch), key=lambda r: r["median_ms"])
        fastest.append(f"{best['median_ms']:.3g} ms for “{best['net']}” at batch {batch}")
    title = f"Latency of {theme.plural(len(nets), 'net')}; shortest: {', '.join(fastest)}"
    return theme.finish(bars(rows, "net", ["batch"]), title, WHISKERS + "Each panel has its own scale.")
