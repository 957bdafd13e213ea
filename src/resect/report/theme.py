"""How every figure looks: colours that colour-blind readers can tell apart, type, sizes, shared helpers."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

WIDTH = 640  # of the plotting area in px; with the axes a figure is about 720 px wide

# After Okabe and Ito; told apart under protanopia, deuteranopia and tritanopia.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#00936C", "#A6518A"
SKY, AMBER = "#56B4E9", "#E69F00"
INK, SOFT, FAINT, RULE = "#1f2937", "#5b6472", "#aeb6c2", "#e4e7ec"
SERIES = [BLUE, VERMILION, GREEN, PURPLE, AMBER, SKY]

# vl-convert brings Liberation Sans along, which has Arial's measures: PNG files need no installed fonts.
FONT = "'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"

CONFIG: dict[str, Any] = {
    "aria": False,  # the page describes a figure as a whole; a label per mark doubles the size of the SVG
    "font": FONT,
    "background": "#ffffff",
    "padding": 12,
    "view": {"stroke": None},
    "concat": {"spacing": 28},
    "title": {
        "anchor": "start",
        "fontSize": 15,
        "fontWeight": 600,
        "color": INK,
        "offset": 14,
        "subtitleFontSize": 12,
        "subtitleColor": SOFT,
        "subtitlePadding": 5,
        "subtitleLineHeight": 16,
    },
    "axis": {
        "labelColor": SOFT,
        "labelFontSize": 11,
        "titleColor": SOFT,
        "titleFontSize": 11.5,
        "titleFontWeight": 400,
        "titlePadding": 8,
        "gridColor": RULE,
        "domainColor": FAINT,
        "tickColor": FAINT,
        "tickSize": 4,
    },
    "axisX": {"grid": False},
    "axisY": {"domain": False, "ticks": False},
    "legend": {
        "orient": "top",
        "title": None,
        "labelColor": INK,
        "labelFontSize": 11.5,
        "symbolSize": 80,
        "padding": 0,
        "offset": 8,
        "columnPadding": 18,
        "labelLimit": 280,
    },
    "text": {"color": INK, "fontSize": 11.5},
}


def data(rows: Iterable[dict[str, Any]]) -> alt.Data:
    """``rows`` as the inline data of a chart.

    As a JSON text: altair copies and checks a list of rows again at every step, which took most of the time.
    """
    text = json.dumps(list(rows), ensure_ascii=False, allow_nan=False)
    return alt.Data(values=text, format=alt.JsonDataFormat(type="json"))


def panel_title(text: str, colour: str = SOFT, offset: int = 6) -> alt.Title:
    """The title of one panel of a figure."""
    return alt.Title(text, fontSize=12.5, fontWeight=500, color=colour, offset=offset)


def finish(chart: Any, title: str, subtitle: str | Sequence[str] = "") -> Any:
    """Give a chart its title, which says what is to be seen, and the common look."""
    lines = [subtitle] if isinstance(subtitle, str) else list(subtitle)
    text = alt.Title(title, subtitle=lines) if any(lines) else alt.Title(title)
    # Set in place: properties() and configure() would each copy the whole chart.
    chart.title, chart.config = text, CONFIG
    return chart


def signed(chart: Any, of: str) -> Any:
    """Add to a finished chart a last line that says of what it is."""
    if of:
        above = chart.title.subtitle if isinstance(chart.title.subtitle, list) else []
        chart.title.subtitle = [*above, of]
    return chart


def percent_axis(**options: Any) -> alt.Axis:
    """An axis for fractions, labelled in percent just as ``percent`` writes it."""
    return alt.Axis(labelExpr="format(100 * datum.value, '~r') + ' %'", **options)


def log_axis(**options: Any) -> alt.Axis:
    """An axis for logarithmic scales: 0.01, 1 and 100 in full, 1e-6 in short."""
    near = "datum.value >= 0.001 && datum.value < 1e5"
    return alt.Axis(labelExpr=f"{near} ? format(datum.value, '~g') : format(datum.value, '~e')", **options)


def percent(fraction: float) -> str:
    """``0.0213`` as ``2.1 %``."""
    return f"{100 * fraction:.1f} %"


def count(number: float) -> str:
    """``23508032`` as ``23.5 M``: a number of parameters for people."""
    for size, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.0f}"


def plural(number: int, noun: str, many: str | None = None) -> str:
    """``1 block``, ``2 blocks``; ``many``: the plural of a noun that takes no s."""
    return f"{number:,} {noun if number == 1 else many or noun + 's'}"


def in_order(values: Iterable[Any]) -> list[Any]:
    """The distinct values, in the order in which they appear."""
    return list(dict.fromkeys(values))


def numbers(rows: Iterable[dict[str, Any]], column: str) -> list[float]:
    """The values of a column that are there."""
    return [row[column] for row in rows if row[column] is not None]


def palette(names: Sequence[str], colours: Sequence[str] = tuple(SERIES)) -> alt.Scale:
    """A colour scale for these names; colours repeat only after the last."""
    return alt.Scale(domain=list(names), range=[colours[i % len(colours)] for i in range(len(names))])
