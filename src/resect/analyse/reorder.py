"""Reordering: swap layers of a trained model and measure (Veit et al. 2016, section 4.3, figure 5b).

A layer is a child of the repeated container (``layer3.4``, ``blocks.5``): one or more residual blocks. Which layers
can change places is for ``swappable.py`` to say.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from resect.analyse.paths import times
from resect.analyse.subsets import distinct
from resect.blocks.unwrap import unwrap
from resect.errors import InputError


def kendall_tau(order: Sequence[int]) -> float:
    """Return Kendall's τ between an order of 0 … n−1 and the original one: 1 unchanged, −1 reversed.

    1 − 4·(pairs that changed sides) / (n(n − 1)), exact: an order has no ties.
    """
    n = len(order)
    if n < 2:
        raise InputError("Kendall's tau needs at least two places.")
    changed = sum(order[i] > order[j] for i in range(n) for j in range(i + 1, n))
    return 1 - 4 * changed / (n * (n - 1))


def random_orders(
    layers: Sequence[str], groups: Sequence[Sequence[str]], swaps: int, draws: int, seed: str
) -> tuple[list[tuple[int, ...]], bool]:
    """Draw ``draws`` different orders, none the original one unless ``swaps`` is 0; fewer where there are fewer.

    Returns them, and whether they are all there are.
    """
    possible = number_of_orders([len(group) for group in groups], swaps)
    if not possible:
        raise InputError(
            f"After {swaps} swaps everything stands where it stood: no more than two layers of a kind can change "
            "places. Ask for fewer swaps."
        )

    def moved(chance: random.Random) -> tuple[int, ...]:
        order = random_order(layers, groups, swaps, chance)
        while swaps and order == sorted(order):  # the swaps undid each other
            order = random_order(layers, groups, swaps, chance)
        return tuple(order)

    return distinct(moved, min(draws, possible), seed), possible <= draws


def number_of_orders(sizes: Sequence[int], swaps: int) -> int:
    """Return how many orders other than the original ``swaps`` swaps within groups of these sizes can give.

    An order that needs d swaps, d = places − cycles, can be had by d, d + 2, … of them. The orders of m layers by d
    are the coefficients of (1 + z)(1 + 2z)…(1 + (m − 1)z), the unsigned Stirling numbers of the first kind.
    """
    if not swaps:
        return 1
    by_need = [1]
    for size in sizes:
        for others in range(1, size):
            by_need = times(by_need, [1, others])
    return sum(number for need, number in enumerate(by_need) if 0 < need <= swaps and (swaps - need) % 2 == 0)


def random_order(
    layers: Sequence[str], groups: Sequence[Sequence[str]], swaps: int, chance: random.Random
) -> list[int]:
    """Swap ``swaps`` random pairs of layers, one after the other, each pair within one group of compatible ones.

    Every pair that is compatible is equally likely. Returns which layer then stands at each place.
    """
    at = {name: place for place, name in enumerate(layers)}
    pairs = [(a, b) for group in groups for i, a in enumerate(group) for b in group[i + 1 :]]
    order = list(range(len(layers)))
    for _ in range(swaps):
        one, other = (at[name] for name in chance.choice(pairs))
        order[one], order[other] = order[other], order[one]
    return order


def describe(layers: Sequence[str], order: Sequence[int]) -> str:
    """``layer3.1=layer3.4 layer3.4=layer3.1``: at which place which other layer stands."""
    return " ".join(f"{layers[place]}={layers[now]}" for place, now in enumerate(order) if place != now)


@contextmanager
def reordered(model: nn.Module, layers: Sequence[str], order: Sequence[int]) -> Iterator[None]:
    """Let layer ``order[i]`` stand at the place of layer i for the length of a ``with`` statement.

    Raises ``InputError`` on leaving if those that moved did not run in the order they were put in, once a pass.
    """
    root = unwrap(model)
    modules = [root.get_submodule(name) for name in layers]
    moved = [place for place, now in enumerate(order) if place != now]
    expected = [order[place] for place in moved]
    ran: list[int] = []
    hooks = [modules[i].register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i in moved]
    try:
        _place(root, {layers[place]: modules[order[place]] for place in moved})
        yield
    finally:
        _place(root, {layers[place]: modules[place] for place in moved})
        for hook in hooks:
            hook.remove()
    if moved and ran != expected * (len(ran) // len(moved)):
        raise InputError(
            f"The layers of this {type(root).__name__} did not run in the order they were put in: it holds them in a "
            "second place, or runs them as it likes. It cannot be reordered."
        )


def _place(root: nn.Module, modules: dict[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        root.get_submodule(parent)._modules[child] = module
