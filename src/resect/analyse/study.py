"""What a lesion study found: every measurement, and what they come to."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from resect.analyse.interval import interval
from resect.analyse.subsets import GROUPS, Subset, downsamples
from resect.blocks.block import Blocks
from resect.errors import unknown

_BY = tuple(f"by {grouping}" for grouping in GROUPS)
STUDIES = ("each", "random", "runs", *_BY, "greedy", "pairs", "swaps", "paths", "ensembles")


@dataclass(frozen=True)
class Lesion:
    """One measurement: the metric with some blocks closed, or with some layers in other places."""

    closed: tuple[str, ...]
    value: float
    study: str = "each"
    """``each``, ``random``, ``runs``, ``by stage`` (part, layer, kind), ``greedy``, ``pairs``, ``swaps``, ``paths``
    or ``ensembles``."""
    k: int = 1
    """How many blocks are closed; of ``swaps``: pairs of layers swapped; of ``paths`` and ``ensembles``: branches
    that stay open."""
    label: str = ""
    """The block or group that is closed, or which layers stand where."""
    draw: int = 0
    tau: float | None = None
    """Kendall's τ between the order of the layers and the original one."""
    members: int = 1
    """How many sub-networks are averaged."""
    every: bool = False
    """Whether all that there are of this study and k were measured, so that their mean is no estimate."""

    @classmethod
    def of(cls, subset: Subset, value: float) -> Lesion:
        """Return the measurement of a subset."""
        return cls(
            subset.closed, value, subset.study, len(subset.closed), subset.label, subset.draw, every=subset.every
        )


@dataclass(frozen=True)
class LesionStudy:
    """What closing blocks does to a model.

    ``baseline`` is the metric of the whole model, ``lesions`` every measurement, in the order of the studies;
    ``print(study)`` shows what they come to, ``rows()`` is a flat table of all of them.
    """

    metric: str
    baseline: float
    lesions: tuple[Lesion, ...]
    blocks: Blocks = field(default_factory=lambda: Blocks(()), compare=False, repr=False)

    def of(self, study: str) -> tuple[Lesion, ...]:
        """Return the measurements of one study: ``study.of("greedy")``; none if it was not asked for."""
        if study not in STUDIES:
            raise unknown("study", study, STUDIES)
        return tuple(lesion for lesion in self.lesions if lesion.study == study)

    @property
    def each(self) -> tuple[Lesion, ...]:
        """Return one measurement per block, in order."""
        return self.of("each")

    @property
    def random(self) -> tuple[Lesion, ...]:
        """Return the measurements with k blocks closed at random."""
        return self.of("random")

    @property
    def scores(self) -> dict[str, float]:
        """Return per block how much the metric rises when it is closed: what ``rank`` sorts by."""
        return {lesion.closed[0]: lesion.value - self.baseline for lesion in self.each}

    def by_count(self, study: str = "random") -> list[dict[str, float]]:
        """Return per k and members of a study: draws, mean, and a 95 % interval of the mean (Student's t).

        Where ``every`` subset there is was measured the mean is known: ``low`` and ``high`` are the mean.
        """
        rows = []
        found = self.of(study)
        for k, members in sorted({(lesion.k, lesion.members) for lesion in found}):
            alike = [lesion for lesion in found if (lesion.k, lesion.members) == (k, members)]
            values = [lesion.value for lesion in alike]
            mean, every = statistics.fmean(values), all(lesion.every for lesion in alike)
            low, high = (mean, mean) if every else interval(values)
            rows.append(
                {"k": k, "members": members, "draws": len(values), "every": every, "mean": mean,
                 "low": low, "high": high}
            )  # fmt: skip
        return rows

    def interactions(self) -> list[dict[str, Any]]:
        """Return per pair of blocks Δ(i,j) − Δ(i) − Δ(j), where Δ is the change of the metric with them closed.

        Zero says that the two blocks do not depend on each other: closing both costs what closing each costs.
        Rows with ``one``, ``other``, ``both`` (Δ(i,j)), ``apart`` (Δ(i) + Δ(j)) and ``interaction``.
        """
        alone = self.scores
        rows = []
        for lesion in self.of("pairs"):
            one, other = lesion.closed
            both, apart = lesion.value - self.baseline, alone[one] + alone[other]
            rows.append({"one": one, "other": other, "both": both, "apart": apart, "interaction": both - apart})
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """Return every measurement as a plain dict, for files and tables: all that the figures are drawn from."""
        known = {block.name: block for block in self.blocks}
        rows = []
        for lesion in self.lesions:
            block = known.get(lesion.label) if lesion.study in ("each", "greedy") else None
            rows.append(
                {"study": lesion.study, "metric": self.metric}
                | asdict(lesion)
                | {"closed": " ".join(lesion.closed) or None, "label": lesion.label or None}
                | {"baseline": self.baseline, "change": lesion.value - self.baseline}
                | {column: getattr(block, column, None) for column in ("index", "stage", "part", "shortcut")}
            )
        return rows

    def __str__(self) -> str:
        lines = [f"{self.metric} of the whole model: {_said(self, self.baseline)}", *_each(self)]
        others = list(_others(self))
        return "\n".join([*lines, f"{self.metric} itself (not its change):", *others] if others else lines)


def _percent(study: LesionStudy) -> bool:
    return study.metric in ("top1", "top5")


def _said(study: LesionStudy, value: float) -> str:
    return f"{value:.4g}" + " %" * _percent(study)


def _each(study: LesionStudy) -> list[str]:
    if not study.each:
        return []
    down = {block.name for block in study.blocks if downsamples(block)}
    lines = (f"  {n:<32} {c:+.4g}{'  (downsampling)' if n in down else ''}" for n, c in study.scores.items())
    return [f"change with one block closed{' (points of %)' * _percent(study)}:", *lines]


def _others(study: LesionStudy) -> Iterable[str]:
    for row in study.by_count():
        yield f"  {row['k']:g} at random: {_said(study, row['mean'])}  {_span(study, row, 'subset')}"
    for row in study.by_count("runs"):
        worst = max((x for x in study.of("runs") if x.k == row["k"]), key=lambda lesion: lesion.value)
        most = _said(study, worst.value)
        yield f"  {row['k']:g} in a row: {_said(study, row['mean'])} on average, worst {most} from {worst.label}"
    for lesion in study.lesions:
        if lesion.study.startswith("by "):
            yield f"  {lesion.label}, {lesion.k} closed together: {_said(study, lesion.value)}"
    steps = study.of("greedy")
    if steps:
        yield "always closing the block that is missed least:"
        yield from (f"  {x.k:>3} closed, the last {x.label:<32} {_said(study, x.value)}" for x in steps)
    pairs = study.interactions()
    if pairs:
        yield from _pairs(pairs, " points" * _percent(study))
    for row in study.by_count("swaps"):
        tau = statistics.fmean(x.tau or 0 for x in study.of("swaps") if x.k == row["k"])
        swaps = f"{row['k']:g} swap{'s' * (row['k'] != 1)} of layers"
        yield f"  {swaps} (mean Kendall τ {tau:.3f}): {_said(study, row['mean'])}  {_span(study, row, 'order')}"
    for name, what in (("paths", "branches open"), ("ensembles", "branches open")):
        for row in study.by_count(name):
            team = f", {row['members']:g} sub-networks averaged" if name == "ensembles" else ", one sub-network"
            yield f"  {row['k']:g} {what}{team}: {_said(study, row['mean'])}  {_span(study, row, 'sub-network')}"


def _pairs(pairs: list[dict[str, Any]], unit: str) -> Iterable[str]:
    size = statistics.fmean(abs(row["interaction"]) for row in pairs)
    apart = statistics.fmean(abs(row["apart"]) for row in pairs)
    most = max(pairs, key=lambda row: abs(row["interaction"]))
    differs = f"differs from closing each, added up, by {size:.4g}{unit} on average,"
    strongest = f"{most['one']} and {most['other']}: {most['interaction']:+.4g}{unit}"
    yield f"{len(pairs)} pairs of blocks: closing both {differs}"
    yield f"  beside {apart:.4g}{unit} for the sum; most for {strongest}"


def _span(study: LesionStudy, row: dict[str, float], what: str) -> str:
    if row["every"]:
        return f"(all {row['draws']:g} {what}s)" if row["draws"] > 1 else f"(the only {what})"
    if row["draws"] < 2:
        return "(1 draw)"
    low, high = row["low"], row["high"]
    if _percent(study):  # of two or three draws, the interval may reach beyond what an error can be
        low, high = max(low, 0.0), min(high, 100.0)
    return f"(95 % of the mean: {low:.4g} … {high:.4g}, {row['draws']:g} draws)"
