"""Paths through a residual network: how many there are of each length, and how to draw one.

Veit, Wilber, Belongie (NIPS 2016), sections 3 and 5: n blocks make 2**n paths, one open/closed choice per
block; a path's length is the number of branches on it.
"""

from __future__ import annotations

import random

from resect.blocks.block import Blocks


def path_lengths(blocks: Blocks) -> list[int]:
    """Return the number of paths of each length 0 … n, as exact integers.

    They are the coefficients of the product over the sums of ``1 + m·z``, with m the number of branches of
    that sum (m = 1 nearly always, which makes them binomial; parallel branches have m > 1).
    """
    counts = [1]
    for branches in _branches_per_sum(blocks):
        longer = [branches * count for count in counts]
        counts = [a + b for a, b in zip([*counts, 0], [0, *longer], strict=True)]
    return counts


def _branches_per_sum(blocks: Blocks) -> list[int]:
    sums: dict[int, int] = {}
    for block in blocks:
        sums[block.sum] = sums.get(block.sum, 0) + 1
    return list(sums.values())


class PathChooser:
    """Draw paths of a given length, each equally likely."""

    def __init__(self, blocks: Blocks) -> None:
        sums: dict[int, list[str]] = {}
        for block in blocks:
            sums.setdefault(block.sum, []).append(block.name)
        self.sums = list(sums.values())
        # tails[i][k]: number of ways to choose k branches from the sums i, i+1, …
        self.tails: list[list[int]] = [[1]]
        for branches in reversed(self.sums):
            later = self.tails[0]
            longer = [len(branches) * count for count in later]
            self.tails.insert(0, [a + b for a, b in zip([*later, 0], [0, *longer], strict=True)])

    def draw(self, length: int, draw: random.Random) -> set[str]:
        """Return the names of the blocks on one random path of this length."""
        chosen: set[str] = set()
        for place, branches in enumerate(self.sums):
            later = self.tails[place + 1]
            with_this = len(branches) * later[length - 1] if 0 < length <= len(later) else 0
            if draw.randrange(self.tails[place][length]) < with_this:
                chosen.add(draw.choice(branches))
                length -= 1
        return chosen
