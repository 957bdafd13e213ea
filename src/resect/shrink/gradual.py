"""Cut a little, heal, and again: between two cuts what is left learns to do without."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.find import find_blocks
from resect.blocks.gate import resolve
from resect.blocks.plan import Plan
from resect.blocks.unwrap import unwrap
from resect.errors import BlocksError, InputError, quoted
from resect.shrink.rank import Unit, units_of
from resect.shrink.remove import Names, remove

Choose = Callable[[nn.Module, Blocks, int], Names]
"""``choose(model, blocks, n)``: a plan, or the names, of the next n blocks to go."""
Heal = Callable[[nn.Module, nn.Module], object]
"""``heal(small, model)`` trains the cut model in place; ``model`` is the uncut one, as a teacher."""


def shrink_gradually(
    model: nn.Module,
    blocks: Blocks,
    n: int,
    *,
    choose: Choose,
    heal: Heal,
    rounds: int | None = None,
    unit: Unit = "block",
    compact: bool = False,
) -> nn.Module:
    """Remove ``n`` blocks, or layers, in several rounds, healing what is left after each; return the smaller model.

    Which blocks go next is asked anew after every round, of the healed model. Each cut is proven as ``remove`` does.

    Parameters
    ----------
    model, blocks: as in ``remove``; the model is left alone. The blocks must carry their example: what is left of
        them is found again after every cut.
    n: how many go in all.
    choose: ``choose(small, blocks, k)`` gives a plan, or names, of k of the blocks, or layers, that are left.
    heal: ``heal(small, model)`` trains the cut model in place, however it likes: ``mimic``, a loop with
        ``Distillation``, ``recalibrate``.
    rounds: how many cuts, 1 … n; by default one block at a time.
    unit: what is counted: ``"block"`` or ``"layer"``, all blocks of which go.
    compact: as in ``remove``, with the last cut: names hold until then.

    Raises
    ------
    InputError: wrong numbers, or a choice of another size; what ``remove``, ``choose`` and ``heal`` raise.

    >>> small = resect.shrink_gradually(
    ...     model, blocks, 4, rounds=2,
    ...     choose=lambda net, left, k: resect.rank(net, left, data).choose(k),
    ...     heal=lambda net, teacher: resect.mimic(net, teacher, data),
    ... )
    """
    blocks, model = resolve(model, blocks), unwrap(model)
    if blocks.example is None:
        raise BlocksError("These blocks carry no example to find them by again. Use find_blocks(model, example).")
    rounds = n if rounds is None else rounds
    whole = all(isinstance(value, int) and not isinstance(value, bool) for value in (n, rounds))
    most = len(units_of(blocks, unit)[0])
    if not whole or not 1 <= rounds <= n <= most:
        raise InputError(
            f"shrink_gradually(n={n!r}, rounds={rounds!r}): n must be from 1 to {most}, the number of {unit}s, and "
            "rounds from 1 to n."
        )
    small, left = model, blocks
    for turn in range(rounds):
        count = n * (turn + 1) // rounds - n * turn // rounds
        plan = Plan.of(left, choose(small, left, count))
        taken = [names for names in units_of(left, unit)[0].values() if set(names) <= set(plan.names)]
        if len(taken) != count or len(plan.blocks) != sum(map(len, taken)):
            given = len(plan.blocks) if unit == "block" else quoted(plan.names)
            raise InputError(f"choose was asked for {count} {unit}s and gave {given}.")
        small = remove(small, left, plan, compact=compact and turn + 1 == rounds)
        heal(small, model)
        if turn + 1 < rounds:
            left = find_blocks(small, blocks.example)
            left = left.select([name for name in left.names if name in blocks.names])
    return small
