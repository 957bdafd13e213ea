"""Lesion studies: close blocks of a trained model and measure.

Veit, Wilber, Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", NIPS
2016, section 4: deleting one block hardly matters, deleting many raises the error smoothly.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.example import Forward, forward_batch
from resect.blocks.gate import Which, resolve
from resect.blocks.measure import Progress, measure_closed
from resect.blocks.metrics import Metric
from resect.errors import InputError


@dataclass(frozen=True)
class Lesion:
    """One measurement: the metric with some blocks closed."""

    closed: tuple[str, ...]
    value: float


@dataclass(frozen=True)
class LesionStudy:
    """What closing blocks does to a model.

    ``baseline`` is the metric of the whole model; ``each`` one measurement per block, in order;
    ``random`` the measurements with k blocks closed at random.
    """

    metric: str
    baseline: float
    each: tuple[Lesion, ...]
    random: tuple[Lesion, ...] = ()

    @property
    def scores(self) -> dict[str, float]:
        """Return per block how much the metric rises when it is closed: what ``rank`` sorts by."""
        return {lesion.closed[0]: lesion.value - self.baseline for lesion in self.each}

    def by_count(self) -> list[dict[str, float]]:
        """Return per number k of closed blocks: draws, mean, and a 95 % interval of the mean (Student's t)."""
        rows = []
        for k in sorted({len(lesion.closed) for lesion in self.random}):
            values = [lesion.value for lesion in self.random if len(lesion.closed) == k]
            low, high = interval(values)
            rows.append({"k": k, "draws": len(values), "mean": statistics.fmean(values), "low": low, "high": high})
        return rows

    def rows(self) -> list[dict[str, Any]]:
        """Return every measurement as a plain dict, for CSV and tables."""
        everything = (
            *((lesion, "each") for lesion in self.each),
            *((lesion, "random") for lesion in self.random),
        )
        return [
            {"study": kind, "k": len(lesion.closed), "closed": " ".join(lesion.closed), self.metric: lesion.value,
             "change": lesion.value - self.baseline}
            for lesion, kind in everything
        ]  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{self.metric} of the whole model: {self.baseline:.4g}; with one block closed:"]
        lines += [f"  {name:<32} {change:+.4g}" for name, change in self.scores.items()]
        for row in self.by_count():
            span = f"95 % of the mean: {row['low']:.4g} … {row['high']:.4g}, {row['draws']} draws"
            lines.append(f"  {row['k']:g} at random: {row['mean']:.4g}  ({span})")
        return "\n".join(lines)


def lesion_study(
    model: nn.Module,
    blocks: Which,
    data: Iterable[Any],
    *,
    metric: str | Metric = "top1",
    each: bool = True,
    random_counts: Sequence[int] = (),
    draws: int = 10,
    seed: int = 0,
    forward: Forward = forward_batch,
    progress: Progress | None = None,
) -> LesionStudy:
    """Close each block in turn, and k blocks at random, and measure every time.

    Parameters
    ----------
    model, blocks: a trained model and its blocks; the model is left exactly as it was.
    data: batches, gone through once per measurement: a list, a DataLoader, any iterable that can be
        repeated. A tuple is (inputs, target), a mapping is run as keyword arguments.
    metric: ``"top1"``, ``"top5"`` (errors in %), ``"cross_entropy"`` (nats), or ``f(output, batch)``
        that returns one number per sample. Lower is better.
    each: whether to close each block alone.
    random_counts: for each k of these, close k blocks drawn at random, ``draws`` times.
    seed: of the draws; the same seed gives the same subsets on any machine.
    forward: how to run one batch, ``(model, batch) -> output``, where the default does not fit.
    progress: called as ``progress(done, total)`` after every measurement.

    Raises
    ------
    InputError: no data, an unknown metric, a metric that is NaN, or k outside 0 … number of blocks.
    """
    blocks = resolve(model, blocks)
    subsets: list[tuple[str, ...]] = [(name,) for name in blocks.names] if each else []
    subsets += list(random_subsets(blocks, random_counts, draws, seed))
    baseline, values = measure_closed(model, blocks, data, subsets, metric, forward, progress)
    lesions = [Lesion(subset, value) for subset, value in zip(subsets, values, strict=True)]
    singles = len(blocks) if each else 0
    name = metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")
    return LesionStudy(name, baseline, tuple(lesions[:singles]), tuple(lesions[singles:]))


def random_subsets(blocks: Blocks, counts: Sequence[int], draws: int, seed: int) -> Iterator[tuple[str, ...]]:
    """Draw ``draws`` subsets of k names for each k; a function of the names, the counts and the seed alone."""
    for k in counts:
        if not 0 <= k <= len(blocks):
            raise InputError(
                f"Cannot close {k} blocks at random: there are {len(blocks)}. Give counts from 0 to {len(blocks)}."
            )
        for draw in range(draws):
            chosen = set(random.Random(f"{seed}/{k}/{draw}").sample(blocks.names, k))
            yield tuple(name for name in blocks.names if name in chosen)


# Student's t, two-sided 95 %, for 1 … 30 degrees of freedom.
# fmt: off
_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)
# fmt: on


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return a 95 % confidence interval of the mean (Student's t; infinite for a single value)."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return -math.inf, math.inf
    t = _T95[len(values) - 2] if len(values) <= 31 else 1.96
    half = t * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half
