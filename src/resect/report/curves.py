"""Curves over a training run: test error and muted blocks per epoch, and what the branches do at its end."""

from __future__ import annotations

from typing import Any

import altair as alt

from resect.report import theme
from resect.report.schema import clean_rows
from resect.report.theme import BLUE, FAINT, INK, SOFT, VERMILION, WIDTH

SIDE = (WIDTH - 76) / 2  # px: width of one of two panels side by side
SHAPES = {"identity": "circle", "projection": "diamond", "reshape": "square"}


def _lines(rows: list[dict[str, Any]], y: Any, colour: Any, title: str, tips: list[Any], width: float) -> Any:
    """Curves by epoch, one per net, with a hover point at every epoch."""
    epochs = [row["epoch"] for row in rows]
    x = alt.X(
        "epoch:Q",
        title="epoch",
        scale=alt.Scale(domain=[min(epochs), max(max(epochs), min(epochs) + 1)], nice=False),
        axis=alt.Axis(tickMinStep=1, tickCount=6),
    )
    base = alt.Chart(theme.data(rows)).encode(x=x, y=y, color=colour)
    points = base.mark_point(filled=True, size=16, opacity=1).encode(tooltip=tips)
    return alt.layer(base.mark_line(strokeWidth=2), points, width=width, height=210, title=theme.panel_title(title))


def training(rows: list[dict[str, Any]]) -> Any:
    """Test error per epoch by net, and muted blocks per epoch."""
    rows = clean_rows("training", rows)
    nets = theme.in_order(row["net"] for row in rows)
    dash = alt.Legend(symbolType="stroke", symbolStrokeWidth=3)
    colour = alt.Color("net:N", scale=theme.palette(nets), legend=dash)
    gated = [row for row in rows if row["muted"] is not None]
    width = SIDE if gated else WIDTH
    tips = [
        alt.Tooltip("net:N"),
        alt.Tooltip("epoch:Q"),
        alt.Tooltip("test_error:Q", format=".2%", title="test error"),
        alt.Tooltip("train_loss:Q", format=".4f", title="training loss"),
        alt.Tooltip("muted:Q", title="muted blocks"),
    ]
    worst = max(theme.numbers(rows, "test_error"), default=1)
    ticks = (0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1)
    # A square-root scale shows the last percents and still has a place for zero, unlike a logarithm.
    error = alt.Y(
        "test_error:Q",
        title="test error (square-root scale)",
        scale=alt.Scale(type="sqrt", domain=[0, min(1.0, 1.1 * worst + 0.01)], nice=False),
        axis=theme.percent_axis(values=[tick for tick in ticks if tick <= 1.1 * worst]),
    )
    panels = [_lines(rows, error, colour, "Test error", tips, width)]
    if gated:
        most = max(row["muted"] for row in gated)
        muted = alt.Y(
            "muted:Q",
            title="muted blocks (number)",
            scale=alt.Scale(domain=[0, max(most * 1.15, 1.15)], nice=False),
            axis=alt.Axis(tickMinStep=1, tickCount=6),
        )
        panels.append(_lines(gated, muted, colour, "Blocks muted by the gate", tips, width))
    finals = []
    ends = {net: max((row for row in rows if row["net"] == net), key=lambda row: row["epoch"]) for net in nets}
    for net, last in ends.items():
        muted_text = f" with {theme.plural(last['muted'], 'muted block')}" if last["muted"] is not None else ""
        if last["test_error"] is not None:
            finals.append(f"{net} {theme.percent(last['test_error'])}{muted_text}")
    title = f"Test error after the last epoch: {', '.join(finals)}"
    if len(finals) > 3:  # too many for one line
        known = {net: last["test_error"] for net, last in ends.items() if last["test_error"] is not None}
        low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        title = f"Test error at the end: {theme.percent(known[low])} ({low}) to {theme.percent(known[high])} ({high})"
    return theme.finish(alt.concat(*panels, columns=2, spacing=30), title)


def response(rows: list[dict[str, Any]]) -> Any:
    """Largest value each branch adds, against the threshold; muted blocks stand out."""
    rows = clean_rows("response", rows)
    positive = [value for value in theme.numbers(rows, "response") if value > 0]
    levels = positive + [value for value in theme.numbers(rows, "epsilon") if value > 0]
    # A logarithm has no zero: what is zero (or far below the rest) sits on the floor, as a triangle.
    floor = max(min(levels, default=1.0), max(levels, default=1.0) * 1e-8)
    floor = 10.0 ** -_decades(floor)
    top = max(levels, default=1.0) * 2
    shown = []
    for row in rows:
        if row["response"] is None:
            continue
        below = row["response"] < floor
        state = "muted" if row["muted"] else "open"
        shown.append(row | {"y": floor if below else row["response"], "state": state, "below": below})
    last = max(row["index"] for row in rows)
    x = alt.X(
        "index:Q",
        title="block, in the order of computation",
        scale=alt.Scale(domain=[-1, last + 1], nice=False),
        axis=alt.Axis(tickMinStep=1),
    )
    y = alt.Y(
        "y:Q",
        title="max |f| (log scale)",
        scale=alt.Scale(type="log", domain=[floor, top], nice=False, clamp=True),
        axis=theme.log_axis(tickCount=6),
    )
    tips = [
        alt.Tooltip("name:N", title="block"),
        alt.Tooltip("shortcut:N"),
        alt.Tooltip("response:Q", format=".4g", title="max |f|"),
        alt.Tooltip("epsilon:Q", format="~g", title="ε"),
        alt.Tooltip("state:N"),
    ]
    colour = alt.Color("state:N", scale=alt.Scale(domain=["open", "muted"], range=[BLUE, VERMILION]))
    kinds = [kind for kind in SHAPES if any(row["shortcut"] == kind for row in rows)]
    base = alt.Chart(theme.data(shown)).encode(x=x)
    # Lengths mean little on a log scale; only how far a muted block lies below the threshold is drawn.
    held = [row for row in shown if row["muted"] and row["epsilon"] and row["y"] < row["epsilon"]]
    stems = alt.Chart(theme.data(held)).mark_rule(strokeWidth=1, color=FAINT).encode(x=x, y=y, y2="epsilon:Q")
    dots = (
        base.transform_filter("!datum.below")
        .mark_point(filled=True, opacity=1, size=58)
        .encode(
            y=y,
            color=colour,
            tooltip=tips,
            shape=alt.Shape(
                "shortcut:N",
                scale=alt.Scale(domain=kinds, range=[SHAPES[kind] for kind in kinds]),
                legend=alt.Legend(symbolFillColor=SOFT, symbolStrokeColor=SOFT, labelExpr="datum.label + ' shortcut'"),
            ),
        )
    )
    lows = (
        base.transform_filter("datum.below")
        .mark_point(filled=True, opacity=1, size=70, shape="triangle-down")
        .encode(y=y, color=colour, tooltip=tips)
    )
    layers = ([stems] if held else []) + [dots, lows]
    for epsilon in theme.in_order(value for value in theme.numbers(rows, "epsilon") if value > 0):
        line = alt.Chart(theme.data([{"y": epsilon, "text": f"ε = {epsilon:g}"}])).encode(y=y)
        layers.append(line.mark_rule(strokeDash=[5, 4], color=INK))
        layers.append(line.mark_text(align="right", x="width", dy=-7, fontWeight=500).encode(text="text:N"))
    muted = sum(row["muted"] for row in rows)
    lost = len(rows) - len(shown)
    gone = f" {theme.plural(lost, 'block')} without a finite value left out." if lost else ""
    lowered = "; triangles: zero, or below the scale" if any(row["below"] for row in shown) else ""
    return theme.finish(
        alt.layer(*layers, width=WIDTH, height=250),
        f"{muted} of {theme.plural(len(rows), 'block')} muted at the end of training",
        f"Largest value that each branch adds, on any input seen{lowered}.{gone}",
    )


def _decades(value: float) -> int:
    """The power of ten just below ``value``, negated: 0.004 gives 3."""
    power = 0
    while 10.0**-power > value:
        power += 1
    return power
