"""From scores to ladders: for every number of units, which of them go."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

Score = Callable[[tuple[int, ...], list[tuple[int, ...]]], list[float]]
"""``score(gone, sets)``: how much each set of units, by place, is missed where ``gone`` are gone already."""
Gain = Callable[[tuple[int, ...]], float]
"""What goes with a set of units; 1 where nothing but the scores counts."""


def worth(score: float, gain: float) -> float:
    """Return a score per gain, the lowest the best: what is missed less than not at all counts the more, the more."""
    gain = max(gain, 1e-6)
    return score / gain if score > 0 else score * gain


def in_order(scores: Sequence[float], gain: Gain) -> list[int]:
    """Return places, the least missed per gain first; ties go to the later unit."""
    return sorted(range(len(scores)), key=lambda place: (worth(scores[place], gain((place,))), -place))


def greedy(count: int, depth: int, score: Score, gain: Gain) -> Iterator[tuple[int, ...]]:
    """Yield growing sets: always the unit goes that is missed least per gain, where those before it are gone.

    Scores n + (n − 1) + … sets; ties go to the later unit.
    """
    gone: tuple[int, ...] = ()
    for _ in range(depth):
        left = [place for place in range(count) if place not in gone]
        scores = score(gone, [(place,) for place in left])
        gone += (left[in_order(scores, lambda at, left=left: gain((left[at[0]],)))[0]],)  # type: ignore[misc]
        yield gone


def beam(
    count: int, depth: int, value: Callable[[list[tuple[int, ...]]], list[float]], width: int
) -> Iterator[tuple[int, ...]]:
    """Yield the best set of each size found by growing the ``width`` best ones of the size before, by ``value``.

    The set that greedy search is at stays among those that grow, so that it never ends above it. Values at most
    (width + 1) (n + (n − 1) + …) sets, each once; ties go to the later units.
    """
    kept: list[tuple[int, ...]] = [()]
    steepest: tuple[int, ...] = ()
    for _ in range(depth):
        grown = {tuple(sorted((*places, new))) for places in kept for new in range(count) if new not in places}
        sets = sorted(grown, reverse=True)
        values = dict(zip(sets, value(sets), strict=True))
        best = sorted(sets, key=values.__getitem__)
        steepest = min((places for places in sets if set(steepest) < set(places)), key=values.__getitem__)
        kept = best[:width] + [steepest] * (steepest not in best[:width])
        yield best[0]


def runs(count: int, depth: int, allowed: Callable[[tuple[int, ...]], bool]) -> list[tuple[int, ...]]:
    """Return every allowed run of at most ``depth`` neighbouring units."""
    all_runs = (tuple(range(start, start + size)) for size in range(1, depth + 1) for start in range(count - size + 1))
    return [places for places in all_runs if allowed(places)]


def best_runs(sets: Sequence[tuple[int, ...]], scores: Sequence[float], gain: Gain) -> list[tuple[int, ...]]:
    """Return the run of each length that is missed least per gain; ties go to the later one."""
    best: dict[int, tuple[tuple[float, int], tuple[int, ...]]] = {}
    for places, score in zip(sets, scores, strict=True):
        key = (worth(score, gain(places)), -places[0])
        if len(places) not in best or key < best[len(places)][0]:
            best[len(places)] = key, places
    return [places for _, places in best.values()]
