"""What is wrong with the options of a method, as sentences: so that all can be reported at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, get_args

from resect.blocks.block import Blocks
from resect.errors import InputError, unknown
from resect.train.masks import Compute, Per


def number_problems(name: str, value: float | Callable[[int], float], low: float = 0, high: float = 1) -> list[str]:
    """Say what is wrong with a number in [low, high] or a schedule of it; nothing if it is fine."""
    if callable(value):
        return []
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= float(value) <= high:
        span = f"between {low:g} and {high:g}" if high < math.inf else f"of at least {low:g}"
        return [f"{name} must be a number {span}, or a schedule of it, not {value!r}"]
    return []


def choice_problems(**choices: tuple[Any, Any]) -> list[str]:
    """Say which values are not among their ``Literal``: ``choice_problems(per=(per, Per))``."""
    return [
        str(unknown(name, value, get_args(literal)))
        for name, (value, literal) in choices.items()
        if value not in get_args(literal)
    ]


def count_problems(**counts: tuple[Any, int]) -> list[str]:
    """Say which values are no whole numbers of at least their minimum: ``count_problems(period=(period, 1))``."""
    return [
        f"{name} must be a whole number of at least {low}, not {value!r}"
        for name, (value, low) in counts.items()
        if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < low
    ]


def per_problems(per: Any, compute: Any) -> list[str]:
    """Say what is wrong with what is drawn for, and with how samples are left out."""
    problems = choice_problems(per=(per, Per), compute=(compute, Compute))
    if not problems and per == "batch" and compute != "auto":
        problems = [f'compute={compute!r} says how samples are left out, so it needs per="sample"']
    return problems


def check_ends(blocks: Blocks, name: str) -> None:
    """Raise ``InputError`` if a block has no branch end for method ``name`` to act on."""
    unusable = [block for block in blocks if not block.scalable]
    if unusable:
        raise InputError(
            f"{name} cannot act on {unusable[0].name!r} ({unusable[0].reason}); {len(unusable)} of {len(blocks)} "
            "blocks are so. "
            + (
                "Leave them out: blocks.select(b for b in blocks if b.scalable)."
                if len(unusable) < len(blocks)
                else 'Such blocks can only be closed: StochasticDepth(per="batch", scaling="none") does no more.'
            )
        )
