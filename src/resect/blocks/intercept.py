"""Intercept a module at ``__call__``, without rewriting the model or changing its ``state_dict``.

The module's class is swapped for a subclass with the same name that consults a ``Port`` first. The port
is a plain object in the module's ``__dict__``: deepcopy and pickle carry it along, so a copy of the model
has gates of its own. The swap is undone by rebuilding the *current* class without our part, never by
restoring a remembered class: sharding swaps classes too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from resect.blocks.absent import Joining, absent_like
from resect.blocks.block import ResidualBlock
from resect.errors import AttachError

PORT = "_resect_port"
Mode: TypeAlias = Literal["training", "eval"] | None
"""When a gate acts: while the owner trains, while it does not, or always."""


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
        self.version = 0
        self.seen_version = 0
        self.served = False

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
        self.is_closed, self.function, self.join = False, None, None
        self.__dict__.update(state)
        self.version += 1
        return self

    def note_forward(self) -> None:
        """Raise if a recomputation in a backward pass sees another state than the forward pass did."""
        if torch._C._current_graph_task_id() == -1:
            self.seen_version = self.version
        elif self.seen_version != self.version:
            raise AttachError(
                f"The gate of {self.block.name!r} changed between a forward pass and its recomputation by "
                "gradient checkpointing: the gradients would be wrong. Change gates only after backward()."
            )

    def __repr__(self) -> str:
        return f"<Gate {self.block.name}: {self.state}>"


class Scale:
    """Multiply by a factor. A class, not a closure, so that gates can be copied and pickled."""

    def __init__(self, factor: float | Tensor) -> None:
        self.factor = factor

    def __call__(self, branch: Tensor) -> Tensor:
        """Return ``factor * branch``."""
        return branch * self.factor


class Port:
    """What one intercepted module consults: the gates of its block, and its own part in the branch."""

    def __init__(self, block: ResidualBlock, position: int) -> None:
        self.block = block
        self.template = block.templates[position]
        self.is_end = block.modules[position] == block.end
        # Only the module nearest the addition gives values that the addition may swallow.
        last = block.end is None and position == len(block.modules) - 1
        self.pending: float = block.inner_adds if self.is_end or last else float("inf")
        self.gates: list[Gate] = []

    def absent(self, training: bool) -> Any:
        """Build what the module returns while its block is closed."""
        # In train mode the sum may be written where the trace, in eval mode, saw no write (in-place dropout).
        return absent_like(self.template, self.pending, self.block.clone or training)

    def finish(self, output: Any) -> Any:
        """Let every gate act on the branch end inside ``output``."""
        for gate in self.gates:
            if gate.function is not None and gate.acts:
                output = self._replace(output, gate.function)
        for gate in self.gates:
            if gate.join is not None and gate.acts:
                join = gate.join
                output = self._replace(output, lambda branch: Joining(((branch, join),)))  # noqa: B023
                break
        return output

    def _replace(self, output: Any, function: Callable[[Tensor], Any]) -> Any:
        leaf = self.block.end_leaf
        if leaf is None:
            return function(output)
        items = list(output)
        items[leaf] = function(items[leaf])
        return type(output)(items)


class Intercepted:
    """The part that the swapped class adds: look at the gates, then run, or do not run, the module."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module unless a gate is closed; at the branch end, let the gates act."""
        port: Port = self.__dict__[PORT]
        compiling = torch.compiler.is_compiling()
        for gate in port.gates:
            if not compiling:
                gate.note_forward()
            if gate.is_closed and gate.acts:
                if not compiling:
                    gate.served = True
                return port.absent(self.training)  # type: ignore[attr-defined]
        output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        return port.finish(output) if port.is_end else output

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (without(type(self)),), self.__getstate__()


def _rebuild(cls: type) -> Any:
    swapped: Any = intercepted_class(cls)
    return swapped.__new__(swapped)


@functools.cache
def intercepted_class(cls: type) -> type:
    """Return the subclass of ``cls``, with its name and module, that consults a port."""
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (Intercepted, cls), body)


def without(cls: type) -> type:
    """Return ``cls`` without our part, wherever in its ancestry that is."""
    if Intercepted in cls.__bases__:
        return next(base for base in cls.__bases__ if base is not Intercepted)
    if not issubclass(cls, Intercepted):
        return cls
    body = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    return type(cls.__name__, tuple(without(base) for base in cls.__bases__), body)


def install(module: nn.Module, block: ResidualBlock, position: int, gate: Gate) -> None:
    """Add a gate to a module, intercepting the module first if it is not yet."""
    port = module.__dict__.get(PORT)
    if port is None:
        port = Port(block, position)
        module.__dict__[PORT] = port
        module.__class__ = intercepted_class(type(module))  # type: ignore[arg-type]
    elif port.block != block:
        raise AttachError(
            f"Module {block.modules[position]!r} is already held by {port.block.name!r} "
            f"({', '.join(gate.holder for gate in port.gates)}), found under another name or on another trace. "
            "Detach that first."
        )
    port.gates.append(gate)


def uninstall(module: nn.Module, gate: Gate) -> None:
    """Take a gate away again, and the interception with the last one. Harmless when it is not there."""
    port = module.__dict__.get(PORT)
    if port is None or gate not in port.gates:
        return
    port.gates.remove(gate)
    if not port.gates:
        del module.__dict__[PORT]
        module.__class__ = without(type(module))
