"""Effective lengths: the narrowest run of path lengths that holds most of a quantity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from resect.errors import InputError


@dataclass(frozen=True)
class EffectiveLengths:
    """The narrowest run of lengths, ``low`` to ``high``, that holds at least the part asked for.

    ``held`` is what it does hold; ``paths`` the share of all paths that have these lengths, as an exact fraction.
    """

    low: int
    high: int
    held: float
    paths: Fraction

    def __str__(self) -> str:
        return (
            f"Paths of {self.low} to {self.high} branches hold {100 * self.held:.1f} % of it; "
            f"they are {100 * float(self.paths):.4g} % of all paths."
        )


def effective_lengths(values: Sequence[float], paths: Sequence[int], part: float = 0.95) -> EffectiveLengths:
    """Return the narrowest run of lengths that holds at least ``part`` of the sum of ``values``.

    Veit, Wilber, Belongie (NIPS 2016), section 5, figure 6c: 5 … 17 of 54 blocks, 0.45 % of the paths.

    Parameters
    ----------
    values: something that is at least 0, per length 0 … n. Of equally narrow runs the one that holds more is taken.
    paths: number of paths per length, as ``path_lengths`` gives them.
    part: a share above 0 and at most 1.

    Raises
    ------
    InputError: a value is negative or no number, or all are 0; a part that is no share.
    """
    if not 0 < part <= 1:
        raise InputError(f"part must be a share above 0 and at most 1, 0.95 for 95 %, not {part!r}.")
    odd = [(length, value) for length, value in enumerate(values) if not 0 <= value < float("inf")]
    if odd:
        raise InputError(f"Effective lengths need finite values of at least 0, but length {odd[0][0]} has {odd[0][1]}.")
    low, high, held = narrowest(list(enumerate(values)), part)
    return EffectiveLengths(low, high, held, Fraction(sum(paths[low : high + 1]), sum(paths)))


def narrowest(weights: Sequence[tuple[int, float]], part: float = 0.95) -> tuple[int, int, float]:
    """Return (first, last, what they hold) of the narrowest run of (length, weight) that holds ``part`` of all."""
    total = sum(weight for _, weight in weights)
    if not total > 0:
        raise InputError("Effective lengths need a value above 0, and all are 0.")
    best = (weights[0][0], weights[-1][0], 1.0)
    for start in range(len(weights)):
        held = 0.0
        for length, weight in weights[start:]:
            held += weight / total
            if held >= part - 1e-12:
                best = min(best, (weights[start][0], length, held), key=lambda run: (run[1] - run[0], -run[2]))
                break
    return best
