"""Gradients beyond one curve: at several moments of a training, and through single blocks."""

from __future__ import annotations

from typing import Any

import altair as alt

from resect.analyse.effective import narrowest
from resect.report import theme
from resect.report.curves import SIDE
from resect.report.schema import clean_rows
from resect.report.theme import BLUE, FAINT, INK, VERMILION, WIDTH


def gradients_by_moment(rows: list[dict[str, Any]]) -> Any:
    """One curve per moment: the part of each quantity that comes along paths of each length."""
    rows = clean_rows("gradients_by_moment", rows)
    moments = theme.in_order(row["when"] for row in rows)
    wanted = [
        ("norm_of_sum", "Norm of the summed gradient (exact)"),
        ("sum_of_norms", "Sum of the single norms (sampled)"),
    ]
    wanted = [entry for entry in wanted if theme.numbers(rows, entry[0])]
    colour = alt.Color(
        "when:N", scale=theme.palette(moments), legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=3)
    )
    last = max(row["length"] for row in rows)
    panels, said = [], ""
    for column, title in wanted:
        drawn = []
        for when in moments:
            own = sorted((row for row in rows if row["when"] == when), key=lambda row: row["length"])
            values = [(row["length"], max(0.0, row[column] or 0.0)) for row in own]
            total = sum(value for _, value in values)
            kept = [(k, value) for (k, value), row in zip(values, own, strict=True) if not row["longer"]]
            drawn += [{"when": when, "length": k, "part": value / total} for k, value in kept if total]
            if total and len(kept) == len(values) and when == moments[-1] and not said:
                low, high, held = narrowest(values)
                said = f"{title}, {when}: {theme.percent(held)} along paths of {low} to {high} branches."
        x = alt.X(
            "length:Q",
            title="path length (branches on the path)",
            scale=alt.Scale(domain=[-0.5, last + 0.5], nice=False),
            axis=alt.Axis(tickMinStep=1, tickCount=8),
        )
        y = alt.Y("part:Q", title="part of the sum over lengths", axis=theme.percent_axis(tickCount=5))
        tips = [alt.Tooltip("when:N"), alt.Tooltip("length:Q"), alt.Tooltip("part:Q", format=".3~%")]
        base = alt.Chart(theme.data(drawn)).encode(x=x, y=y, color=colour)
        points = base.mark_point(filled=True, size=18, opacity=1).encode(tooltip=tips)
        panels.append(
            alt.layer(
                base.mark_line(strokeWidth=2),
                points,
                width=SIDE if len(wanted) > 1 else WIDTH,
                height=210,
                title=theme.panel_title(title),
            )
        )
    return theme.finish(
        alt.concat(*panels, columns=2, spacing=30),
        f"Gradient by path length at {theme.plural(len(moments), 'moment')} of training",
        ["Two different quantities, each in parts of its own sum.", said] if len(wanted) > 1 else said,
    )


def block_gradients(rows: list[dict[str, Any]]) -> Any:
    """For every block the gradient through its branch and past it, in units of the full gradient."""
    rows = clean_rows("block_gradients", rows)
    ways = [("through the branch", "through", BLUE), ("past it", "past", VERMILION)]
    drawn = [
        {"index": row["index"], "name": row["name"], "way": way, "part": row[column] / (row["full"] or 1.0)}
        for row in rows
        for way, column, _ in ways
    ]
    last = max(row["index"] for row in rows)
    x = alt.X(
        "index:Q",
        title="block, in the order of computation",
        scale=alt.Scale(domain=[-1, last + 1], nice=False),
        axis=alt.Axis(tickMinStep=1),
    )
    y = alt.Y("part:Q", title="norm, in units of the whole gradient's", scale=alt.Scale(domainMin=0))
    colour = alt.Color(
        "way:N",
        scale=alt.Scale(domain=[way for way, *_ in ways], range=[colour for *_, colour in ways]),
        legend=alt.Legend(symbolOpacity=1),
    )
    tips = [
        alt.Tooltip("name:N", title="block"),
        alt.Tooltip("way:N"),
        alt.Tooltip("part:Q", format=".3~f", title="of the whole gradient's norm"),
    ]
    base = alt.Chart(theme.data(drawn)).encode(x=x, y=y, color=colour)
    one = alt.Chart(theme.data([{"y": 1.0}])).mark_rule(strokeDash=[5, 4], color=INK).encode(y="y:Q")
    most = max(rows, key=lambda row: row["through"])
    share = f" ({100 * most['through'] / most['full']:.0f} %)" if most["full"] else ""
    return theme.finish(
        alt.layer(
            base.mark_line(strokeWidth=1, color=FAINT, opacity=0.5),
            base.mark_point(filled=True, size=50, opacity=1).encode(tooltip=tips),
            one,
            width=WIDTH,
            height=240,
        ),
        f"The largest share of the gradient comes through {most['name']}{share}",
        "Both parts add up to the whole as vectors: where they point apart, both may be longer than it (dashed).",
    )
