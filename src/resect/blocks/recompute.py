"""Gradient checkpointing: a forward pass is recomputed as it was, or the recomputation raises.

Both kinds of checkpoint keep the function that they will call again. While a gate serves a forward pass
under one, that function is wrapped, and the wrapper remembers the gate's version: so it is found out also
when the gate was taken off since, and when two forward passes with different gates wait for one backward.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

from resect.errors import AttachError

_TOP_HOOKS = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class Versioned(Protocol):
    """What is asked of a gate."""

    block: Any
    version: int

    @property
    def state(self) -> str:
        """``open``, or anything else."""
        ...


class Recomputed:
    """A checkpoint's function: raises, when called again, if a gate is not as it was the first time."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.seen: dict[Versioned, tuple[int, str]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Check every gate that served the forward pass, then recompute it."""
        for gate, (version, state) in self.seen.items():
            if gate.version != version and (state, gate.state) != ("open", "open"):
                raise changed(gate)
        return self.function(*args, **kwargs)


def changed(gate: Versioned) -> AttachError:
    """Return the error for a gate that is not what it was in the forward pass."""
    return AttachError(
        f"The gate of {gate.block.name!r} changed between a forward pass and its recomputation by gradient "
        "checkpointing: the gradients would be wrong. Change gates, and leave their `with`, only after backward()."
    )


def is_recomputing() -> bool:
    """Whether this forward pass is a recomputation inside a backward pass (gradient checkpointing)."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def stamp(gate: Versioned, training: bool) -> None:
    """Note the gate's version in the checkpoint, if any, whose forward pass is running."""
    hooked = _TOP_HOOKS is None or _TOP_HOOKS(False)  # somebody changes what is saved for the backward pass
    if not (hooked or training):  # asked first, because it is quick and mostly true
        return
    if torch.is_grad_enabled():
        holder, attribute = _non_reentrant() if hooked else None, "recompute_fn"
    elif training:  # outside training, no gradient enabled means inference: not worth a look at the stack
        holder, attribute = reentrant(), "run_function"
    else:
        return
    if holder is None:
        return
    function = getattr(holder, attribute)
    if not isinstance(function, Recomputed):
        function = Recomputed(function)
        setattr(holder, attribute, function)
    function.seen.setdefault(gate, (gate.version, gate.state))


def _non_reentrant() -> Any:
    """Return the frame of the checkpoint that saves tensors now: its hooks close over it."""
    if _TOP_HOOKS is None:  # this torch does not tell its hooks; the generator that holds the frame is on the stack
        return _on_stack("checkpoint", "gen", _frame_of)
    for cell in getattr(_TOP_HOOKS(False)[0], "__closure__", None) or ():
        with suppress(ValueError):  # a cell that is still empty
            frame = cell.cell_contents
            frame = frame() if isinstance(frame, weakref.ref) else frame
            if hasattr(frame, "recompute_fn"):
                return frame
    return None


def _frame_of(generator: Any) -> Any:
    return generator.gi_frame.f_locals.get("new_frame") if getattr(generator, "gi_frame", None) else None


def reentrant() -> Any:
    """Return the context of the checkpoint function on the stack, torch's or one written like it."""
    return _on_stack("forward", "ctx", lambda ctx: ctx if hasattr(ctx, "run_function") else None)


def _on_stack(function: str, variable: str, pick: Callable[[Any], Any]) -> Any:
    """Return what ``pick`` finds in a variable of the innermost running function of that name."""
    frame: Any = inspect.currentframe()  # torch 2.6's compiler warns of sys._getframe, not of this
    while frame is not None:
        if frame.f_code.co_name == function and variable in frame.f_code.co_varnames:
            found = pick(frame.f_locals.get(variable))
            if found is not None:
                return found
        frame = frame.f_back
    return None
