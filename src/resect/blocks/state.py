"""The state of one gate: what acts on one branch, open, closed, or a function on the branch end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from resect.blocks.axes import Axes
from resect.blocks.block import ResidualBlock
from resect.blocks.recompute import changed, stamp
from resect.blocks.rows import Rows
from resect.errors import AttachError

PORT = "_resect_port"
REMOVED = "removed"
"""Holder of the gates that stand, for good, for removed blocks which share their modules."""
Mode: TypeAlias = Literal["training", "eval"] | None
"""When a gate acts: while the owner trains, while it does not, or always."""

_backward = torch._C._current_graph_task_id
"""Number of the backward pass that is running; -1: none."""


_tracings = [0]


def tracings() -> int:
    """Return how often a gate was compiled into code since this process began."""
    return _tracings[0]


def _traced() -> None:
    """Count. Called while code is compiled, and no part of it: what torch.compiler.assume_constant_result asks for."""
    _tracings[0] += 1


_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]  # that function imports all of the compiler


class OnRows(Protocol):
    """A function of the branch end that is 0 for some samples, and can say which rows are left."""

    def __call__(self, branch: Tensor, /) -> Tensor:
        """Return what takes the place of the branch end (samples, …)."""
        ...

    def rows(self, samples: int, device: torch.device) -> Rows:
        """Return the rows that are left, and their factor: one object for the whole forward pass."""
        ...


class Gate:
    """What acts on one branch: ``open``, ``closed``, or a function on the branch end.

    Several gates can act on one block; a closed one wins, functions apply in the order of attachment.
    A gate with a ``mode`` acts only while the block's owner is in it.
    """

    def __init__(self, block: ResidualBlock, holder: str, owner: nn.Module, mode: Mode = None) -> None:
        self.block = block
        self.holder = holder
        self.owner = owner  # a copy of the model copies it along, so that a copy's gates follow its own mode
        self.mode = mode
        self.is_closed = False
        self.function: Callable[[Tensor], Tensor] | None = None
        self.join: Callable[[Tensor, Tensor], Tensor] | None = None
        self.axes: Axes | None = None
        """What is known of the tensors that the branch meets, where it is computed on the function's rows alone."""
        self.changes = False
        """Whether it has a function or a join."""
        self.takes_over = False
        """Whether modules of the branch do not simply run: it is closed, or computed on some rows."""
        self.version = 0
        self.seen_version = 0
        self.served = False
        self.noted = False
        """Whether a forward pass ran, not inside compiled code, since this was last set to False."""

    def open(self) -> Gate:
        """Compute the branch and leave it as it is."""
        return self._become()

    def close(self) -> Gate:
        """Leave the branch out: not computed, no gradients, buffers untouched."""
        return self._become(is_closed=True)

    def scale(self, factor: float | Tensor) -> Gate:
        """Multiply the branch end by a number, or by a tensor that broadcasts against it."""
        return self.apply(Scale(factor))

    def apply(self, function: Callable[[Tensor], Tensor]) -> Gate:
        """Let ``function(branch_end)`` take the place of the branch end."""
        self._need_end("apply a function to the branch end")
        return self._become(function=function)

    def apply_on_rows(self, function: OnRows, axes: Axes) -> Gate:
        """Compute the branch on the samples of ``function.rows(samples, device)`` alone and add it to those.

        ``function`` itself, of the whole branch end, takes over where another gate looks at it too, and in a compiled
        graph. Both must come to the same.
        """
        self._need_end("compute some samples")
        return self._become(function=function, axes=axes)

    def join_by(self, join: Callable[[Tensor, Tensor], Tensor]) -> Gate:
        """Let ``join(shortcut, branch_end)`` take the place of the addition."""
        self._need_end("act on the addition")
        return self._become(join=join)

    @property
    def acts(self) -> bool:
        """Whether the owner is in the mode this gate is for."""
        return self.mode is None or (self.mode == "training") == self.owner.training

    @property
    def state(self) -> str:
        """``open``, ``closed``, ``scaled`` or ``custom``."""
        if self.is_closed:
            return "closed"
        if isinstance(self.function, Scale):
            return "scaled"
        return "open" if self.function is None and self.join is None else "custom"

    def _need_end(self, what: str) -> None:
        if self.block.end is None:
            raise AttachError(f"Cannot {what} of {self.block.name!r}: {self.block.reason}. It can be closed.")

    def _become(self, **state: Any) -> Gate:
        self.is_closed, self.function, self.join, self.axes = False, None, None, None
        self.__dict__.update(state)
        self.changes = self.function is not None or self.join is not None
        self.takes_over = self.is_closed or self.axes is not None
        self.version += 1
        return self

    def shuts(self) -> bool:
        """Whether a module of the branch that is called now must not simply run. Notes the forward pass."""
        if is_dynamo_compiling():
            _traced()
            # The mode first: what is compiled for evaluation must not depend on training's draws.
            return self.acts and self.is_closed
        self.note_forward()
        if not self.takes_over or not self.acts:
            return False
        self.served |= self.is_closed
        return True

    def note_forward(self) -> None:
        """Raise if a recomputation in a backward pass sees another state than the forward pass did."""
        if _backward() == -1:
            self.seen_version, self.noted = self.version, True
            stamp(self, self.owner.training)
        elif self.seen_version != self.version:
            raise changed(self)

    def __repr__(self) -> str:
        return f"<Gate {self.block.name}: {self.state}>"


class Scale:
    """Multiply by a factor. A class, not a closure, so that gates can be copied and pickled."""

    def __init__(self, factor: float | Tensor) -> None:
        self.factor = factor

    def __call__(self, branch: Tensor) -> Tensor:
        """Return ``factor * branch``."""
        return branch * self.factor


class Acting:
    """What the gates of one block do at its addition: first their functions, then one's own way of joining."""

    def __init__(self, gates: list[Gate]) -> None:
        self.gates = gates

    def change(self, branch: Tensor) -> Tensor:
        """Return what the functions of the gates, in order, make of the branch."""
        for gate in self.gates:
            if gate.function is not None and gate.acts:
                branch = gate.function(branch)
        return branch

    def join(self, other: Tensor, branch: Tensor) -> Tensor:
        """Return ``other + branch``, or what a gate has in its place."""
        for gate in self.gates:
            if gate.join is not None and gate.acts:
                return gate.join(other, branch)
        return other + branch
