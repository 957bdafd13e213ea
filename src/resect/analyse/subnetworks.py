"""Random paths: sub-networks in which k branches are open and all others closed, and ensembles of them.

After Veit, Wilber, Belongie (NIPS 2016), section 3: a residual network read as an ensemble of its paths.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from resect.analyse.paths import PathChooser
from resect.analyse.subsets import Subset
from resect.blocks.block import Blocks
from resect.blocks.example import Forward, device_of, to_device
from resect.blocks.gate import gates
from resect.blocks.metrics import Metric, logits_of, mean_of
from resect.errors import InputError


def subnetworks(blocks: Blocks, lengths: Sequence[int], draws: int, seed: int) -> Iterator[tuple[int, list[Subset]]]:
    """Draw per length ``draws`` paths of that many branches; what is not on a path is closed.

    The same path may be drawn twice: for lengths 0 and n there is only one.
    """
    chooser = PathChooser(blocks)
    longest = len(chooser.sums)
    for length in lengths:
        if not 0 <= length <= longest:
            raise InputError(f"There is no path of length {length}: the longest has {longest} branches.")
        subsets = []
        for draw in range(draws):
            kept = chooser.draw(length, random.Random(f"{seed}/path/{length}/{draw}"))
            closed = tuple(name for name in blocks.names if name not in kept)
            subsets.append(Subset("paths", closed, f"{length} branches", draw))
        yield length, subsets


def team_sizes(draws: int) -> list[int]:
    """Return 2, 4, 8 … up to the number of draws: the sizes of ensembles that are measured."""
    return [2**power for power in range(1, draws.bit_length()) if 2**power <= draws]


def measure_teams(
    model: nn.Module,
    blocks: Blocks,
    data: Iterable[Any],
    subsets: Sequence[Subset],
    sizes: Sequence[int],
    metric: Metric,
    forward: Forward,
    done: Callable[[], None],
) -> tuple[list[float], dict[int, list[float]]]:
    """Return the metric of each sub-network, and per size m the metrics of the ensembles of m of them.

    An ensemble's output is the logarithm of the mean of its members' probabilities (softmax). The draws are dealt
    out in turn: ensembles of one size have no member in common. ``done`` is called after each sub-network's last
    batch.
    """
    device = device_of(model)
    teams = {size: len(subsets) // size for size in sizes}
    singles = [_Sum() for _ in subsets]
    together = {size: [_Sum() for _ in range(number)] for size, number in teams.items()}
    with gates(model, blocks) as handle:
        for batch in data:
            batch = to_device(batch, device)
            totals: dict[int, Tensor] = {}
            for place, subset in enumerate(subsets):
                for gate in handle:
                    gate.close() if gate.block.name in subset.closed else gate.open()
                output = forward(model, batch)
                singles[place].add(metric(output, batch))
                scores = logits_of(output).log_softmax(dim=-1)
                for size, number in teams.items():
                    member = place % size
                    if place // size >= number:
                        continue
                    totals[size] = scores if member == 0 else torch.logaddexp(totals[size], scores)
                    if member == size - 1:
                        team = _like(output, totals[size] - math.log(size))
                        together[size][place // size].add(metric(team, batch))
    for _ in subsets:
        done()
    return [s.value(metric) for s in singles], {m: [s.value(metric) for s in sums] for m, sums in together.items()}


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
    """An output with these scores: a tensor for a tensor, else an object of the same class's name with ``logits``."""
    return scores if isinstance(output, Tensor) else type(type(output).__name__, (SimpleNamespace,), {})(logits=scores)
