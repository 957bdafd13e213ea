"""What comes out of a branch: its largest response, and how to look at branch ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from resect.blocks.example import Example
from resect.blocks.gate import Gates, Which, gates
from resect.blocks.modes import kept_modes

Seen = TypeVar("Seen")


def largest_response(branch: Tensor) -> Tensor:
    """Return ``max|branch|`` as a tensor (); NaN if any element is NaN."""
    low, high = torch.aminmax(branch.detach())
    return torch.maximum(high, -low)


class Watch(Generic[Seen]):
    """A gate function that lets the branch end pass and takes down what ``look`` says of it."""

    def __init__(self, name: str, look: Callable[[Tensor], Seen], seen: dict[str, Seen]) -> None:
        self.name, self.look, self.seen = name, look, seen

    def __call__(self, branch: Tensor) -> Tensor:
        """Return ``branch``."""
        self.seen[self.name] = self.look(branch)
        return branch


def watch(gates: Gates, look: Callable[[Tensor], Any] | None = None) -> dict[str, Any]:
    """Watch every gate's branch: the dict returned holds ``look(branch end)`` by name after each forward pass.

    ``look`` is by default max|f| as a number.
    """
    seen: dict[str, Any] = {}
    for gate in gates:
        gate.apply(Watch(gate.block.name, look or (lambda branch: float(largest_response(branch))), seen))
    return seen


def look_on_example(
    model: nn.Module, which: Which, example: Example, look: Callable[[Tensor], Any] | None = None
) -> dict[str, Any]:
    """Return ``look(branch end)`` of every branch on an example, in train mode, as a training step will see it.

    Buffers, modes and random numbers are as before afterwards. An example too small for batch statistics
    is run in eval mode.
    """
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with kept_modes(model), torch.no_grad(), torch.random.fork_rng(), gates(model, which) as watched:
        seen = watch(watched, look)
        try:
            try:
                example.run(model.train())
            except ValueError:  # batch norm: more than one value per channel, please
                example.run(model.eval())
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
    return seen
