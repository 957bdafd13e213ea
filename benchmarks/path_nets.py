"""Residual nets with blocks after, beside and inside each other; one path alone, and all of them by brute force.

The naive side of ``path_gradients.py``, as it is written without Resect: at every sum the terms that are not on the
path are detached, so that values stay and gradients go one way.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Way = dict[str, int]
"""Per sum the term that the gradient goes through: 0 the shortcut, then the branches."""


def conv(width: int) -> nn.Sequential:
    """A pre-activation branch that is not zero at first."""
    return nn.Sequential(
        nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
        nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False),
    )  # fmt: skip


class Nested(nn.Module):
    """A branch with a sum of its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enter, self.inner = conv(width), conv(width)

    def forward(self, x: Tensor, name: str, add: Callable[..., Tensor]) -> Tensor:
        """Return the branch's value."""
        x = self.enter(x)
        return add(f"{name}/inner", x, self.inner(x))


class PathNet(nn.Module):
    """A stem, sums of one kind each ("plain", "parallel", "nested"), a head. Eval mode, so that samples are apart."""

    def __init__(self, kinds: list[str], width: int = 8) -> None:
        super().__init__()
        self.kinds = kinds
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width, 10)
        self.branches = nn.ModuleList(Nested(width) if kind == "nested" else conv(width) for kind in kinds)
        self.beside = nn.ModuleDict({str(i): conv(width) for i, kind in enumerate(kinds) if kind == "parallel"})
        self.way: Way | None = None
        self.start: Tensor | None = None

    def _add(self, name: str, *terms: Tensor) -> Tensor:
        if self.way is not None:
            terms = tuple(term if place == self.way[name] else term.detach() for place, term in enumerate(terms))
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores; ``start`` is what enters the first block."""
        x = self.start = self.stem(x)
        for number, (kind, branch) in enumerate(zip(self.kinds, self.branches, strict=True)):
            name = str(number)
            value = branch(x, name, self._add) if kind == "nested" else branch(x)
            others = [self.beside[name](x)] if kind == "parallel" else []
            x = self._add(name, x, value, *others)
        return self.head(x.mean(dim=(2, 3)))

    def ways(self) -> Iterator[tuple[int, Way]]:
        """Yield every path with its length; inside a branch that a path does not pass there is nothing to choose."""
        options: list[list[tuple[int, Way]]] = []
        for number, kind in enumerate(self.kinds):
            name = str(number)
            inside = {f"{name}/inner": 0} if kind == "nested" else {}
            fork = [(0, {name: 0} | inside), (1, {name: 1} | inside)]
            if kind == "parallel":
                fork.append((1, {name: 2}))
            if kind == "nested":
                fork.append((2, {name: 1, f"{name}/inner": 1}))
            options.append(fork)
        for choice in itertools.product(*options):
            yield sum(length for length, _ in choice), {k: v for _, way in choice for k, v in way.items()}

    def gradient(self, x: Tensor, y: Tensor, way: Way | None) -> Tensor:
        """Return the gradient at what enters the first block, along one path; None: along all."""
        self.way = way
        loss = F.cross_entropy(self(x), y, reduction="sum")
        self.way = None
        gradient = torch.autograd.grad(loss, self.start, allow_unused=True)[0]
        return torch.zeros_like(self.start) if gradient is None else gradient


def by_brute_force(net: PathNet, x: Tensor, y: Tensor) -> list[Tensor]:
    """Return the summed gradient of the paths of each length, path by path."""
    found: dict[int, Tensor] = {}
    for length, way in net.ways():
        found[length] = found.get(length, 0) + net.gradient(x, y, way)
    return [found[length] for length in sorted(found)]


def by_sampling(net: PathNet, x: Tensor, y: Tensor, length: int, draws: int) -> Tensor:
    """Return the mean gradient of some random paths of one length of a plain net."""
    draw, total = random.Random(length), torch.zeros(())
    for _ in range(draws):
        on_path = set(draw.sample(range(len(net.kinds)), length))
        total = total + net.gradient(x, y, {str(place): int(place in on_path) for place in range(len(net.kinds))})
    return total / draws
