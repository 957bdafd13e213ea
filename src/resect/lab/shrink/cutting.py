"""From what was asked for to a cut and healed net, at once or in rounds: `resect shrink`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

from torch import nn

import resect
from resect.blocks.block import Blocks
from resect.blocks.plan import Plan
from resect.lab.display import Bars
from resect.lab.open import Opened
from resect.lab.shrink.choosing import by_rank
from resect.lab.shrink.recovering import recover
from resect.lab.shrink.wishes import Wishes
from resect.shrink.rank import units_of


def cut(opened: Opened, blocks: Blocks, wishes: Wishes, plan: Plan, display: Bars) -> nn.Module:
    """Cut, or replace, what a plan says, and heal it; proven unless a map takes its place."""
    if wishes.replace:
        data = opened.batches("train", wishes.limit)
        small = resect.replace(opened.model, blocks, plan, data, samples=wishes.limit, compact=wishes.compact)
    else:
        small = resect.remove(opened.model, blocks, plan, compact=wishes.compact)
    if wishes.recover:
        _heal(opened, wishes, display, small)
    return small


def cut_in_rounds(
    opened: Opened, blocks: Blocks, wishes: Wishes, display: Bars, say: Callable[[str], None]
) -> nn.Module:
    """Cut a share of the blocks, or layers, that are missed least, heal, rank what is left anew, and again."""
    assert wishes.n is not None
    _, unit = units_of(blocks, wishes.unit)  # type: ignore[arg-type]
    rounds = iter(range(1, wishes.rounds + 1))

    def choose(net: nn.Module, left: Blocks, n: int) -> Plan:
        say(f"Round {next(rounds)} of {wishes.rounds}.")
        return by_rank(replace(opened, model=net), left, replace(wishes, n=n, unit=unit), display, say)

    def heal(net: nn.Module, _: nn.Module) -> None:
        _heal(opened, wishes, display, net)

    return resect.shrink_gradually(
        opened.model, blocks, wishes.n, unit=unit, choose=choose, heal=heal, rounds=wishes.rounds,
        compact=wishes.compact,
    )  # fmt: skip


def _heal(opened: Opened, wishes: Wishes, display: Bars, small: nn.Module) -> None:
    told = functools.partial(display.steps, "recovered")
    recover(small, opened, wishes.recover, by=wishes.way, limit=wishes.limit, progress=told)
