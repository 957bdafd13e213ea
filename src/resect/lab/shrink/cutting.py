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
from resect.lab.shrink.choosing import by_rank, choose_plan
from resect.lab.shrink.recovering import recover
from resect.lab.shrink.unfinished import Unfinished
from resect.lab.shrink.wishes import Wishes
from resect.shrink.rank import units_of


def cut(
    opened: Opened, blocks: Blocks, wishes: Wishes, kept: Unfinished, display: Bars, say: Callable[[str], None]
) -> nn.Module:
    """Choose, cut or replace, and heal; proven unless a map takes the place of what is cut."""
    plan = kept.plan(0, lambda: choose_plan(opened, blocks, wishes, display, say))
    if wishes.replace:
        data = opened.batches("train", wishes.limit)
        small = resect.replace(opened.model, blocks, plan, data, samples=wishes.limit, compact=wishes.compact)
    else:
        small = resect.remove(opened.model, blocks, plan, compact=wishes.compact)
    if wishes.recover:
        _heal(opened, wishes, kept, display, small)
    return small


def cut_in_rounds(
    opened: Opened, blocks: Blocks, wishes: Wishes, kept: Unfinished, display: Bars, say: Callable[[str], None]
) -> nn.Module:
    """Cut a share of the blocks, or layers, that are missed least, heal, rank what is left anew, and again.

    Of rounds that were over before a stop only the cuts are made again: the weights are those of the last one.
    """
    assert wishes.n is not None
    _, unit = units_of(blocks, wishes.unit)  # type: ignore[arg-type]
    turn = -1

    def choose(net: nn.Module, left: Blocks, n: int) -> Plan:
        nonlocal turn
        turn += 1
        say(f"Round {turn + 1} of {wishes.rounds}.")
        asked = replace(wishes, n=n, unit=unit)
        return kept.plan(turn, lambda: by_rank(replace(opened, model=net), left, asked, display, say))

    def heal(net: nn.Module, _: nn.Module) -> None:
        if not kept.over:
            _heal(opened, wishes, kept, display, net)

    return resect.shrink_gradually(
        opened.model, blocks, wishes.n, unit=unit, choose=choose, heal=heal, rounds=wishes.rounds,
        compact=wishes.compact,
    )  # fmt: skip


def _heal(opened: Opened, wishes: Wishes, kept: Unfinished, display: Bars, small: nn.Module) -> None:
    told = functools.partial(display.steps, "recovered")
    recover(small, opened, wishes.recover, by=wishes.way, limit=wishes.limit, kept=kept, progress=told)
