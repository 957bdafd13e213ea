"""Greedy deletion: always close the block that is missed least, and follow the metric down to no block at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from resect.analyse.subsets import Subset

Measure = Callable[[Sequence[Subset]], Sequence[float]]


def greedy_deletion(names: Sequence[str], depth: int, measure: Measure) -> Iterator[tuple[Subset, float]]:
    """Close ``depth`` blocks one after the other, each the one whose closing costs least with those before it.

    Yields each step's subset, labelled with the block that it adds, and its value. Costs n + (n − 1) + …
    measurements; of equally good blocks the first goes.
    """
    gone: list[str] = []
    for _ in range(depth):
        left = [name for name in names if name not in gone]
        tried = [Subset("greedy", tuple(n for n in names if n in gone or n == name), name) for name in left]
        values = measure(tried)
        best = min(range(len(tried)), key=values.__getitem__)
        gone.append(left[best])
        yield tried[best], values[best]


def greedy_cost(blocks: int, depth: int) -> int:
    """Return the number of measurements that takes: n + (n − 1) + …"""
    return sum(blocks - step for step in range(depth))
