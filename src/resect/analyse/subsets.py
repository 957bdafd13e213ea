"""Which blocks a lesion study closes at a time: functions of the blocks' names and a seed alone."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.choose import layer_of
from resect.errors import InputError, unknown

Drawn = TypeVar("Drawn")


class Subset(NamedTuple):
    """Blocks to close together, and why."""

    study: str
    closed: tuple[str, ...]
    label: str = ""
    """What the subset is: the name of a group, the first block of a run."""
    draw: int = 0
    """Which of the random draws of one kind, from 0."""
    every: bool = False
    """Whether all that there are of this kind and size are measured, so that their mean is no estimate."""


def each(blocks: Blocks) -> Iterator[Subset]:
    """Every block alone."""
    return (Subset("each", (block.name,), block.name, every=True) for block in blocks)


def random_subsets(blocks: Blocks, counts: Sequence[int], draws: int, seed: int) -> Iterator[Subset]:
    """Draw ``draws`` subsets of k blocks for each k, no two alike; all of them, in order, where there are no more."""
    for k in counts:
        if not 0 <= k <= len(blocks):
            raise InputError(
                f"Cannot close {k} blocks at random: there are {len(blocks)}. Give counts from 0 to {len(blocks)}."
            )
        possible = math.comb(len(blocks), k)
        if possible <= draws:
            found = list(itertools.combinations(blocks.names, k))
        else:
            found = distinct(partial(_some, blocks, k), draws, f"{seed}/{k}")
        yield from (Subset("random", one, draw=draw, every=possible <= draws) for draw, one in enumerate(found))


def distinct(draw: Callable[[random.Random], Drawn], number: int, seed: str) -> list[Drawn]:
    """Draw ``number`` different things, of which there must be so many: one seen before is drawn again."""
    found: dict[Drawn, None] = {}
    for place in range(number):
        chance = random.Random(f"{seed}/{place}")
        one = draw(chance)
        while one in found:
            one = draw(chance)
        found[one] = None
    return list(found)


def runs(blocks: Blocks, lengths: Sequence[int]) -> Iterator[Subset]:
    """For each m every run of m neighbouring blocks, n − m + 1 of them."""
    for m in lengths:
        if not 1 <= m <= len(blocks):
            raise InputError(
                f"There is no run of {m} neighbouring blocks: there are {len(blocks)}. Give lengths from 1 to "
                f"{len(blocks)}."
            )
        for start in range(len(blocks) - m + 1):
            names = tuple(blocks.names[start : start + m])
            yield Subset("runs", names, names[0], every=True)


def whole_numbers(name: str, given: Any) -> list[int]:
    """Return the different whole numbers given: several, or one alone."""
    several = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    for one in several:
        if isinstance(one, bool) or not hasattr(one, "__index__"):
            raise InputError(f"{name} must be whole numbers, as [1, 2, 4], but holds {one!r}.")
    return list(dict.fromkeys(int(one) for one in several))


GROUPS: dict[str, Callable[[ResidualBlock], str]] = {
    "stage": lambda block: f"stage {block.stage}",
    "part": lambda block: block.part,
    "layer": lambda block: layer_of(block.owner),
    "kind": lambda block: "downsampling" if downsamples(block) else "identity",
}
"""What blocks can be grouped by. ``kind`` sets those apart whose shortcut does something, which stays."""


def downsamples(block: ResidualBlock) -> bool:
    """Whether the block's shortcut is more than the identity; its shortcut stays when the block is closed."""
    return block.shortcut != "identity"


def groups(blocks: Blocks, by: str | Iterable[str]) -> Iterator[Subset]:
    """For each of "stage", "part", "layer", "kind": every group of blocks closed as a whole."""
    for grouping in [by] if isinstance(by, str) else by:
        if grouping not in GROUPS:
            raise unknown("grouping of blocks", grouping, GROUPS)
        members: dict[str, list[str]] = {}
        for block in blocks:
            members.setdefault(GROUPS[grouping](block), []).append(block.name)
        for label, names in members.items():
            yield Subset(f"by {grouping}", tuple(names), label, every=True)


def pairs(blocks: Blocks) -> Iterator[Subset]:
    """Every pair of blocks, n(n − 1)/2 of them."""
    return (Subset("pairs", pair, every=True) for pair in itertools.combinations(blocks.names, 2))


def _some(blocks: Blocks, k: int, chance: random.Random) -> tuple[str, ...]:
    chosen = set(chance.sample(blocks.names, k))
    return tuple(name for name in blocks.names if name in chosen)
