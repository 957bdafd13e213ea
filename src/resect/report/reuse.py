"""What each block does to the stream, and what can be read off it, by depth; a curve per net."""

from __future__ import annotations

import statistics
from typing import Any

import altair as alt

from resect.report import theme
from resect.report.schema import clean_rows
from resect.report.theme import SOFT, WIDTH

PANELS = {  # column: (title of the panel, of its axis, where a line is drawn)
    "ratio": ("Size of the branch, shortcut = 1", "|branch| / |shortcut| (log scale)", 1.0),
    "angle": ("Angle between branch and shortcut", "degrees", 90.0),
    "descent": ("Cosine of the branch with the negative gradient of the loss", "cosine", 0.0),
}


def block_response(rows: list[dict[str, Any]]) -> Any:
    """Size of each branch against its shortcut, their angle, and whether it points down the loss."""
    rows = clean_rows("block_response", rows)
    for row in rows:  # a logarithm has no zero
        row["ratio"] = row["ratio"] if row["ratio"] else None
    nets = theme.in_order(row["net"] for row in rows)
    shown = [column for column in PANELS if theme.numbers(rows, column)]
    panels = [_panel(rows, nets, column, column == shown[0], column == shown[-1]) for column in shown]
    ratios = {net: theme.numbers((row for row in rows if row["net"] == net), "ratio") for net in nets}
    medians = {net: statistics.median(values) for net, values in ratios.items() if values}
    found = ", ".join(f"{value:.2g} ({net})" for net, value in medians.items())
    if len(medians) > 3:  # too many for one line
        ends = min(medians, key=medians.__getitem__), max(medians, key=medians.__getitem__)
        found = " to ".join(f"{medians[net]:.2g} ({net})" for net in ends)
    descending = [row for row in rows if row["descent"] is not None]
    down = sum(row["descent"] > 0 for row in descending)
    return theme.finish(
        alt.vconcat(*panels, spacing=16),
        f"Median size of a branch, its shortcut being 1: {found}" if found else "What each branch adds to its shortcut",
        f"Means over samples. {down} of {theme.plural(len(descending), 'branch', 'branches')} point down the loss."
        if descending
        else "Means over samples.",
    )


def _panel(rows: list[dict[str, Any]], nets: list[str], column: str, first: bool, last: bool) -> Any:
    title, y_title, nothing = PANELS[column]
    log = column == "ratio"
    there = [row for row in rows if row[column] is not None]
    values = [*theme.numbers(rows, column), nothing]
    pad = 0.08 * (max(values) - min(values)) or 0.1
    domain = [min(values) * 0.8, max(values) * 1.25] if log else [min(values) - pad, max(values) + pad]
    y = alt.Y(
        f"{column}:Q",
        title=y_title,
        scale=alt.Scale(type="log" if log else "linear", domain=domain, nice=False),
        axis=theme.log_axis(tickCount=4) if log else alt.Axis(tickCount=5),
    )
    base = alt.Chart(theme.data(there)).encode(x=depth_axis(rows, "index", "block, in the order of computation", last))
    colour = net_colour(nets, first)
    tips = [
        alt.Tooltip("net:N"),
        alt.Tooltip("name:N", title="block"),
        alt.Tooltip("shortcut:N"),
        alt.Tooltip(f"{column}:Q", format=".3g", title=title),
    ]
    zero = alt.Chart(theme.data([{column: nothing}])).mark_rule(strokeDash=[4, 3], color=SOFT).encode(y=y)
    points = base.mark_point(filled=True, size=34, opacity=1).encode(y=y, color=colour, tooltip=tips)
    line = base.mark_line(strokeWidth=1.6, opacity=0.75).encode(y=y, color=colour)
    return alt.layer(zero, line, points, width=WIDTH, height=150, title=theme.panel_title(title))


def depth_axis(rows: list[dict[str, Any]], column: str, title: str, shown: bool = True) -> alt.X:
    """The axis of blocks or depths; its labels and title only where ``shown``."""
    most = max(row[column] for row in rows)
    return alt.X(
        f"{column}:Q",
        title=title if shown else None,
        scale=alt.Scale(domain=[-0.5, most + 0.5], nice=False),
        axis=alt.Axis(tickMinStep=1, labels=shown, ticks=shown),
    )


def net_colour(nets: list[str], shown: bool = True) -> alt.Color:
    """A colour per net, with a legend where there are several and this is the panel to show it."""
    legend = alt.Legend(symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1) if shown and len(nets) > 1 else None
    return alt.Color("net:N", scale=theme.palette(nets), legend=legend)


def probes(rows: list[dict[str, Any]]) -> Any:
    """Share of held-out samples whose class a linear probe reads off each depth, and that of guessing."""
    rows = clean_rows("probes", rows)
    nets = theme.in_order(row["net"] for row in rows)
    there = [row for row in rows if row["accuracy"] is not None]
    y = alt.Y(
        "accuracy:Q",
        title="right on held-out samples",
        scale=alt.Scale(domain=[0, 1], nice=False),
        axis=theme.percent_axis(tickCount=6),
    )
    base = alt.Chart(theme.data(there)).encode(
        x=depth_axis(rows, "depth", "blocks passed (0: before the first)"), y=y, color=net_colour(nets)
    )
    tips = [
        alt.Tooltip("net:N"),
        alt.Tooltip("depth:Q"),
        alt.Tooltip("after:N"),
        alt.Tooltip("accuracy:Q", format=".1%"),
    ]
    layers = [base.mark_line(strokeWidth=2), base.mark_point(filled=True, size=40, opacity=1).encode(tooltip=tips)]
    guess = next((row["guessing"] for row in rows if row["guessing"] is not None), None)
    if guess is not None:
        line = alt.Chart(theme.data([{"accuracy": guess, "text": "always the most frequent class"}])).encode(y=y)
        layers.append(line.mark_rule(strokeDash=[4, 3], color=SOFT))
        layers.append(line.mark_text(align="right", x="width", dy=-7, color=SOFT).encode(text="text:N"))
    ends = [row["accuracy"] for row in sorted(there, key=lambda row: row["depth"]) if row["net"] == there[0]["net"]]
    return theme.finish(
        alt.layer(*layers, width=WIDTH, height=260),
        f"A linear probe gets {theme.percent(ends[0])} right before all blocks, {theme.percent(ends[-1])} after them",
        "A probe is a linear classifier trained on the stream at one depth, pooled"
        + (f". The title speaks of {there[0]['net']}." if len(nets) > 1 else "."),
    )
