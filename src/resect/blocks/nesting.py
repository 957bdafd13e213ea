"""Blocks inside the branches of other blocks."""

from __future__ import annotations

from collections.abc import Iterable

from resect.blocks.block import ResidualBlock


def around(blocks: Iterable[ResidualBlock]) -> dict[str, set[str]]:
    """Return for each block the names of those in whose branches it lies."""
    found = list(blocks)
    return {block.name: {outer.name for outer in found if lies_in(block, outer)} for block in found}


def lies_in(block: ResidualBlock, outer: ResidualBlock) -> bool:
    """Return whether all that a block intercepts is, or is in, a module of the branch of ``outer``."""
    around = _own(outer)
    return outer.sum > block.sum and all(
        any((name, call) == top or name.startswith(f"{top[0]}.") for top in around) for name, call in _own(block)
    )


def _own(block: ResidualBlock) -> list[tuple[str, int | None]]:
    """Return what is intercepted of a block, with the numbers of the calls."""
    return [*zip(block.modules, block.calls, strict=True), *((name, block.owner_call) for name in block.raw_parameters)]
