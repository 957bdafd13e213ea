"""Random paths: sub-networks in which k branches are open and all others closed, and ensembles of them.

After Veit, Wilber, Belongie (NIPS 2016), section 3: a residual network read as an ensemble of its paths.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from resect.analyse.measuring import Measuring
from resect.analyse.paths import PathChooser
from resect.analyse.study import Lesion
from resect.analyse.subsets import Subset, distinct
from resect.blocks.block import Blocks
from resect.blocks.example import device_of, to_device
from resect.blocks.metrics import Metric, logits_of, mean_of, metric_named
from resect.blocks.running import running
from resect.errors import InputError


def subnetworks(blocks: Blocks, lengths: Sequence[int], draws: int, seed: int) -> Iterator[tuple[int, list[Subset]]]:
    """Draw per length ``draws`` paths of that many branches, no two alike; what is not on a path is closed.

    Where there are no more than ``draws``, all of them, still in a random order: ensembles are dealt out in turn.
    """
    chooser = PathChooser(blocks)
    longest = len(chooser.counts) - 1
    for length in lengths:
        if not 0 <= length <= longest:
            raise InputError(f"There is no path of length {length}: the longest has {longest} branches.")
        possible = chooser.counts[length]

        def closed(chance: random.Random, length: int = length) -> tuple[str, ...]:
            kept = chooser.draw(length, chance)
            return tuple(name for name in blocks.names if name not in kept)

        found = distinct(closed, min(draws, possible), f"{seed}/path/{length}")
        label = f"{length} branches"
        yield length, [Subset("paths", one, label, draw, possible <= draws) for draw, one in enumerate(found)]


def team_sizes(draws: int) -> list[int]:
    """Return 2, 4, 8 … up to the number of draws: the sizes of ensembles that are measured."""
    return [2**power for power in range(1, draws.bit_length()) if 2**power <= draws]


def measure_teams(
    measuring: Measuring, length: int, subsets: Sequence[Subset], sizes: Sequence[int]
) -> Iterator[Lesion]:
    """Yield the measurements of sub-networks of one length, and of the ensembles of m of them, for each size m.

    An ensemble's output is the logarithm of the mean of its members' probabilities (softmax). The draws are dealt
    out in turn: ensembles of one size have no member in common. All come from one pass over the data.
    """
    metric = metric_named(measuring.metric)
    device = device_of(measuring.model)
    alone = [_Sum() for _ in subsets]
    teams = {size: [_Sum() for _ in range(len(subsets) // size)] for size in sizes}
    with running(measuring.model, measuring.blocks, measuring.forward) as run:
        for batch in measuring.data:
            batch = to_device(batch, device)
            summed: dict[int, Tensor] = {}
            for place, output in enumerate(run.each(batch, [subset.closed for subset in subsets])):
                alone[place].add(metric(output, batch))
                scores = logits_of(output).log_softmax(dim=-1)
                for size, found in teams.items():
                    summed[size] = torch.logaddexp(summed[size], scores) if place % size else scores
                    if (place + 1) % size == 0:
                        found[place // size].add(metric(_like(output, summed[size] - math.log(size)), batch))
    for subset, one in zip(subsets, alone, strict=True):
        yield Lesion(subset.closed, one.value(metric), "paths", length, draw=subset.draw, every=subset.every)
    for size, found in teams.items():
        for draw, team in enumerate(found):
            yield Lesion((), team.value(metric), "ensembles", length, draw=draw, members=size)
    measuring.step(len(subsets))


class _Sum:
    """The sum and the number of what a metric gave."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, values: Tensor) -> None:
        self.total += float(values.double().sum())
        self.count += values.numel()

    def value(self, metric: Metric) -> float:
        return mean_of(metric, self.total, self.count)


def _like(output: Any, scores: Tensor) -> Any:
    """An output with these scores alone: of the same kind, or an object of the same class's name with ``logits``."""
    if isinstance(output, Tensor):
        return scores
    kind: Any = type(output)
    if kind in (tuple, list):
        return kind([scores])
    if isinstance(output, Mapping):
        return kind(logits=scores)
    return type(kind.__name__, (SimpleNamespace,), {})(logits=scores)
