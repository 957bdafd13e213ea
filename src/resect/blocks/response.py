"""What comes out of a branch: its largest response, and how to look at branch ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from resect.blocks.example import Example
from resect.blocks.gate import Gates, Which, gates
from resect.blocks.modes import kept_buffers, kept_modes
from resect.blocks.unwrap import eager

Seen = TypeVar("Seen")


def largest_response(branch: Tensor) -> Tensor:
    """Return ``max|branch|`` as a tensor (), float32 at least; NaN if any element is NaN, infinite if there is none."""
    if not branch.numel():
        return branch.new_full((), float("inf"))
    low, high = torch.aminmax(branch.detach())
    largest = torch.maximum(high, -low)
    return largest if largest.dtype == torch.float64 else largest.float()  # or ε would be rounded as the branch is


def relative_response(branch: Tensor, shortcut: Tensor) -> Tensor:
    """Return ``max|branch|`` in units of the stream: over the root mean square of the shortcut, as a tensor ()."""
    return in_units_of_stream(sizes(branch, shortcut)[None])


def sizes(branch: Tensor, shortcut: Tensor) -> Tensor:
    """Return ``max|branch|``, the sum of the shortcut's squares, and their number: (3,), float32 at least."""
    largest = largest_response(branch)
    squares = shortcut.detach().to(largest.dtype).square().sum()
    return torch.stack([largest, squares, largest.new_tensor(shortcut.numel())])


def in_units_of_stream(rows: Tensor) -> Tensor:
    """Return the relative response of a batch in several parts, each a row of `sizes`: (parts, 3) to ()."""
    size = (rows[:, 1].sum() / rows[:, 2].sum()).sqrt()
    return rows[:, 0].max() / size.clamp(min=torch.finfo(torch.float32).tiny)


class WatchSum:
    """A join that adds as the model does and takes down max|f| in units of the stream's size."""

    def __init__(self, name: str, seen: dict[str, Any]) -> None:
        self.name, self.seen = name, seen

    def __call__(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Return ``shortcut + branch``."""
        self.seen[self.name] = float(relative_response(branch, shortcut))
        return shortcut + branch


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


def watch_sums(gates: Gates) -> dict[str, Any]:
    """Watch every gate's sum: the dict returned holds max|f| in units of the stream by name."""
    seen: dict[str, Any] = {}
    for gate in gates:
        gate.join_by(WatchSum(gate.block.name, seen))
    return seen


def look_on_example(
    model: nn.Module,
    which: Which,
    example: Example,
    look: Callable[[Tensor], Any] | None = None,
    *,
    relative: bool = False,
) -> dict[str, Any]:
    """Return ``look(branch end)`` of every branch on an example, in train mode, as a training step will see it.

    ``relative``: max|f| in units of the stream's size instead. Buffers, modes and random numbers are as before
    afterwards. An example too small for batch statistics is run in eval mode.
    """
    with (
        kept_modes(model), kept_buffers(model), torch.no_grad(), torch.random.fork_rng(), eager(),
        gates(model, which) as watched,
    ):  # fmt: skip
        seen = watch_sums(watched) if relative else watch(watched, look)
        try:
            example.run(model.train())
        except ValueError:  # batch norm: more than one value per channel, please
            example.run(model.eval())
    return seen
