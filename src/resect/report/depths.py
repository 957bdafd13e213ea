"""Depth against depth: how alike the streams are, a panel per net."""

from __future__ import annotations

import statistics
from typing import Any

import altair as alt

from resect.report import theme
from resect.report.schema import clean_rows
from resect.report.theme import FAINT, WIDTH

GAP = 26  # px between the panels of two nets
PER_LINE = 3


def cka(rows: list[dict[str, Any]]) -> Any:
    """Linear CKA between the streams at every two depths."""
    rows = clean_rows("cka", rows)
    low = min(theme.numbers(rows, "cka"))
    scale = alt.Scale(scheme="viridis", domain=[min(max(int(10 * low) / 10, 0.0), 0.9), 1], clamp=True)
    return theme.finish(
        _matrices(rows, "cka", "CKA", scale),
        "How alike what the stream holds is at each two depths (linear CKA)",
        "Depth 0 is before the first block. Bright squares along the diagonal: depths that say nearly the same.",
    )


def angular_distance(rows: list[dict[str, Any]]) -> Any:
    """Angle between the streams at every two depths of one shape, as a share of 180 degrees."""
    rows = clean_rows("angular_distance", rows)
    found = [row["distance"] for row in rows if row["distance"] is not None and row["other"] - row["depth"] == 1]
    top = max(theme.numbers(rows, "distance"))
    scale = alt.Scale(scheme="viridis", reverse=True, domain=[0, top or 1])
    step = f"A block turns the stream by {180 * statistics.median(found):.3g}° in the median" if found else ""
    return theme.finish(
        _matrices(rows, "distance", "distance", scale),
        step or "How far blocks turn the stream",
        "Angular distance, 1 being 180°; grey where two depths differ in shape. Bright: the stream hardly turned.",
    )


def _matrices(rows: list[dict[str, Any]], column: str, title: str, scale: alt.Scale) -> Any:
    nets = theme.in_order(row["net"] for row in rows)
    across = min(PER_LINE, len(nets))
    side = min(320.0, (WIDTH - 24 - GAP * (across - 1)) / across)
    depths = sorted({row["depth"] for row in rows} | {row["other"] for row in rows})
    every = max(1, round(len(depths) / 5))
    axis = alt.Axis(values=depths[::every], labelAngle=0, ticks=False, domain=False, grid=False)
    colour = alt.Color(
        f"{column}:Q", scale=scale, legend=alt.Legend(gradientLength=180, gradientThickness=10, tickCount=5)
    )
    tips = [alt.Tooltip("depth:O"), alt.Tooltip("other:O"), alt.Tooltip(f"{column}:Q", format=".3f", title=title)]
    panels = [
        alt.Chart(theme.data([row for row in rows if row["net"] == net and row[column] is not None]))
        .mark_rect()
        .encode(
            x=alt.X("other:O", title="blocks passed", axis=axis, scale=alt.Scale(domain=depths)),
            y=alt.Y(
                "depth:O",
                title="blocks passed" if place % across == 0 else None,
                axis=axis,
                scale=alt.Scale(domain=depths),
            ),
            color=colour,
            tooltip=tips,
        )
        .properties(
            width=side,
            height=side,
            title=theme.panel_title(net),
            view=alt.ViewBackground(fill=FAINT, fillOpacity=0.35),
        )
        for place, net in enumerate(nets)
    ]
    return alt.concat(*panels, columns=across, spacing=GAP)
