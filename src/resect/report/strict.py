"""How near each branch is to adding nothing: its largest responses against ε, and how often the gate would close."""

from __future__ import annotations

from typing import Any

import altair as alt

from resect.report import theme
from resect.report.reuse import depth_axis
from resect.report.schema import clean_rows
from resect.report.theme import INK, SERIES, VERMILION, WIDTH

SPAN = ((0.05, 0.95), (0.25, 0.75))  # quantiles that the thin and the thick part of a box reach


def strict_identity(rows: list[dict[str, Any]]) -> Any:
    """Per block the spread of max|f| over the samples, against ε."""
    rows = clean_rows("strict_identity", rows)
    nets = theme.in_order(row["net"] for row in rows)
    positive = [value for value in theme.numbers(rows, "response") if value > 0]
    epsilons = theme.in_order(value for value in theme.numbers(rows, "epsilon") if value > 0)
    levels = [*positive, *epsilons, *([] if positive or epsilons else [1.0])]
    # A logarithm has no zero: what is zero, or far below the rest, sits on the floor.
    floor = 0.7 * max(min(levels), max(levels) * 1e-6)
    scale = alt.Scale(type="log", domain=[floor, 1.5 * max(levels)], nice=False, clamp=True)
    low = " On the floor: zero, or nearly." if any((row["response"] or 0) < floor for row in rows) else ""
    panels = [_boxes([row for row in rows if row["net"] == net], net, scale, floor, epsilons, nets) for net in nets]
    title = "The largest value each branch adds, over the samples"
    if epsilons:
        worst = {(row["net"], row["index"]): 0.0 for row in rows}
        for row in rows:
            key = row["net"], row["index"]
            worst[key] = max(worst[key], row["response"] if row["response"] is not None else float("inf"))
        below = sum(value <= epsilons[0] for value in worst.values())
        title = f"{below} of {theme.plural(len(worst), 'block')} stay within ε = {epsilons[0]:g} on every sample"
    return theme.finish(
        alt.vconcat(*panels, spacing=16),
        title,
        f"Tick: median of max |f| over samples; thick: middle half; thin: 5 to 95 %; dot: the largest of all.{low}",
    )


def _boxes(
    rows: list[dict[str, Any]], net: str, scale: alt.Scale, floor: float, epsilons: list[float], nets: list[str]
) -> Any:
    blocks: dict[int, dict[str, Any]] = {}
    for row in rows:
        box = blocks.setdefault(row["index"], {"index": row["index"], "name": row["name"]})
        box[f"q{round(100 * row['quantile'])}"] = max(row["response"] or 0.0, floor)
    y = alt.Y("q50:Q", title="max |f| (log scale)", scale=scale, axis=theme.log_axis(tickCount=5))
    x = depth_axis(rows, "index", "block, in the order of computation", net == nets[-1])
    colour = SERIES[nets.index(net) % len(SERIES)]
    base = alt.Chart(theme.data(blocks.values())).encode(x=x)
    tips = [alt.Tooltip("name:N", title="block"), *(alt.Tooltip(f"q{q}:Q", format=".3g") for q in (0, 5, 50, 95, 100))]
    layers = []
    for (low, high), width in zip(SPAN, (1.2, 5), strict=True):
        ends = f"q{round(100 * low)}:Q", f"q{round(100 * high)}:Q"
        layers.append(
            base.mark_rule(strokeWidth=width, color=colour, opacity=0.55).encode(
                y=alt.Y(ends[0], scale=scale), y2=ends[1]
            )
        )
    layers.append(base.mark_tick(thickness=2, size=9, color=INK, orient="horizontal").encode(y=y, tooltip=tips))
    layers.append(base.mark_point(filled=True, size=18, color=colour, opacity=1).encode(y=alt.Y("q100:Q", scale=scale)))
    for epsilon in epsilons:
        line = alt.Chart(theme.data([{"q50": epsilon, "text": f"ε = {epsilon:g}"}])).encode(y=y)
        layers.append(line.mark_rule(strokeDash=[5, 4], color=VERMILION))
        layers.append(line.mark_text(align="right", x="width", dy=-7, fontWeight=500).encode(text="text:N"))
    return alt.layer(*layers, width=WIDTH, height=190, title=theme.panel_title(net))


def gate_closed(rows: list[dict[str, Any]]) -> Any:
    """Share of batches on which each block's gate would be closed, by batch size."""
    rows = clean_rows("gate_closed", rows)
    nets = theme.in_order(row["net"] for row in rows)
    sizes = sorted({row["batch"] for row in rows})
    for row in rows:
        row["size"] = f"batches of {row['batch']}"
    colour = alt.Color(
        "size:N",
        scale=theme.palette([f"batches of {size}" for size in sizes]),
        legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=3, symbolOpacity=1),
    )
    y = alt.Y(
        "closed:Q",
        title="batches on which it is closed",
        scale=alt.Scale(domain=[-0.03, 1.03], nice=False),
        axis=theme.percent_axis(tickCount=6),
    )
    tips = [
        alt.Tooltip("name:N", title="block"),
        alt.Tooltip("batch:Q", title="samples in a batch"),
        alt.Tooltip("closed:Q", format=".1%"),
    ]
    panels = []
    for net in nets:
        own = [row for row in rows if row["net"] == net]
        base = alt.Chart(theme.data(own)).encode(
            x=depth_axis(own, "index", "block, in the order of computation", net == nets[-1]), y=y, color=colour
        )
        panels.append(
            alt.layer(
                base.mark_line(strokeWidth=1.6),
                base.mark_point(filled=True, size=34, opacity=1).encode(tooltip=tips),
                width=WIDTH,
                height=190,
                title=theme.panel_title(net),
            )
        )
    ends = [
        sum(row["closed"] for row in rows if row["batch"] == size) / sum(row["batch"] == size for row in rows)
        for size in (sizes[0], sizes[-1])
    ]
    return theme.finish(
        alt.vconcat(*panels, spacing=16),
        f"A gate at ε = {rows[0]['epsilon']:g} is closed on {theme.percent(ends[0])} of batches of {sizes[0]}"
        + (f", on {theme.percent(ends[1])} of batches of {sizes[-1]}" if len(sizes) > 1 else ""),
        "Mean over blocks. The larger the batch, the likelier one of its samples opens the gate.",
    )
