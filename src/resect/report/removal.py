"""Test error against the number of blocks removed, a curve per training method."""

from __future__ import annotations

from typing import Any

import altair as alt

from resect.report import theme
from resect.report.measure_axis import spread
from resect.report.schema import clean_rows
from resect.report.theme import WIDTH

LIMIT = 0.1
"""How much more error counts as doing without a block."""


def removal(rows: list[dict[str, Any]]) -> Any:
    """A curve per net: the mean over the draws of each number of removed blocks, and its 95 % interval."""
    rows = clean_rows("removal", rows)
    nets = theme.in_order(row["net"] for row in rows)
    summary = []
    for net in nets:
        for removed in sorted({row["removed"] for row in rows if row["net"] == net}):
            errors = [row["error"] for row in rows if (row["net"], row["removed"]) == (net, removed)]
            mean, low, high = spread(errors)
            summary.append(
                {"net": net, "removed": removed, "error": mean, "low": max(0.0, low), "high": min(1.0, high),
                 "draws": len(errors)}
            )  # fmt: skip
    most = max(row["removed"] for row in summary)
    x = alt.X(
        "removed:Q",
        title="blocks removed (number)",
        scale=alt.Scale(domain=[-0.6, most + 0.6], nice=False),
        axis=alt.Axis(tickMinStep=1),
    )
    top = min(1.0, max(row["high"] for row in summary) * 1.05 + 0.01)
    ticks = [tick for tick in (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1) if tick <= top]
    # The first blocks cost tenths of a percent, the last ones tens: a square root shows both, and zero.
    y = alt.Y(
        "error:Q",
        title="test error (square-root scale)",
        scale=alt.Scale(type="sqrt", domain=[0, top], nice=False),
        axis=theme.percent_axis(values=ticks),
    )
    colour = alt.Color(
        "net:N", scale=theme.palette(nets), legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1)
    )
    base = alt.Chart(theme.data(summary)).encode(x=x, color=colour)
    band = base.mark_area(opacity=0.14).encode(y=alt.Y("low:Q", title="test error (square-root scale)"), y2="high:Q")
    line = base.mark_line(strokeWidth=2).encode(y=y)
    tips = [
        alt.Tooltip("net:N"),
        alt.Tooltip("removed:Q"),
        alt.Tooltip("error:Q", format=".2%", title="mean error"),
        alt.Tooltip("low:Q", format=".2%", title="95 % interval from"),
        alt.Tooltip("high:Q", format=".2%", title="to"),
        alt.Tooltip("draws:Q"),
    ]
    points = base.mark_point(filled=True, size=46, stroke="#ffffff", strokeWidth=1, opacity=1).encode(y=y, tooltip=tips)
    spared = {net: _spared([row for row in summary if row["net"] == net]) for net in nets}
    lasting = max(nets, key=lambda net: spared[net])
    title = (
        f"Most blocks to spare: {lasting}, {spared[lasting]} removed for at most {100 * LIMIT:.0f} points more error"
    )
    if not spared[lasting]:
        title = f"Every net loses more than {100 * LIMIT:.0f} points with its first blocks removed"
    return theme.finish(
        alt.layer(band, line, points, width=WIDTH, height=290),
        title,
        "Line: mean over random draws; band: 95 % interval of the mean. Nothing is retrained.",
    )


def _spared(curve: list[dict[str, Any]]) -> int:
    """The most blocks that can be removed for at most ``LIMIT`` more error than at the beginning of the curve."""
    return max(row["removed"] for row in curve if row["error"] <= curve[0]["error"] + LIMIT)
