"""Where a gradient is asked for: the model's input, or what enters a block, seen to be that before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from resect.blocks.block import ResidualBlock
from resect.blocks.gate import Gates
from resect.blocks.state import Gate
from resect.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where the gradient is taken: a block (None: the model's input), and by what it is seen there.

    ``alone`` is the shape of the value for one sample; ``addition`` says that it is seen as the other operand of the
    block's addition, not as what its first module gets.
    """

    at: str
    block: ResidualBlock | None
    fork: tuple[str, ...] = ()
    addition: bool = False
    alone: tuple[int, ...] = ()

    def rows(self, gradient: Tensor, size: int) -> Tensor:
        """Return each sample's part of a gradient as one row, (size, …)."""
        if size == 1:
            return gradient.reshape(1, -1)
        axes = [axis for axis, (one, all_) in enumerate(zip(self.alone, gradient.shape, strict=True)) if one != all_]
        if len(axes) != 1 or (self.alone[axes[0]], gradient.shape[axes[0]]) != (1, size):
            raise InputError(
                f"What enters {self.at!r} has the shape {self.alone} for one sample and {tuple(gradient.shape)} for "
                f"{size}, so no dimension of it is that of the samples. Pass a batch of one sample."
            )
        return gradient.movedim(axes[0], 0).flatten(1)

    def norms(self, gradient: Tensor, size: int) -> Tensor:
        """Return the L2 norm of each sample's part of a gradient, (size,)."""
        return self.rows(gradient, size).norm(dim=1)


@dataclass
class Seen:
    """The value at a place, as the graph knows it: its gradient's edge, and its shape."""

    edge: GradientEdge | None = None
    shape: tuple[int, ...] = ()

    def note(self, value: Any) -> None:
        """Keep the first value that has a gradient."""
        if self.edge is None and isinstance(value, Tensor) and value.requires_grad:
            # An edge, not the tensor: the model may write into that later.
            self.edge, self.shape = get_gradient_edge(value), tuple(value.shape)


def join_seen(gate: Gate, note: Callable[[Tensor], None]) -> None:
    """Let a gate do at its addition what it does now, and note the other operand."""
    function, join = gate.function, gate.join

    def joined(shortcut: Tensor, branch: Tensor) -> Tensor:
        note(shortcut)
        branch = branch if function is None else function(branch)
        return shortcut + branch if join is None else join(shortcut, branch)

    gate.join_by(joined)


@contextmanager
def looking(model: nn.Module, place: Place, leaves: list[Tensor], handle: Gates) -> Iterator[Seen]:
    """Note the value at a place during one forward pass, whose floating-point inputs are ``leaves``."""
    seen = Seen()
    hooks: list[Any] = []
    if place.block is None:
        for leaf in leaves:
            seen.note(leaf if leaf.is_floating_point() else None)
        tokens = [leaf for leaf in leaves if not leaf.is_floating_point()]
        for module in model.modules() if seen.edge is None else ():
            if isinstance(module, nn.Embedding):
                hooks.append(module.register_forward_hook(_looked_up(tokens, seen)))
    elif place.addition:
        for name in place.fork:
            join_seen(handle[name], seen.note)
    else:
        module, call = model.get_submodule(place.block.modules[0]), place.block.calls[0] or 0
        hooks.append(module.register_forward_pre_hook(_entered(call, seen), with_kwargs=True, prepend=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _looked_up(tokens: list[Tensor], seen: Seen) -> Callable[..., None]:
    """A hook that notes what an embedding makes of the batch's own tokens, not of positions."""

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        ids = args[0] if args and isinstance(args[0], Tensor) else None
        if ids is not None and any(torch.equal(ids.flatten(), own.flatten()) for own in tokens):
            seen.note(output)

    return hook


def _entered(call: int, seen: Seen) -> Callable[..., None]:
    """A hook that notes the first tensor that a module gets at one of its calls."""
    calls = [0]

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch._C._current_graph_task_id() == -1:  # not a recomputation
            if calls[0] == call:
                seen.note(next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None))
            calls[0] += 1

    return hook
