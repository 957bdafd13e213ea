"""What single units respond to over the plane, and how alike the units of two blocks are."""

from __future__ import annotations

import base64
import io
import math
from typing import Any

import altair as alt
from PIL import Image

from resect.errors import InputError
from resect.report import theme
from resect.report.schema import clean_rows
from resect.report.theme import WIDTH

GAP = 26  # px between the panels of two nets
NEGATIVE, ZERO, POSITIVE = (0, 90, 160), (250, 250, 250), (213, 94, 0)  # blue, white, vermilion: see theme


def unit_maps(rows: list[dict[str, Any]]) -> Any:
    """A small picture of the plane for every unit: a panel per net, a line per block, a column per unit."""
    rows = clean_rows("unit_maps", rows)
    maps = _maps(rows)
    largest = max(abs(value) for lines in maps.values() for line in lines for value in line) or 1.0
    nets = theme.in_order(row["net"] for row in rows)
    units = len(theme.in_order(row["unit"] for row in rows))
    blocks = len(theme.in_order(row["block"] for row in rows))
    step = min(26.0, (WIDTH - GAP * (len(nets) - 1)) / len(nets) / units)
    pictures = [
        {"net": net, "block": block, "unit": unit, "map": _picture(lines, largest)}
        for (net, block, unit), lines in maps.items()
    ]
    panels = [
        alt.Chart(theme.data([picture for picture in pictures if picture["net"] == net]))
        .mark_image(width=step - 2, height=step - 2, smooth=True)
        .encode(
            x=alt.X("unit:O", title="unit", axis=alt.Axis(labelAngle=0, ticks=False, domain=False)),
            y=alt.Y("block:O", title="block" if net == nets[0] else None),
            url="map:N",
            tooltip=[alt.Tooltip("block:O"), alt.Tooltip("unit:O")],
        )
        .properties(width=step * units, height=step * blocks, title=theme.panel_title(net))
        for net in nets
    ]
    return theme.finish(
        alt.hconcat(*panels, spacing=GAP),  # not concat: the page may move and stretch the panels of that
        f"What the units of {theme.plural(blocks, 'block')} respond to, over the plane",
        f"Vermilion: positive, up to {largest:.2g}; blue: negative; white: zero. Each square is the same piece of the "
        "plane.",
    )


def _maps(rows: list[dict[str, Any]]) -> dict[tuple[str, int, int], list[list[float]]]:
    """The maps as lines of numbers from the top, by net, block and unit."""
    maps: dict[tuple[str, int, int], list[list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["line"]):
        try:
            line = [float(value) for value in row["responses"].split()]
        except ValueError:
            line = []
        if not line or not all(math.isfinite(value) for value in line):
            raise InputError(f"The rows of figure 'unit_maps': 'responses' is {row['responses']!r}, not numbers.")
        maps.setdefault((row["net"], row["block"], row["unit"]), []).append(line)
    if any(len(line) != len(lines[0]) for lines in maps.values() for line in lines):
        raise InputError("The rows of figure 'unit_maps': the lines of a map are not equally long.")
    return maps


def _picture(lines: list[list[float]], largest: float) -> str:
    """The map of a unit as a PNG, in a data address: a mark per point would make the page ten times as large."""
    image = Image.new("RGB", (len(lines[0]), len(lines)))
    image.putdata([_colour(value / largest) for line in lines for value in line])
    file = io.BytesIO()
    image.quantize(32).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _colour(share: float) -> tuple[int, int, int]:
    end = POSITIVE if share > 0 else NEGATIVE
    red, green, blue = (round(zero + abs(share) * (to - zero)) for zero, to in zip(ZERO, end, strict=True))
    return red, green, blue


def unit_similarity(rows: list[dict[str, Any]]) -> Any:
    """Block by block, a panel per net: how well the units of one block are found again in another."""
    rows = clean_rows("unit_similarity", rows)
    nets = theme.in_order(row["net"] for row in rows)
    side = min(240.0, (WIDTH - 24 - GAP * (len(nets) - 1)) / len(nets))
    blocks = sorted({row["block"] for row in rows} | {row["other"] for row in rows})
    ticks = [block for block in blocks if block == 1 or block % max(1, round(len(blocks) / 4)) == 0]
    low = min(row["similarity"] for row in rows)
    colour = alt.Color(
        "similarity:Q",
        scale=alt.Scale(scheme="viridis", domain=[int(10 * low) / 10, 1]),
        legend=alt.Legend(gradientLength=180, gradientThickness=10, format=".1f"),
    )
    axis = alt.Axis(values=ticks, labelAngle=0, ticks=False, domain=False, grid=False)
    panels = [
        alt.Chart(theme.data([row for row in rows if row["net"] == net]))
        .mark_rect()
        .encode(
            x=alt.X("other:O", title="found again in block", axis=axis, scale=alt.Scale(domain=blocks)),
            y=alt.Y("block:O", title="units of block" if net == nets[0] else None, axis=axis),
            color=colour,
            tooltip=[
                alt.Tooltip("block:O", title="units of block"),
                alt.Tooltip("other:O", title="found again in"),
                alt.Tooltip("similarity:Q", format=".2f"),
            ],
        )
        .properties(width=side, height=side, title=theme.panel_title(_heading(net, rows)))
        for net in nets
    ]
    return theme.finish(
        alt.hconcat(*panels, spacing=GAP),
        "How well the units of each block are found again in each other block",
        [
            "Mean over a block's units of the largest |correlation| with any unit of the other block.",
            "Number behind a name: mean over blocks that are not neighbours.",
        ],
    )


def _heading(net: str, rows: list[dict[str, Any]]) -> str:
    """``plain 0.74``: a net with the mean similarity of its blocks that are not neighbours."""
    values = [row["similarity"] for row in rows if row["net"] == net and abs(row["block"] - row["other"]) > 1]
    return f"{net} {sum(values) / len(values):.2f}" if values else net
