"""The spiral's results: rows for the two figures, a table over seeds, and what the report says of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from resect.analyse.likeness import similarity, summary
from resect.lab.spiral import UNTRAINED, Setting, fresh_error, train_all
from resect.lab.units import grid, unit_maps
from resect.report.html import Section

Row = dict[str, Any]
Nets = Mapping[str, nn.Module]

FINE, COARSE = 48, 24
"""Points along each side of a map: for similarities, and for the figure, whose file would be large otherwise."""


def spiral_rows(seed: int = 0, setting: Setting | None = None) -> tuple[dict[str, list[Row]], list[Row]]:
    """Train the nets of one seed; return the rows of the figures by name, and the table."""
    setting = setting or Setting()
    nets = train_all(setting, seed)
    return figure_rows(nets), table_rows(measure({seed: nets}, setting))


def figure_rows(nets: Nets, *, every: int = 4) -> dict[str, list[Row]]:
    """Return the rows of ``unit_maps``, every fourth block of the trained nets, and of ``unit_similarity``."""
    maps, matrices = [], []
    for name, net in nets.items():
        matrix = similarity(unit_maps(net, grid(FINE))).tolist()
        matrices += [
            {"net": name, "block": i, "other": j, "similarity": round(value, 4)}
            for i, line in enumerate(matrix, start=1)
            for j, value in enumerate(line, start=1)
        ]
        if name != UNTRAINED:
            maps += [
                {"net": name, "block": block, "unit": unit, "line": line,
                 "responses": " ".join(f"{value:.2f}" for value in points)}
                for block, units in enumerate(unit_maps(net, grid(COARSE)), start=1) if block % every == 0
                for unit, plane in enumerate(units, start=1)
                for line, points in enumerate(plane.view(COARSE, COARSE).tolist())
            ]  # fmt: skip
    return {"unit_maps": maps, "unit_similarity": matrices}


def measure(runs: Mapping[int, Nets], setting: Setting) -> list[Row]:
    """Return a row per seed and net: test error, similarity of adjacent and of other blocks, where the likest stands.

    ``another net``: the same as ``other blocks``, with the blocks of the next seed's net: alike without reuse.
    """
    points, rows = grid(FINE), []
    maps = {seed: {name: unit_maps(net, points) for name, net in nets.items()} for seed, nets in runs.items()}
    following = dict(zip(maps, [*list(maps)[1:], *list(maps)[:1]], strict=True))
    for seed, nets in runs.items():
        for name, net in nets.items():
            own = summary(similarity(maps[seed][name]))
            row = {"net": name, "seed": seed, "test error (%)": 100 * fresh_error(net, setting, seed),
                   "adjacent blocks": own["adjacent"], "other blocks": own["others"]}  # fmt: skip
            if len(runs) > 1:
                row["another net"] = summary(similarity(maps[seed][name], maps[following[seed]][name]))["others"]
            rows.append(row | {"likest elsewhere (%)": 100 * own["elsewhere"]})
    return rows


def table_rows(measured: Sequence[Row]) -> list[Row]:
    """Return a row per net: the mean over the seeds, and, of several, ``±`` the standard deviation as text."""
    rows = []
    for name in dict.fromkeys(row["net"] for row in measured):
        own = [row for row in measured if row["net"] == name]
        columns = [column for column in own[0] if column not in ("net", "seed")]
        rows.append({"net": name} | {column: _spread(column, [row[column] for row in own]) for column in columns})
    return rows


def _spread(column: str, values: Sequence[float]) -> float | str:
    digits = 1 if column.endswith("(%)") else 2
    if len(values) == 1:
        return round(values[0], digits)
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def sections(table: Sequence[Row]) -> list[Section]:
    """Return the part of a report about the spiral; its figures are those of ``figure_rows``."""
    return [
        Section(
            "What single units respond to",
            "A net of 32 residual blocks of 8 units each learned to tell the two arms of a spiral apart, three times "
            "from the same weights and for as many steps: plainly, with stochastic depth, and with ResidualDroppath "
            "(our interpretation of its abstract). An experiment of our own, after a second-hand description of that "
            "paper; it reproduces nothing.",
            figure="unit_maps",
        ),
        Section(
            "Which blocks say the same again",
            "Feature reuse, if blocks keep what others found, leaves units that respond alike. Adjacent blocks are "
            "compared with blocks further apart. The untrained net says how alike units are without any learning.",
            figure="unit_similarity",
            table=table,
            note="Similar units far apart are no proof of reuse: nets trained apart learn similar features too. "
            "`docs/examples/feature-reuse.md` compares with those, over five seeds.",
        ),
    ]
