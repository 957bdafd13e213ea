"""What a metric is called on an axis and in a title."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from resect.analyse.interval import interval

_TITLES = {
    "top1": "top-1 error (%)",
    "top5": "top-5 error (%)",
    "cross_entropy": "cross-entropy (nats)",
    "perplexity": "perplexity",
}


def title_of(metric: str) -> str:
    """``top-1 error (%)``; a metric of one's own by its own name."""
    return _TITLES.get(metric, metric)


def name_of(metric: str) -> str:
    """``top-1 error``: the metric without its unit."""
    return title_of(metric).partition(" (")[0]


def is_error(metric: str) -> bool:
    """Whether the metric is an error in %."""
    return metric in ("top1", "top5")


def said(metric: str, value: float) -> str:
    """``12.3 %`` of an error, ``2.31`` of anything else."""
    return f"{value:.1f} %" if is_error(metric) else f"{value:.3g}"


def rise(metric: str, change: float) -> str:
    """``+3.2 points`` of an error, ``+0.31`` of anything else."""
    text = f"{change:+.1f} points" if is_error(metric) else f"{change:+.3g}"
    return text.replace("-", "−")


def value_axis(metric: str, values: Sequence[float], column: str = "value:Q") -> alt.Y:
    """The axis of a metric: errors from zero, anything else around what there is."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = 0.0 if is_error(metric) else low - room
    top = min(100.0, high + room) if is_error(metric) else high + room
    scale = alt.Scale(domain=[bottom, max(top, bottom + 1e-9)], nice=False)
    return alt.Y(column, title=title_of(metric), scale=scale, axis=alt.Axis(tickCount=5))


def spread(values: Sequence[float], every: bool = False) -> tuple[float, float, float]:
    """Mean of the draws and the 95 % interval of that mean (Student's t); nothing but the mean for a single draw.

    Nor where ``every`` value that there is was measured: the mean is no estimate then.
    """
    mean = sum(values) / len(values)
    return (mean, mean, mean) if every or len(values) < 2 else (mean, *interval(values))
