"""What a lesion study found, one figure per question; each works for any metric."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import altair as alt

from resect.report import theme
from resect.report.measure_axis import name_of, rise, said, spread, value_axis
from resect.report.schema import clean_rows
from resect.report.theme import BLUE, FAINT, SOFT, VERMILION, WIDTH

WAYS = {"greedy": "best first", "random": "at random", "runs": "every run of k neighbours: mean"}
IN_TITLE = WAYS | {"runs": "in a row"}
_ALL = ("greedy", "runs")


def _whole(rows: list[dict[str, Any]], y: alt.Y, left: bool = False) -> Any:
    """A dashed line at the value of the whole model, named at the end where the curves are not."""
    line = [{"value": rows[0]["baseline"], "text": "the whole model"}]
    base = alt.Chart(theme.data(line)).encode(y=y)
    place: dict[str, Any] = {"align": "left", "x": 0, "dx": 4} if left else {"align": "right", "x": "width", "dx": -4}
    text = base.mark_text(**place, dy=-7, color=SOFT).encode(text="text:N")
    return base.mark_rule(strokeDash=[4, 3], color=FAINT, strokeWidth=1.4) + text


def _means(rows: list[dict[str, Any]], by: Iterable[str]) -> list[dict[str, Any]]:
    """Mean and interval of the values of every group of rows."""
    columns = list(by)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[column] for column in columns), []).append(row)
    found = []
    for key, members in groups.items():
        mean, low, high = spread(
            [row["value"] for row in members], all(row.get("every") or row.get("study") in _ALL for row in members)
        )
        floor, top = min(row["value"] for row in members), max(row["value"] for row in members)
        # An interval of two draws may reach beyond anything measured; the picture need not.
        span = {"low": max(low, floor - (top - floor)), "high": min(high, top + (top - floor))}
        found.append(dict(zip(columns, key, strict=True)) | {"value": mean, "draws": len(members)} | span)
    return found


def _tip(metric: str, *more: Any) -> list[Any]:
    return [*more, alt.Tooltip("value:Q", format=".4g", title=name_of(metric))]


def lesion_parts(rows: list[dict[str, Any]]) -> Any:
    """What closing each block costs, in the order of computation, by what the branch is; means by part and stage."""
    rows = clean_rows("lesion_parts", rows)
    metric, baseline = rows[0]["metric"], rows[0]["baseline"]
    rows = [row | {"change": row["value"] - baseline} for row in rows]
    for row in rows:
        row["shape"] = "block" if row["shortcut"] in (None, "identity") else "downsampling block"
    parts = theme.in_order(row["part"] for row in rows)
    colour = alt.Color("part:N", scale=theme.palette(parts), sort=None)
    title = f"rise of {name_of(metric)}" + (" (points)" if metric in ("top1", "top5") else "")
    base = alt.Chart(theme.data(rows))
    ends = alt.Scale(domain=[-0.7, max(row["index"] for row in rows) + 0.7], nice=False)
    order = "closed block, in the order of computation"
    x = alt.X("index:Q", title=order, scale=ends, axis=alt.Axis(tickMinStep=1))
    shapes = alt.Scale(domain=["block", "downsampling block"], range=["circle", "diamond"])
    down = any(row["shape"] != "block" for row in rows)
    legend = alt.Legend(symbolFillColor=SOFT) if down else None
    tips = [alt.Tooltip("name:N", title="closed block"), alt.Tooltip("change:Q", format="+.4g", title=title)]
    y = alt.Y("change:Q", title=title)
    points = base.mark_point(filled=True, size=52, opacity=0.95).encode(
        x=x, y=y, color=colour, tooltip=tips, shape=alt.Shape("shape:N", scale=shapes, legend=legend)
    )
    stems = base.mark_rule(strokeWidth=1.6, opacity=0.5).encode(x=x, y=y, y2=alt.datum(0), color=colour)
    panels = [alt.layer(stems, points, width=WIDTH - 60, height=210)]
    bars: list[dict[str, Any]] = [
        {"group": label, "part": part, "value": statistics.fmean(values), "of": len(values)}
        for label, part, values in _groups(rows, parts)
    ]
    bar = alt.Chart(theme.data(bars)).encode(y=alt.Y("group:N", sort=None, title=None))
    numbers = [row | {"text": f"{rise(metric, row['value'])}  (mean of {row['of']})"} for row in bars]
    text = alt.Chart(theme.data(numbers)).encode(y=alt.Y("group:N", sort=None, title=None))
    across = alt.X("value:Q", title=f"mean {title}")
    drawn = bar.mark_bar(height={"band": 0.7}).encode(x=across, color=colour)
    labels = text.mark_text(align="left", dx=6, color=SOFT).encode(x=across, text="text:N")
    panels.append(alt.layer(drawn, labels, width=WIDTH - 240, height={"step": 22}))
    by_part = {part: statistics.fmean(r["change"] for r in rows if r["part"] == part) for part in parts}
    found = ", ".join(f"{part} {rise(metric, value)}" for part, value in by_part.items())
    return theme.finish(
        alt.vconcat(*panels, spacing=20),
        f"One block closed, on average: {found}",
        f"Change of the {name_of(metric)}, {said(metric, baseline)} in the whole model. Nothing is retrained.",
    )


def _groups(rows: list[dict[str, Any]], parts: list[str]) -> list[tuple[str, str, list[float]]]:
    """Per stage and part the changes; the downsampling blocks apart from the others."""
    groups: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        stage = f"stage {row['stage']:g}" if row["stage"] is not None else "all"
        what = row["part"] if row["shape"] == "block" else "downsampling"
        groups.setdefault((f"{stage}, {what}", row["part"]), []).append(row["change"])
    return [(label, part, values) for (label, part), values in groups.items()]


def lesion_many(rows: list[dict[str, Any]]) -> Any:
    """More and more blocks closed: in the best order that greed finds, at random, neighbours."""
    rows = clean_rows("lesion_many", rows)
    metric = rows[0]["metric"]
    rows = [row | {"way": WAYS.get(row["study"], row["study"])} for row in rows]
    ways = theme.in_order(row["way"] for row in rows)
    means = _means(rows, ("way", "k"))
    starts = [{"way": way, "k": 0, **dict.fromkeys(("value", "low", "high"), rows[0]["baseline"]), "draws": 1}
              for way in ways if all(row["k"] for row in rows if row["way"] == way)]  # fmt: skip
    means = sorted([*starts, *means], key=lambda row: row["k"])
    reach = [row[end] for row in means for end in ("low", "high")]
    y = value_axis(metric, reach)
    x = alt.X("k:Q", title="blocks closed (number)", axis=alt.Axis(tickMinStep=1, format="d"))
    legend = alt.Legend(labelLimit=300, symbolOpacity=1)
    colour = alt.Color("way:N", scale=theme.palette(ways), sort=None, legend=legend)
    base = alt.Chart(theme.data(means)).encode(x=x, color=colour)
    band = base.mark_area(opacity=0.16).encode(y=value_axis(metric, reach, "low:Q"), y2="high:Q")
    line = base.mark_line(strokeWidth=2).encode(y=y)
    tips = _tip(metric, "way:N", alt.Tooltip("k:Q", title="closed"), "draws:Q")
    points = base.mark_point(filled=True, size=34, opacity=1).encode(y=y, tooltip=tips)
    top = max(row["value"] for row in means)
    limit = rows[0]["baseline"] + (top - rows[0]["baseline"]) / 2
    studies = theme.in_order(row["study"] for row in rows)
    curves = {study: [row for row in means if row["way"] == WAYS.get(study, study)] for study in studies}
    notes = ["Best first: always the block missed least."] if "greedy" in studies else []
    if any(row["high"] > row["low"] for row in means):
        notes.append("Band: 95 % interval of the mean of the draws.")
    return theme.finish(
        alt.layer(_whole(rows, y), band, line, points, width=WIDTH, height=270),
        _passing(metric, limit, curves),
        " ".join(notes),
    )


def _passing(metric: str, limit: float, curves: dict[str, list[dict[str, Any]]]) -> str:
    """With how many blocks closed, of the numbers that were measured, each curve first is above the limit."""
    found: list[str] = []
    for study, curve in curves.items():
        first = next((row["k"] for row in curve if row["value"] > limit), None)
        way = IN_TITLE.get(study, study)
        if first is not None:
            found.append(f"with {first:g} {way}" if found else f"with {theme.plural(first, 'block')} closed {way}")
    if not found:
        return (
            f"The {name_of(metric)} does not rise with up to {max(r['k'] for c in curves.values() for r in c):g} closed"
        )
    return f"The {name_of(metric)} passes {said(metric, limit)} {', '.join(found)}"


def lesion_order(rows: list[dict[str, Any]]) -> Any:
    """The metric against how far the layers were reordered, as Kendall's τ: the paper's figure 5b."""
    rows = clean_rows("lesion_order", rows)
    metric = rows[0]["metric"]
    means = sorted(
        (row | {"tau": statistics.fmean(r["tau"] for r in rows if r["k"] == row["k"])} for row in _means(rows, ["k"])),
        key=lambda row: -row["tau"],
    )
    y = value_axis(metric, [row["value"] for row in rows] + [rows[0]["baseline"]])
    least = min(row["tau"] for row in rows)
    scale = alt.Scale(domain=[1.004, least - 0.02 * (1 - least) - 0.004], nice=False)
    x = alt.X("tau:Q", title="Kendall's τ between the new order and the original one (1: unchanged)", scale=scale)
    dots = alt.Chart(theme.data(rows)).mark_point(filled=True, size=20, color=BLUE, opacity=0.35)
    tips = _tip(metric, alt.Tooltip("k:Q", title="swaps"), alt.Tooltip("tau:Q", format=".3f"), "order:N")
    line = alt.Chart(theme.data(means)).encode(x=x, y=y)
    points = line.mark_point(filled=True, size=56, color=VERMILION, opacity=1)
    mean_tips = _tip(metric, alt.Tooltip("k:Q", title="swaps"), "draws:Q")
    together: dict[tuple[float, float], list[str]] = {}
    for row in means:  # numbers of swaps that come to one place, as they do where few layers can change places
        together.setdefault((row["tau"], row["value"]), []).append(f"{row['k']:g}")
    places = [{"tau": tau, "value": value, "text": ", ".join(ks)} for (tau, value), ks in together.items()]
    labels = alt.Chart(theme.data(places)).mark_text(dy=-12, color=SOFT).encode(x=x, y=y, text="text:N")
    first, last = means[0], means[-1]
    return theme.finish(
        alt.layer(
            _whole(rows, y),
            dots.encode(x=x, y=y, tooltip=tips),
            line.mark_line(color=VERMILION, strokeWidth=1.6),
            points.encode(tooltip=mean_tips),
            labels,
            width=WIDTH,
            height=280,
        ),
        f"{name_of(metric)[:1].upper()}{name_of(metric)[1:]} {said(metric, first['value'])} at τ = {first['tau']:.2f}, "
        f"{said(metric, last['value'])} at τ = {last['tau']:z.2f}",
        "Dots: pairs of layers swapped at random in a trained model; orange: the mean, with the number of swaps.",
    )


def lesion_pairs(rows: list[dict[str, Any]]) -> Any:
    """What closing two blocks costs beyond what closing each costs, for every pair."""
    rows = clean_rows("lesion_pairs", rows)
    metric = rows[0]["metric"]
    limit = max(abs(row["interaction"]) for row in rows) or 1.0
    mirrored = [*rows, *(row | {"one": row["other"], "other": row["one"]} for row in rows)]
    number = 1 + max(row["other"] for row in rows)
    colour = alt.Color(
        "interaction:Q",
        scale=alt.Scale(domain=[-limit, 0, limit], range=[BLUE, "#f7f7f7", VERMILION]),
        legend=alt.Legend(title=f"more than added up, {name_of(metric)}", gradientLength=220),
    )
    side = min(WIDTH - 140, max(240, 22 * number))
    axis = alt.Axis(ticks=False, domain=False, labelAngle=0, labelOverlap=True)
    chart = alt.Chart(theme.data(mirrored)).mark_rect().encode(
        x=alt.X("one:O", title="block", axis=axis),
        y=alt.Y("other:O", title="block", axis=axis),
        color=colour,
        tooltip=["one_name:N", "other_name:N", alt.Tooltip("both:Q", format="+.4g", title="closing both"),
                 alt.Tooltip("apart:Q", format="+.4g", title="closing each, added up"),
                 alt.Tooltip("interaction:Q", format="+.4g")],
    ).properties(width=side, height=side)  # fmt: skip
    size = statistics.fmean(abs(row["interaction"]) for row in rows)
    apart = statistics.fmean(abs(row["apart"]) for row in rows)
    most = max(rows, key=lambda row: abs(row["interaction"]))
    return theme.finish(
        chart,
        f"Closing two blocks differs from closing each, added up, by {rise(metric, size).lstrip('+')} on average",
        [
            f"Closing each of two, added up, changes it by {rise(metric, apart).lstrip('+')}. White: the two do not "
            "depend on each other.",
            f"The strongest: {most['one_name']} and {most['other_name']}, {rise(metric, most['interaction'])}.",
        ],
    )


def lesion_paths(rows: list[dict[str, Any]]) -> Any:
    """The metric of random sub-networks by the number of open branches, and of ensembles of them."""
    rows = clean_rows("lesion_paths", rows)
    metric = rows[0]["metric"]
    means = sorted(_means(rows, ("members", "k")), key=lambda row: (row["members"], row["k"]))
    sizes = sorted({row["members"] for row in means})
    names = {size: "one sub-network" if size == 1 else f"ensemble of {size:g}" for size in sizes}
    means = [row | {"team": names[row["members"]]} for row in means]
    reach = [row[end] for row in means for end in ("low", "high")] + [rows[0]["baseline"]]
    y = value_axis(metric, reach)
    x = alt.X("k:Q", title="branches left open (number), all others closed", axis=alt.Axis(tickMinStep=1))
    colour = alt.Color("team:N", scale=theme.palette(list(names.values())), sort=None)
    base = alt.Chart(theme.data(means)).encode(x=x, color=colour)
    single = alt.Chart(theme.data(row for row in means if row["members"] == 1)).encode(x=x)
    band = single.mark_area(color=BLUE, opacity=0.16).encode(y=value_axis(metric, reach, "low:Q"), y2="high:Q")
    tips = _tip(metric, "team:N", alt.Tooltip("k:Q", title="open branches"), "draws:Q")
    at = _widest(means)
    shown = [row for row in means if row["k"] == at]
    found = ", ".join(f"{row['team']} {said(metric, row['value'])}" for row in (shown[:1] + shown[1:][-1:]))
    return theme.finish(
        alt.layer(
            _whole(rows, y, left=True), band, base.mark_line(strokeWidth=2).encode(y=y),
            base.mark_point(filled=True, size=40, opacity=1).encode(y=y, tooltip=tips), width=WIDTH, height=270,
        ),
        f"With {at:g} branches open: {found}",
        "Sub-networks drawn at random; an ensemble averages their probabilities. Band: 95 % interval of the mean.",
    )  # fmt: skip


def _widest(means: list[dict[str, Any]]) -> float:
    """The length at which sub-networks and ensembles differ most."""
    gaps = {}
    for k in theme.in_order(row["k"] for row in means):
        values = [row["value"] for row in means if row["k"] == k]
        gaps[k] = max(values) - min(values)
    return max(gaps, key=lambda k: (gaps[k], k))
