"""Processes that train together need the same method: compared when it is attached, and named where it differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from resect.blocks.hooks import Hook
from resect.blocks.ranks import meeting_place, said_by_all, several_ranks
from resect.errors import AttachError, InputError, quoted
from resect.train.draws import draw_closed

_FAILED = "could not"
_AHEAD = 1000  # steps at which schedules are compared, beside the current one
_MOVING = {"steps", "plain_steps", "kind"}  # change while training
_FREE = {"muted_at_start", "own_drop", "compute", "sync"}  # may change over a resume: not what is trained


@contextmanager
def together(method: Any) -> Iterator[None]:
    """Attach a method on all processes or on none: what fails on one raises ``AttachError`` on the others too."""
    try:
        yield
    except Exception as error:
        if several_ranks():
            said_by_all({_FAILED: f"{type(error).__name__}: {error}"}, meeting_place(method.model))
        raise
    compare(method)


def compare(method: Any) -> None:
    """Raise ``AttachError`` on every process unless the method is the same on all of them, naming what differs."""
    if not several_ranks():
        return
    try:
        told = said_by_all(facts(method), meeting_place(method.model))
    except RuntimeError as error:  # a timeout, or a connection that broke
        raise AttachError(
            f"{method.name} is attached on this process, and another one did not answer: it ended, or does not attach. "
            "Every process must make and attach the same method; see what the others say."
        ) from error
    failed = [f"process {rank}: {said[_FAILED]}" for rank, said in enumerate(told) if _FAILED in said]
    if failed:
        raise AttachError(f"The training method cannot be attached on every process. {'; '.join(failed)}")
    differing = [key for key in told[0] if any(said.get(key) != told[0][key] for said in told)]
    if differing:
        differing = ["method"] if "method" in differing else differing
        found = "; ".join(_difference(key, [said.get(key) for said in told]) for key in differing)
        raise AttachError(
            f"The training method is not the same on every process: {found}. Draws would differ, and the processes "
            "drift apart or mix the weights of two blocks. Give all the same method, options, seed, blocks and state."
        )


def _difference(key: str, values: list[Any]) -> str:
    other = next(rank for rank, value in enumerate(values) if value != values[0])
    if all(isinstance(value, list) for value in (values[0], values[other])):
        parts = [
            f"{quoted(only, 3)} only on process {rank}"
            for rank, against in ((0, other), (other, 0))
            if (only := [item for item in values[rank] if item not in values[against]])
        ]
        return f"{key}: {', '.join(parts) or 'another order'}"
    return f"{key} is {values[0]!r} on process 0 and {values[other]!r} on process {other}"


def facts(method: Any) -> dict[str, Any]:
    """Return what must be the same on every process, as JSON: blocks, options, seed, step, draws."""
    drawn = draw_closed([0.5] * 64, getattr(method, "seed", 0), method.steps)  # another torch may draw otherwise
    found = options(method, method.steps) | {"draws": "".join("01"[bit] for bit in drawn)}
    for name in _MOVING & vars(method).keys():
        found[name] = repr(getattr(method, name))
    if hasattr(method, "muted_steps"):
        found["muted_steps"] = [f"{block}: {steps}" for block, steps in method.muted_steps().items()]
    return found


def options(method: Any, step: int = 0) -> dict[str, Any]:
    """Return what a method was made with, as JSON; schedules by their values at ``step`` and 1000 steps later."""
    found: dict[str, Any] = {"method": method.name, "blocks": method.blocks.names}
    for name, value in vars(method).items():
        if name.startswith("_") or name in _MOVING or name == "optimizer" or isinstance(value, nn.Module):
            continue
        if dataclasses.is_dataclass(value):
            found[name] = repr(value)
        elif callable(value):  # a schedule of the user's own
            found[name] = ", ".join(f"{_value(value, at)} at step {at}" for at in (step, step + _AHEAD))
        elif isinstance(value, (str, bool, int, float, tuple, list, type(None))):
            found[name] = repr(value)
    return found


def _value(schedule: Callable[[int], float], step: int) -> str:
    """Return what a schedule says of a step; one written for fewer steps says that it cannot."""
    try:
        return f"{float(schedule(step)):g}"
    except Exception as error:
        return type(error).__name__


def check_options(method: Any, saved: dict[str, Any]) -> None:
    """Raise ``InputError`` if a state was saved by a method that was made otherwise: it would not go on exactly."""
    now = options(method)
    differing = [key for key in now | saved if key not in _FREE and now.get(key) != saved.get(key)]
    if differing:
        differing = ["method"] if "method" in differing else differing
        found = "; ".join(_changed(key, saved.get(key), now.get(key)) for key in differing)
        raise InputError(
            f"This state was saved by a method that was made otherwise: {found}. Make the method as it "
            "was. To go on with other options on purpose, take over the steps alone: method.load_state_dict("
            'state | {"options": method.state_dict()["options"]}).'
        )


def _changed(key: str, before: Any, now: Any) -> str:
    if isinstance(before, list) and isinstance(now, list):
        more, less = (quoted([x for x in one if x not in other], 3) for one, other in ((now, before), (before, now)))
        return f"it had {len(before)} {key} (now gone: {less or 'none'}) and has {len(now)} (new: {more or 'none'})"
    return f"{key} was {before}, and is {now}"


def watch_wrapper(method: Any, undo: ExitStack) -> None:
    """Raise in the forward pass, until ``undo``, if the model runs in a wrapper that waits for every gradient."""
    if several_ranks():
        hook = Hook(lambda *_: _check_wrapper(method))
        undo.callback(method.model.register_forward_pre_hook(hook).remove)


def _check_wrapper(method: Any) -> None:
    """Raise ``AttachError`` where torch would notice a step later only, when the processes have drifted apart."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is None or (wrapper.find_unused_parameters and not wrapper.static_graph):
        return
    closed = [gate.block.name for gate in method._gates or () if gate.is_closed and gate.acts]
    what = f"{len(closed)} of {len(method.blocks)} blocks ({closed[0]!r} …)" if closed else str(method._freeze or "")
    if what:
        fault = "static_graph=True" if wrapper.static_graph else "find_unused_parameters=False"
        raise AttachError(
            f"{method.name} leaves {what} out of this step, but the DistributedDataParallel around the model waits for "
            f"all gradients in every step ({fault}). Wrap it so:\n"
            "  DistributedDataParallel(model, find_unused_parameters=True)\n"
            "With accelerate: "
            "Accelerator(kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)])."
        )
