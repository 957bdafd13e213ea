"""For every number of units the set that goes; and from it, by what a user wants, a plan."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.example import Forward, forward_batch
from resect.blocks.measure import Progress, measure_closed
from resect.blocks.metrics import Metric, metric_label
from resect.blocks.plan import Plan
from resect.errors import InputError, quoted
from resect.shrink.costs import QUANTITIES, BlockCosts, check_shares
from resect.shrink.search import in_order
from resect.shrink.streams import SCORES, unbroken

CONTROLS = ("random", "last")
"""Orders that ask neither the model nor the data: what every other score is to beat."""


@dataclass(frozen=True)
class Rung:
    """A set of units, and the metric of the model without it, where that was measured."""

    units: tuple[str, ...]
    value: float | None = None


@dataclass(frozen=True)
class Ranking:
    """Units with a score each, and a ladder: which of them go, for every number of them.

    ``print(ranking)`` shows it; ``choose`` takes a rung.
    """

    blocks: Blocks
    by: str
    scores: Mapping[str, float]
    """Of each unit, where nothing else is gone: the lowest is missed least."""
    units: Mapping[str, tuple[str, ...]]
    """The names of the blocks of each unit: of a block its own."""
    ladder: tuple[Rung, ...]
    search: str = "once"
    unit: str = "block"
    metric: str = ""
    """What ``value`` of the rungs and ``baseline`` are."""
    baseline: float | None = None
    """The metric of the whole model, where it was measured."""
    costs: BlockCosts | None = None

    @property
    def order(self) -> list[str]:
        """Return the units by their scores alone, the least missed first; ties go to the later one."""
        names = list(self.scores)
        return [names[place] for place in in_order(list(self.scores.values()), lambda _: 1.0)]

    def names(self, units: Iterable[str]) -> list[str]:
        """Return the names of the blocks of some units, in order."""
        wanted = {name for unit in units for name in self.units[unit]}
        return [name for name in self.blocks.names if name in wanted]

    def measure(
        self,
        model: nn.Module,
        data: Iterable[Any],
        *,
        metric: str | Metric = "top1",
        forward: Forward = forward_batch,
        progress: Progress | None = None,
    ) -> Ranking:
        """Return the ranking with the metric of every rung, measured: one measurement each.

        Parameters as of ``rank``; ``choose(at_most_worse=…)`` needs it unless the search has measured every rung.
        """
        sets = [tuple(self.names(rung.units)) for rung in self.ladder]
        whole, values = measure_closed(model, self.blocks, data, sets, metric, forward, progress)
        ladder = tuple(replace(rung, value=value) for rung, value in zip(self.ladder, values, strict=True))
        return replace(self, ladder=ladder, baseline=whole, metric=metric_label(metric))

    def choose(
        self,
        n: int | None = None,
        *,
        fewer: Mapping[str, float] | None = None,
        at_most_worse: float | None = None,
        keep: str | Iterable[str] = (),
        costs: BlockCosts | None = None,
    ) -> Plan:
        """Return a plan: of the rungs that meet every wish, the shortest; with ``at_most_worse`` alone, the longest.

        Parameters
        ----------
        n: how many units go.
        fewer: the share, above 0 and below 1, that must go at least: ``{"latency": 0.3, "flops": 0.3}``; of latency at
            every batch size of the costs. Where everything was scored once, the units that then go first are those
            missed least per share saved.
        at_most_worse: by how much the metric of the cut model may be above that of the whole one, in its own units
            (points of % for top1). Every rung must have been measured: by ``search="greedy"`` or ``"beam"`` with
            ``by="lesion"``, or by ``measure``.
        keep: blocks, or units, that must not go.
        costs: from ``block_costs``; by default those the ranking was made with.

        Raises ``InputError`` for wishes that cannot be met, with the nearest that can, and for unknown names.
        """
        costs = costs or self.costs
        self._check(n, fewer, at_most_worse, costs)
        fewer = dict(fewer or {})
        chosen = self._by_cost(costs, fewer) if fewer and costs else self
        ladder = chosen._without(self._kept(keep))
        if n is not None:
            ladder = self._of_size(ladder, n)
        if at_most_worse is not None and any(rung.value is None for rung in ladder):
            raise InputError(
                f"at_most_worse={at_most_worse:g}: not every set on this ladder was measured. Call "
                "ranking.measure(model, data, metric=…) first, or rank with search='greedy'; with keep= or fewer= that "
                "change the order, leave those blocks out of rank(), or give costs= to rank()."
            )
        light = [rung for rung in ladder if all(self._saved(rung, q, costs) >= s - 1e-9 for q, s in fewer.items())]
        good = [rung for rung in light if at_most_worse is None or self._rise(rung) <= at_most_worse + 1e-9]
        if not good:
            raise InputError(self._nearest(ladder, light, fewer, at_most_worse, costs))
        return self._plan(good[0] if n is not None or fewer else good[-1], costs)

    def _check(self, n: Any, fewer: Any, worse: Any, costs: BlockCosts | None) -> None:
        if n is None and fewer is None and worse is None:
            raise InputError("choose() needs n=, fewer= or at_most_worse=: how much shall go?")
        most = len(self.scores)
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or not 0 < n <= most):
            raise InputError(f"choose(n={n!r}): n must be a whole number from 1 to {most}, the {self.unit}s ranked.")
        if fewer is not None:
            check_shares(fewer)
        if worse is not None and (isinstance(worse, bool) or not isinstance(worse, (int, float)) or not worse >= 0):
            raise InputError(f"at_most_worse must be a number from 0 up, in units of the metric, not {worse!r}.")
        if fewer and costs is None:
            raise InputError(
                "fewer= needs to know what blocks cost: pass costs=resect.block_costs(model, blocks, example)."
            )

    def _kept(self, keep: str | Iterable[str]) -> set[str]:
        """The units that must stay, by their own names or those of their blocks."""
        kept = {name for key in ([keep] if isinstance(keep, str) else keep) for name in meant(self.blocks, key)}
        return {unit for unit, names in self.units.items() if kept & set(names)}

    def _without(self, kept: set[str]) -> tuple[Rung, ...]:
        """The ladder without what must stay; a rung that this changes was not measured."""
        if not kept:
            return self.ladder
        if all(set(a.units) < set(b.units) for a, b in pairwise(self.ladder)):  # each holds the one before
            rungs = {tuple(unit for unit in rung.units if unit not in kept): rung for rung in reversed(self.ladder)}
            ladder = tuple(r if r.units == u else Rung(u) for u, r in reversed(rungs.items()) if u)
        else:
            ladder = tuple(rung for rung in self.ladder if not kept & set(rung.units))
        if not ladder:
            raise InputError(f"Nothing is left to go: keep= holds {quoted(kept, 4)}, and every set needs some of it.")
        return ladder

    def _of_size(self, ladder: tuple[Rung, ...], n: int) -> tuple[Rung, ...]:
        found = tuple(rung for rung in ladder if len(rung.units) == n)
        if not found:
            near = min((len(rung.units) for rung in ladder), key=lambda size: abs(size - n))
            raise InputError(
                f"There is no set of {n} {self.unit}s on this ladder{self._why_none(n)}. The nearest has {near}: "
                f"choose(n={near})."
            )
        return found

    def _why_none(self, n: int) -> str:
        """Say why the ladder has no set of this size."""
        if any(len(rung.units) == n for rung in self.ladder):
            return ": keep= holds some of each that there was"
        units = list(self.units)
        runs = (self.names(units[start : start + n]) for start in range(len(units) - n + 1))
        if self.search == "runs" and self.by in SCORES and not any(unbroken(self.blocks, tuple(run)) for run in runs):
            inside = f"another shortcut inside, across which by={self.by!r} cannot look"
            return f": no run of {n} neighbours is without {inside}"
        return f": rank() was called with depth={max(len(rung.units) for rung in self.ladder)}"

    def _by_cost(self, costs: BlockCosts, fewer: Collection[str]) -> Ranking:
        """The ladder by score per share saved, where units were scored once and without costs."""
        if self.search != "once" or self.costs is not None or self.by in CONTROLS:
            return self
        units = list(self.scores)

        def gain(places: tuple[int, ...]) -> float:
            names = [name for place in places for name in self.units[units[place]]]
            return sum(costs.gain(names) if q == "latency" else costs.saved(q, names) for q in fewer) / len(fewer)

        order = [units[place] for place in in_order(list(self.scores.values()), gain)]
        values = {frozenset(rung.units): rung.value for rung in self.ladder}
        sets = [tuple(order[: n + 1]) for n in range(len(self.ladder))]
        return replace(self, ladder=tuple(Rung(units, values.get(frozenset(units))) for units in sets))

    def _saved(self, rung: Rung, quantity: str, costs: BlockCosts | None) -> float:
        assert costs is not None
        return costs.saved(quantity, self.names(rung.units))

    def _rise(self, rung: Rung) -> float:
        assert rung.value is not None
        assert self.baseline is not None
        return rung.value - self.baseline

    def _nearest(
        self, ladder: tuple[Rung, ...], light: list[Rung], fewer: dict[str, float], worse: float | None, costs: Any
    ) -> str:
        """Say what cannot be reached, and the nearest that can."""
        wanted = [f"{share:.0%} less {quantity}" for quantity, share in fewer.items()]
        wanted += [] if worse is None else [f"at most {worse:g} worse"]
        offers = []
        if worse is not None:
            mild = [rung for rung in ladder if self._rise(rung) <= worse + 1e-9]
            offers += [f"at most {worse:g} worse: {self._said(mild[-1], fewer, costs)}"] if mild else []
            closest = min(light or ladder, key=self._rise)
            where = "of those light enough, " * bool(light and fewer)
            offers += [f"{where}the least worse: {self._said(closest, fewer, costs)}"]
        else:
            most = max(ladder, key=lambda r: min(self._saved(r, q, costs) / s for q, s in fewer.items()))
            offers += [f"the most that can go: {self._said(most, fewer, costs)}"]
        return f"Out of reach: {', '.join(wanted)}. The nearest: {'; '.join(offers)}."

    def _said(self, rung: Rung, fewer: Iterable[str], costs: Any) -> str:
        parts = [f"{self._saved(rung, quantity, costs):.1%} less {quantity}" for quantity in fewer]
        parts += [] if rung.value is None else [f"{self._rise(rung):+.4g} {self.metric}"]
        return f"n={len(rung.units)} with {', '.join(parts)}"

    def _plan(self, rung: Rung, costs: BlockCosts | None) -> Plan:
        names = self.names(rung.units)
        evidence: dict[str, Any] = {"search": self.search, "unit": self.unit, "units": list(rung.units)}
        if rung.value is not None:
            evidence |= {"metric": self.metric, "baseline": self.baseline, "value": rung.value}
        if costs is not None:
            quantities = [quantity for quantity in QUANTITIES if quantity != "latency" or costs.latencies]
            evidence["saved"] = {quantity: costs.saved(quantity, names) for quantity in quantities}
            evidence["latency_ms"] = {
                str(b): {"whole": [*costs.latency((), b)], "cut": [*costs.latency(names, b)]} for b in costs.latencies
            }
        scored = {} if self.by in CONTROLS else self.scores  # an order without reasons
        scores = {name: score for unit, score in scored.items() for name in self.units[unit]}
        blocks = self.blocks.select(names)
        return Plan(tuple(blocks), self.by, scores, evidence, blocks.model, blocks.whole)

    def __str__(self) -> str:
        costs = f", per {'ms' if self.costs.latencies else 'FLOP'} saved" if self.costs else ""
        head = f"{len(self.scores)} {self.unit}s by {self.by}{costs}, search: {self.search}"
        head += f"; {self.metric} of the whole model: {self.baseline:.4g}" if self.baseline is not None else ""
        lines, before, shown = [head], frozenset[str](), self.by not in CONTROLS
        for rung in self.ladder:
            now = frozenset(rung.units)
            new = [unit for unit in self.scores if unit in now - before]
            text = (
                f"+ {quoted_plain(new)}"
                if before < now and before
                else quoted_plain(new if before < now else rung.units)
            )
            score = f"{self.scores[new[0]]:+.4g}" if shown and before < now and len(new) == 1 else ""
            value = f"  {self.metric} {rung.value:.4g}" if rung.value is not None else ""
            lines.append(f"  {len(now):>3}  {text:<40} {score:>10}{value}".rstrip())
            before = now
        return "\n".join(lines)


def quoted_plain(names: Collection[str]) -> str:
    """``a, b``, or ``a … z (5)`` of many."""
    items = list(names)
    return ", ".join(items) if len(items) < 4 else f"{items[0]} … {items[-1]} ({len(items)})"


def meant(blocks: Blocks, name: str) -> list[str]:
    """Return the names of the blocks that a name means: one block, or all of a layer or an owner."""
    layer = blocks.layers().get(name)
    return layer.names if layer else [b.name for b in blocks if b.owner == name] or [blocks[name].name]
