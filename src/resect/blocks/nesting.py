"""Blocks inside the branches of other blocks."""

from __future__ import annotations

from resect.blocks.block import ResidualBlock


def lies_in(block: ResidualBlock, outer: ResidualBlock) -> bool:
    """Return whether all that a block intercepts is, or is in, a module of the branch of ``outer``."""
    around = _own(outer)
    return outer.sum > block.sum and all(
        any((name, call) == top or name.startswith(f"{top[0]}.") for top in around) for name, call in _own(block)
    )


def _own(block: ResidualBlock) -> list[tuple[str, int | None]]:
    """Return what is intercepted of a block, with the numbers of the calls."""
    return [*zip(block.modules, block.calls, strict=True), *((name, block.owner_call) for name in block.raw_parameters)]
