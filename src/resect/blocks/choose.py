"""Choosing blocks: by what the branch is, and by stage."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from resect.errors import InputError, unknown

if TYPE_CHECKING:
    from resect.blocks.block import ResidualBlock


def number_stages(blocks: Iterable[ResidualBlock]) -> list[ResidualBlock]:
    """Return the blocks of a whole model, in order, with ``stage`` set to 1, 2, ….

    A stage is a run of neighbouring blocks that lie in one numbered container (``layer3``, ``encoder.layers``)
    and whose sums have the same shape on the example.
    """
    items = list(blocks)
    numbers = [1] * bool(items)
    for before, block in pairwise(items):
        numbers.append(numbers[-1] + (_place(before) != _place(block)))
    return [replace(block, stage=number) for block, number in zip(items, numbers, strict=True)]


def layer_of(owner: str) -> str:
    """Return the layer an owner lies in: ``encoder.layer.3`` of ``encoder.layer.3.attention.output``.

    That is the path up to its last number; an owner without a number is a layer by itself.
    """
    numbered = re.match(r"(.*\.)?\d+(?=\.|$)", owner)
    return numbered[0] if numbered else owner


def named_apart(block: ResidualBlock, others: Iterable[ResidualBlock]) -> ResidualBlock:
    """Return the block under a name that no other block has: ``mlp``, or else ``mlp~1``, ``mlp~2`` …"""
    names = {other.name for other in others if other.intercepts != block.intercepts}
    free = (f"{block.name}~{number}" if number else block.name for number in itertools.count())
    return replace(block, name=next(name for name in free if name not in names))


def of_stage(blocks: Iterable[ResidualBlock], number: int) -> list[ResidualBlock]:
    """Return the blocks of one stage; raises ``InputError`` where there is none of that number."""
    items = list(blocks)
    found = [block for block in items if block.stage == number]
    if found:
        return found
    there = ", ".join(map(str, sorted({block.stage for block in items}))) or "none"
    raise InputError(f"There is no stage {number} here. Stages: {there}.")


def of_part(blocks: Iterable[ResidualBlock], part: str) -> list[ResidualBlock]:
    """Return the blocks whose branch is ``attention``, ``mlp`` or ``conv``, in small letters or large.

    Raises ``InputError`` for a part that no branch here is.
    """
    items = list(blocks)
    found = [block for block in items if block.part.lower() == part.lower()]
    if not found:
        raise unknown("part", part, dict.fromkeys(block.part for block in items))
    return found


def _place(block: ResidualBlock) -> tuple[str, tuple[int, ...]]:
    return _container(block.owner), block.shape


def _container(owner: str) -> str:
    """Return what precedes the first number of a path: ``encoder.block`` of ``encoder.block.3.layer.0``."""
    return re.split(r"(?:^|\.)\d+(?:\.|$)", owner, maxsplit=1)[0]
