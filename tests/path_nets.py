"""Nets with blocks beside and inside each other, whose every path can be followed alone; a reference for any net."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from nets import Branch
from torch import Tensor, nn

import resect


class Outer(nn.Module):
    """A branch that holds two sums of its own: one inner block, then two beside each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter = Branch(width)
        self.inner, self.left, self.right = Branch(width), Branch(width), Branch(width)
        self.leave = nn.Linear(width, width)

    def forward(self, x: Tensor, add: Any) -> Tensor:
        x = self.enter(x)
        x = add("inner", x, self.inner(x))
        return self.leave(add("pair", x, self.left(x), self.right(x)))


class Deep(nn.Module):
    """Two blocks beside each other, one with blocks inside, one plain: ``path`` says which way to go at every sum."""

    SUMS = (("first", 2), ("outer", 1), ("inner", 1), ("pair", 2), ("last", 1))

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, width), nn.Linear(width, 4)
        self.one, self.two = Branch(width), Branch(width)
        self.outer = Outer(width)
        self.last = Branch(width)
        self.path: dict[str, int] | None = None
        self.start: Tensor | None = None

    def _add(self, name: str, *terms: Tensor) -> Tensor:
        if self.path is not None:
            terms = tuple(term if place == self.path[name] else term.detach() for place, term in enumerate(terms))
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def forward(self, x: Tensor) -> Tensor:
        x = self.start = self.stem(x)
        x = self._add("first", x, self.one(x), self.two(x))
        x = self._add("outer", x, self.outer(x, self._add))
        x = self._add("last", x, self.last(x))
        return self.head(x)

    def blocks(self, x: Tensor) -> Any:
        """All seven blocks: by hand the one that looks like a long skip, and those inside its branch."""
        found = resect.find_blocks(self, x)
        for inner in ("outer", "outer.inner", "outer.left", "outer.right"):
            found = found + resect.block(self, x, branch=inner)
        return found

    def paths(self) -> list[dict[str, int]]:
        """Every path once: what happens inside a branch that it does not pass is no choice of its own."""
        ways = itertools.product(*(range(number + 1) for _, number in self.SUMS))
        found = {}
        for way in ways:
            path = dict(zip([name for name, _ in self.SUMS], way, strict=True))
            taken = {(name, place) for name, place in path.items() if place}
            if not path["outer"]:
                taken -= {(name, place) for name, place in taken if name in ("inner", "pair")}
            found[frozenset(taken)] = path
        return [PathOf(path, len(taken)) for taken, path in found.items()]

    def gradient_of(self, path: dict[str, int], x: Tensor, target: Tensor) -> Tensor:
        """The gradient along one path at what enters the first block, (B, width)."""
        self.path = path
        try:
            loss = nn.functional.cross_entropy(self(x), target, reduction="sum")
            found = torch.autograd.grad(loss, self.start, allow_unused=True)[0]
        finally:
            self.path = None
        return torch.zeros_like(self.start) if found is None else found


class PathOf(dict):
    """A path: the way at every sum; its length is the number of branches on it."""

    def __init__(self, ways: dict[str, int], length: int) -> None:
        super().__init__(ways)
        self.length = length

    def __len__(self) -> int:
        return self.length


def by_weighing(gradient: Any, handle: Any, lengths: int) -> Tensor:
    """The summed gradient of all paths of each length, for any model in float64: (lengths, …).

    Every branch's gradient is multiplied by z, its value is not; the gradient is then a polynomial in z whose
    coefficients are the wanted ones, and ``lengths`` values of z tell them apart. ``gradient()`` runs the model.
    """
    points = torch.cos(torch.pi * (torch.arange(lengths, dtype=torch.float64) + 0.5) / lengths)
    rows = []
    for z in points.tolist():
        for gate in handle:
            gate.apply(lambda branch, z=z: z * branch + (1 - z) * branch.detach())
        rows.append(gradient())
    powers = points[:, None] ** torch.arange(lengths, dtype=torch.float64)
    return torch.linalg.solve(powers, torch.stack(rows).flatten(1)).reshape(lengths, *rows[0].shape)
