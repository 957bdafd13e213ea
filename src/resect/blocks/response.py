"""How large a branch's response is: what the ε-gate compares, and how to watch it."""

from __future__ import annotations

import torch
from torch import Tensor

from resect.blocks.gate import Gates


def largest_response(branch: Tensor) -> Tensor:
    """Return ``max|branch|`` as a tensor (); NaN if any element is NaN."""
    low, high = torch.aminmax(branch.detach())
    return torch.maximum(high, -low)


class Watch:
    """A gate function that lets the branch end pass and takes down its largest response."""

    def __init__(self, name: str, largest: dict[str, float]) -> None:
        self.name = name
        self.largest = largest

    def __call__(self, branch: Tensor) -> Tensor:
        """Return ``branch``."""
        self.largest[self.name] = float(largest_response(branch))
        return branch


def watch(gates: Gates) -> dict[str, float]:
    """Watch every gate's branch: the dict returned holds max|f| by name after each forward pass."""
    largest: dict[str, float] = {}
    for gate in gates:
        gate.apply(Watch(gate.block.name, largest))
    return largest
