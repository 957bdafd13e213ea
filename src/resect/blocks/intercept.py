"""Intercept a module at ``__call__``, without rewriting the model or changing its ``state_dict``.

The module's class is swapped for a subclass with the same name that consults a ``Port`` first. The port
is a plain object in the module's ``__dict__``: deepcopy and pickle carry it along, so a copy of the model
has gates of its own. The swap is undone by rebuilding the *current* class without our part, never by
restoring a remembered class: sharding swaps classes too.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.utils._pytree import tree_map_only

from resect.blocks.block import ResidualBlock
from resect.blocks.carried import Carried
from resect.blocks.cut import call_on_rows
from resect.blocks.frame import Frame, fast_path_off
from resect.blocks.inflight import InFlight, settled
from resect.blocks.making import making
from resect.blocks.state import PORT, Acting, Gate
from resect.blocks.template import handed_on, pick, replaced
from resect.blocks.twin import absent_output
from resect.blocks.upkeep import Upkeep
from resect.errors import AttachError


class Part:
    """What one module, at one or all of its calls, is in one block; and the gates of that block."""

    def __init__(self, block: ResidualBlock, position: int, upkeep: Upkeep) -> None:
        self.upkeep = upkeep
        self.block = block
        self.position = position
        self.call = block.calls[position]
        self.ends = position == block.end
        self.handed_on = handed_on(block.templates[position])
        self.gates: list[Gate] = []

    def instead(self, module: Any, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Do what gates that take over want instead of a plain call: nothing, or some rows of it. A closed one wins."""
        taking = [gate for gate in self.gates if gate.shuts()]
        if any(gate.is_closed for gate in taking):
            return self.absent(module, args, kwargs)
        gate = taking[0]
        if sum(other.changes and other.acts for other in self.gates) > 1:  # another function wants the whole branch
            output = run(*args, **kwargs)
            return self.finish(output) if self.ends else output
        assert gate.axes is not None
        rows: Any = gate.function
        pending = self.block.pending[self.position]
        output = call_on_rows(run, (self.block.modules[self.position],), rows.rows, gate.axes, pending, args, kwargs)
        for at, source in self.handed_on:  # others count on all samples of it
            output = replaced(output, at, pick({"args": args, "kwargs": kwargs}, source))
        return output

    def absent(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Build what the module returns while its block is closed; a cache keeps its length."""
        if self.upkeep:
            self.upkeep.keep(args, kwargs)
        return absent_output(self.block, self.position, module, args, kwargs)

    def finish(self, output: Any) -> Any:
        """Let every gate act on the branch end inside ``output``, or send it to its addition."""
        acting = [gate for gate in self.gates if gate.acts and gate.changes]
        if not acting:
            return output
        block = self.block
        if not block.exact or any(gate.join for gate in acting):
            pending = block.pending[self.position]
            return self._replace(output, lambda branch: Carried(((branch, Acting(acting)),), pending))
        for gate in acting:
            if gate.function is not None:
                output = self._replace(output, gate.function)
        return output

    def _replace(self, output: Any, function: Any) -> Any:
        leaf = self.block.end_leaf
        if leaf is None:
            return function(output)
        return replaced(output, leaf, function(pick(output, leaf)))


class Port:
    """What one intercepted module consults: its parts in branches, and what frames its own call."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self.frames: list[Frame] = []
        self.counters: list[Port] = []
        """Ports whose calls are counted during one call of this module; one entry per gate."""
        self.fast_path_off = 0
        """How many gates need the attention fast path off during this module's call."""
        self.counted = 0
        self.count: int | None = None
        self.thread: int | None = None
        """The thread that is inside a call which is framed or counted in."""

    def is_idle(self) -> bool:
        """Whether nothing needs this port any more."""
        return not (self.parts or self.frames or self.counters or self.fast_path_off or self.counted)

    @property
    def gates(self) -> list[Gate]:
        """Every gate that this module serves."""
        holders: list[Part | Frame] = [*self.parts, *self.frames]
        return [gate for holder in holders for gate in holder.gates]

    def claim(self) -> int | None:
        """Take what is framed and counted here for this thread; return whose it was."""
        if torch.compiler.is_compiling():
            return None
        me, before = threading.get_ident(), self.thread
        if before not in (None, me):
            gate = next(gate for port in (self, *self.counters) for gate in port.gates)
            raise AttachError(
                f"Two threads run the model at once while {gate.block.name!r} has a gate. Its modules are shared, or "
                "it begins at raw parameters, so that the calls of several threads cannot be told apart: give each "
                "thread a copy of the model, or leave such blocks open."
            )
        self.thread = me
        return before

    def next_call(self) -> int | None:
        """Return the number of the call that begins; None outside the module in which calls are counted."""
        if self.count is None:
            if torch._C._current_graph_task_id() != -1 and any(gate.state != "open" for gate in self.gates):
                raise AttachError(
                    f"{self.gates[0].block.name!r} shares its modules with other blocks, and gradient checkpointing "
                    "recomputes it alone: which call this is cannot be known. Checkpoint the module around all calls, "
                    f"{self.gates[0].block.counted_in or 'the model'!r}, or leave these blocks open."
                )
            return None
        self.count += 1
        return self.count - 1


class Intercepted:
    """The part that the swapped class adds: look at the gates, then run, or do not run, the module."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Do not announce the swapped class to a base class that keeps a register or wants options."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module unless a gate is closed; at the branch end, let the gates act."""
        port: Port | None = self.__dict__.get(PORT)  # all of this costs an open module 1 to 2 µs a call: keep it short
        if port is None:  # somebody kept this method when there was a gate: torch.compile(model), made meanwhile
            return type(self).__call__(self, *args, **kwargs)
        call = port.next_call() if port.counted else None
        for part in port.parts:
            if part.call is None or part.call == call:
                for gate in part.gates:
                    if gate.shuts():
                        if gate.is_closed and len(part.gates) == 1:  # as mostly: nothing else needs asking
                            return part.absent(self, args, kwargs)  # type: ignore[arg-type]
                        framed = port.frames or port.counters or port.fast_path_off
                        run = functools.partial(self._framed, port, call) if framed else super().__call__  # type: ignore[misc]
                        return part.instead(self, run, args, kwargs)
        if port.frames or port.counters or port.fast_path_off:
            output = self._framed(port, call, *args, **kwargs)
        else:
            output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        for part in port.parts:
            if part.ends and (part.call is None or part.call == call):
                for gate in part.gates:
                    # Compiled code would be bound to `changes`, also in the mode in which the gate does not act.
                    if is_dynamo_compiling() or gate.changes:
                        output = part.finish(output)
                        break
        return output

    def _framed(self, port: Port, call: int | None, /, *args: Any, **kwargs: Any) -> Any:
        frames = [frame for frame in port.frames if frame.call is None or frame.call == call]
        claims = bool(port.counters) or any(frame.claims for frame in frames)
        thread = port.claim() if claims else None
        entered: list[Frame] = []
        counted = [counter.count for counter in port.counters]
        try:
            for counter in port.counters:
                counter.count = 0
            for frame in frames:
                entered.append(frame)
                frame.enter()
            spreading = [frame.block.name for frame in frames if frame.spreads]
            with fast_path_off(bool(port.fast_path_off)), making(spreading):
                output = super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            for frame in reversed(entered):
                frame.leave()
            for counter, before in zip(port.counters, counted, strict=True):
                counter.count = before
            if claims:
                port.thread = thread
        if any(frame.block.unwrap for frame in frames):
            output = tree_map_only(InFlight, settled, output)
        return output

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


def port_of(module: nn.Module) -> Port:
    """Return the module's port, intercepting the module first if it is not yet."""
    port = module.__dict__.get(PORT)
    if port is None:
        port = module.__dict__[PORT] = Port()
        module.__class__ = intercepted_class(type(module))  # type: ignore[arg-type]
    return port


def release(module: nn.Module) -> None:
    """Undo the interception of a module that nothing needs intercepted any more."""
    port = module.__dict__.get(PORT)
    if port is not None and port.is_idle():
        del module.__dict__[PORT]
        module.__class__ = without(type(module))
