"""Paths through a residual network: how many there are of each length, and how to draw one.

Veit, Wilber, Belongie (NIPS 2016), sections 3 and 5: n blocks make 2**n paths, one open/closed choice per
block; a path's length is the number of branches on it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.nesting import lies_in


@dataclass(frozen=True)
class Fork:
    """One sum as a path meets it: past it by the shortcut, or through one of its branches."""

    branches: tuple[Branch, ...]
    shortcut: bool = True
    """False where a path begins inside the one branch, and can only go on through it."""


@dataclass(frozen=True)
class Branch:
    """One branch, and the forks inside it."""

    name: str
    inside: tuple[Fork, ...] = ()


Chain = tuple[Fork, ...]


def path_lengths(blocks: Blocks) -> list[int]:
    """Return the number of paths of each length 0 … n, as exact integers.

    They are the coefficients of the product over the sums of ``1 + m·z``, with m the number of branches of that sum
    (Veit et al., section 3: binomial, where every m is 1). A block inside the branch of another counts on the paths
    through that branch alone: there, ``m·z`` becomes the sum over the branches of z times the branch's own product.
    """
    return counts(chain_of(blocks))


def counts(chain: Chain) -> list[int]:
    """Return the coefficients of a chain's polynomial: paths by length."""
    total = [1]
    for fork in chain:
        total = times(total, ways(fork))
    return total


def ways(fork: Fork) -> list[int]:
    """Return the number of ways through one fork, by the number of branches taken: ``shortcut + Σ z · inside``."""
    inside = [counts(branch.inside) for branch in fork.branches]
    through = [sum(found[k] for found in inside if k < len(found)) for k in range(max(map(len, inside)))]
    return [int(fork.shortcut), *through]


def times(left: list[int], right: list[int]) -> list[int]:
    """Multiply two polynomials."""
    product = [0] * (len(left) + len(right) - 1)
    for i, a in enumerate(left):
        for j, b in enumerate(right):
            product[i + j] += a * b
    return product


def chain_of(blocks: Blocks) -> Chain:
    """Arrange blocks as forks one after the other, with forks inside branches."""
    parents = {block.name: _around(block, blocks) for block in blocks}

    def level(parent: str | None) -> Chain:
        sums: dict[int, list[Branch]] = {}
        for block in sorted(blocks, key=lambda block: block.sum):
            if parents[block.name] == parent:
                sums.setdefault(block.sum, []).append(Branch(block.name, level(block.name)))
        return tuple(Fork(tuple(branches)) for branches in sums.values())

    return level(None)


def _around(block: ResidualBlock, blocks: Blocks) -> str | None:
    """Return the block in whose branch this one lies; of several, the one whose addition comes next.

    Sums are numbered in the order of execution.
    """
    around = min((outer for outer in blocks if lies_in(block, outer)), key=lambda outer: outer.sum, default=None)
    return around.name if around is not None else None


def chain_from(chain: Chain, name: str) -> Chain | None:
    """Return what lies ahead of what enters the block ``name``; None where it is not in the chain."""
    for place, fork in enumerate(chain):
        for branch in fork.branches:
            if branch.name == name:
                return chain[place:]
            inner = chain_from(branch.inside, name)
            if inner is not None:
                return (*inner, Fork((Branch(branch.name),), shortcut=False), *chain[place + 1 :])
    return None


def names_in(chain: Chain) -> list[str]:
    """Return the names of all blocks of a chain."""
    return [
        name
        for fork in chain
        for branch in fork.branches
        for name in (*names_in(branch.inside), branch.name)
    ]  # fmt: skip


class PathChooser:
    """Draw paths of a given length through blocks, each equally likely."""

    def __init__(self, blocks: Blocks | Chain) -> None:
        self.chain = chain_of(blocks) if isinstance(blocks, Blocks) else blocks
        self.ways = [ways(fork) for fork in self.chain]
        self.inside = {branch.name: PathChooser(branch.inside) for fork in self.chain for branch in fork.branches}
        # tails[i][k]: number of ways to choose k branches from the forks i, i+1, …
        self.tails: list[list[int]] = [[1]]
        for found in reversed(self.ways):
            self.tails.insert(0, times(found, self.tails[0]))

    @property
    def counts(self) -> list[int]:
        """Return the number of paths by length."""
        return self.tails[0]

    def draw(self, length: int, draw: random.Random) -> set[str]:
        """Return the names of the blocks on one random path of this length, of which there must be one."""
        chosen: set[str] = set()
        for place, fork in enumerate(self.chain):
            later = self.tails[place + 1]
            choices = [
                (number * later[length - taken], taken)
                for taken, number in enumerate(self.ways[place])
                if 0 <= length - taken < len(later)
            ]
            taken = _pick(choices, draw)
            if taken:
                branches = [(branch, self.inside[branch.name]) for branch in fork.branches]
                number = [(b.counts[taken - 1] if taken <= len(b.counts) else 0, (a, b)) for a, b in branches]
                branch, inner = _pick(number, draw)
                chosen |= {branch.name, *inner.draw(taken - 1, draw)}
            length -= taken
        return chosen


def _pick(weighted: list[tuple[int, Any]], draw: random.Random) -> Any:
    """Draw one of several by whole-number weights, exactly, however large they are."""
    place = draw.randrange(sum(weight for weight, _ in weighted))
    for weight, value in weighted:
        if place < weight:
            return value
        place -= weight
    raise AssertionError
