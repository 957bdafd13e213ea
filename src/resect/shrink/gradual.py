"""Cut a little, heal, and again: between two cuts what is left learns to do without."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.find import find_blocks
from resect.blocks.gate import resolve
from resect.blocks.plan import Plan
from resect.blocks.unwrap import unwrap
from resect.errors import BlocksError, InputError
from resect.shrink.remove import Names, remove

Choose = Callable[[nn.Module, Blocks, int], Names]
"""``choose(model, blocks, n)``: a plan, or the names, of the next n blocks to go."""
Heal = Callable[[nn.Module, nn.Module], object]
"""``heal(small, model)`` trains the cut model in place; ``model`` is the uncut one, as a teacher."""


def shrink_gradually(
    model: nn.Module, blocks: Blocks, n: int, *, choose: Choose, heal: Heal, rounds: int | None = None
) -> nn.Module:
    """Remove ``n`` blocks in several rounds, healing what is left after each; return the smaller model.

    Which blocks go next is asked anew after every round, of the healed model. Each cut is proven as ``remove`` does.

    Parameters
    ----------
    model, blocks: as in ``remove``; the model is left alone. The blocks must carry their example.
    n: how many blocks go in all.
    choose: ``choose(small, blocks, k)`` gives a plan, or names, of k of the blocks that are left.
    heal: ``heal(small, model)`` trains the cut model in place, however it likes: ``mimic``, a loop with
        ``Distillation``, ``recalibrate``.
    rounds: how many cuts, 1 … n; by default one block at a time.

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
    if not whole or not 1 <= rounds <= n <= len(blocks):
        raise InputError(
            f"shrink_gradually(n={n!r}, rounds={rounds!r}): n must be from 1 to {len(blocks)}, the number of blocks, "
            "and rounds from 1 to n."
        )
    small, left = model, blocks
    for turn in range(rounds):
        count = n * (turn + 1) // rounds - n * turn // rounds
        plan = Plan.of(left, choose(small, left, count))
        if len(plan.blocks) != count:
            raise InputError(f"choose was asked for {count} blocks and gave {len(plan.blocks)}.")
        small = remove(small, left, plan)
        heal(small, model)
        if turn + 1 < rounds:
            left = find_blocks(small, blocks.example)
    return small
