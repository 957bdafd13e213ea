"""Small residual networks, written by hand, whose every path can be enumerated."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class Branch(nn.Module):
    """Norm, linear, GELU, linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


class Block(nn.Module):
    """``x + branch(x)``; with ``parallel``, ``x + a(x) + b(x)``: one sum of two branches."""

    def __init__(self, width: int, parallel: bool = False) -> None:
        super().__init__()
        self.a = Branch(width)
        self.b = Branch(width) if parallel else None

    def forward(self, x: Tensor) -> Tensor:
        if self.b is None:
            return x + self.a(x)
        return x + self.a(x) + self.b(x)

    @property
    def branches(self) -> list[nn.Module]:
        return [self.a] if self.b is None else [self.a, self.b]


class Net(nn.Module):
    """A stem, residual blocks, a head."""

    def __init__(self, parallel: tuple[bool, ...] = (False, False, False), width: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.layers = nn.ModuleList(Block(width, p) for p in parallel)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def one_path(net: Net, x: Tensor, choice: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return (logits, stem output): every value as in the whole net, gradients along one path only.

    ``choice`` gives per layer -1 for the shortcut, else the number of the branch taken.
    """
    start = stream = net.stem(x)
    for layer, chosen in zip(net.layers, choice, strict=True):
        terms = [stream, *(branch(stream) for branch in layer.branches)]
        stream = sum(term if place == chosen + 1 else term.detach() for place, term in enumerate(terms))
    return net.head(stream), start


def gradients_by_length(net: Net, x: Tensor, target: Tensor) -> dict[int, list[Tensor]]:
    """Return {length: the gradient (B, width) of every single path of that length}, by brute force."""
    found: dict[int, list[Tensor]] = {}
    for choice in itertools.product(*(range(-1, len(layer.branches)) for layer in net.layers)):
        logits, start = one_path(net, x, choice)
        loss = nn.functional.cross_entropy(logits, target, reduction="sum")
        gradient = torch.autograd.grad(loss, start)[0]
        found.setdefault(sum(c >= 0 for c in choice), []).append(gradient)
    return found
