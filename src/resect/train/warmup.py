"""Run a model through every state that a method can put its compiled blocks in, and leave it as it was."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resect.blocks.block import Blocks
from resect.blocks.compiled import by_owner
from resect.blocks.example import Forward, forward_batch
from resect.blocks.gate import held
from resect.blocks.hooks import accumulating_in_silence
from resect.blocks.modes import kept_buffers, kept_modes
from resect.blocks.state import Mode
from resect.blocks.template import tensors_in
from resect.blocks.unwrap import eager, is_compiled
from resect.errors import AttachError


class Warmable:
    """The part of a method that compiles, before training, all that its blocks will be in some step."""

    model: nn.Module
    blocks: Blocks
    gate_mode: Mode
    _begun: bool
    _stepped: set[int]
    _moves: bool = True
    """Whether other code runs in other steps: blocks open and close, weights are frozen."""

    def warmup(self, batch: Any, forward: Forward | None = None) -> int:
        """Compile, before training, all that compiled blocks will be in some step; return how many graphs that made.

        Runs ``batch`` forward and backward through every state that the blocks of one owner can be in together, and
        forward in eval mode, without gradients. Weights, buffers, gradients, random numbers, gates and counters are
        as before afterwards.

        Parameters
        ----------
        batch: of the shape, dtype and device of training, as for ``lesion_study``; another size of batch (the
            last one of an epoch, a test batch) is another graph: call again with one of those.
        forward: ``(model, batch) -> output`` where the default rule does not fit. Call it under autocast if
            training is.

        Raises ``AttachError`` if the method is not attached, a step is under way, or nothing is compiled.

        >>> resect.compile(model, blocks)
        >>> with method:
        ...     method.warmup(next(iter(loader)))
        """
        if not self.attached or (self._begun and not self._stepped):
            raise AttachError(
                "warmup() comes after attach() and before begin_step(): write `with method:` and call it ahead of "
                "the loop."
            )
        return warm_up(self, batch, forward or forward_batch)

    @property
    def attached(self) -> bool:
        """Whether the method acts on the model now."""
        raise NotImplementedError

    def _states(self, picked: list[bool]) -> Iterator[None]:
        """Take on, one after the other, all that a step can make of the blocks when it picks these; yield in each."""
        yield


def warm_up(method: Warmable, batch: Any, forward: Forward) -> int:
    """Run ``batch`` through every state; return how many graphs were compiled."""
    from torch._dynamo.utils import counters

    model = method.model
    owners = [owner for owner in by_owner(method.blocks) if is_compiled(model.get_submodule(owner))]
    if not owners:
        raise AttachError(
            "warmup() is for compiled blocks, and no owner of this method's blocks is compiled. Call "
            "resect.compile(model, blocks) before the method is attached."
        )
    before = counters["stats"]["unique_graphs"]
    with untouched(method, model):
        if not model.training:
            model.train()
        late = [] if _always_needed(method, model, owners, batch, forward) else [False, True]
        for picked in picks(method.blocks, owners, late):
            for _ in method._states(picked):
                _run(model, batch, forward)
                if method.gate_mode is None:
                    _evaluate(model, batch, forward)
            _evaluate(model, batch, forward)  # nothing is frozen here
    return int(counters["stats"]["unique_graphs"] - before)


def picks(blocks: Blocks, owners: list[str], late: list[bool]) -> Iterator[list[bool]]:
    """Yield choices of blocks so that those of each owner are picked in every combination.

    For every value in ``late``: once more per owner, with all blocks before it picked, or not picked, alike:
    in some step nothing before it learns, so that nothing asks for its gradient.
    """
    places = {owner: [place for place, block in enumerate(blocks) if block.owner == owner] for owner in owners}
    most = max(map(len, places.values()))

    def choice(pattern: int, start: int = 0, fill: bool = False) -> list[bool]:
        picked = [fill] * len(blocks)
        for mine in places.values():
            for bit, place in enumerate(mine):
                if place >= start:
                    picked[place] = bool(pattern >> bit & 1)
        return picked

    for pattern in range(1 << most):
        yield choice(pattern)
    for fill, mine in itertools.product(late, places.values()):
        for pattern in range(1 << len(mine)):
            if any(bool(pattern >> bit & 1) != fill for bit in range(len(mine))):
                yield choice(pattern, mine[0], fill)


def _always_needed(method: Warmable, model: nn.Module, owners: list[str], batch: Any, forward: Forward) -> bool:
    """Whether what comes into every owner requires its gradient in all of the method's states."""
    needed: list[bool] = []

    def look(module: nn.Module, args: Any, kwargs: Any) -> None:
        needed.append(any(tensor.requires_grad for tensor in tensors_in([args, kwargs])))

    hooks = [model.get_submodule(owner).register_forward_pre_hook(look, with_kwargs=True) for owner in owners]
    try:
        with eager():
            for fill in (True, False):
                for _ in method._states([fill] * len(method.blocks)):
                    forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return all(needed)


def _run(model: nn.Module, batch: Any, forward: Forward) -> None:
    """One pass forward and backward, without a trace in ``.grad``."""
    outputs = [leaf for leaf in tensors_in(forward(model, batch)) if leaf.requires_grad]
    if outputs:
        with accumulating_in_silence(model):
            torch.autograd.backward([leaf.float().sum() for leaf in outputs])
    for parameter in model.parameters():
        parameter.grad = None


def _evaluate(model: nn.Module, batch: Any, forward: Forward) -> None:
    with kept_modes(model), torch.no_grad():
        forward(model.eval(), batch)


@contextmanager
def untouched(method: Warmable, model: nn.Module) -> Iterator[None]:
    """Put everything back that states and passes change: of the model, its gates and the method."""
    own = [thing for thing in vars(method).values() if type(thing).__module__.startswith("resect.train.")]
    objects = [method, *own, *held(model)]
    attributes = [(thing, dict(vars(thing)), _copies(vars(thing))) for thing in objects]
    gradients = [(parameter, parameter.grad, parameter.requires_grad) for parameter in model.parameters()]
    devices = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers()) if tensor.is_cuda}
    try:
        with kept_modes(model), kept_buffers(model), torch.random.fork_rng(devices), torch.enable_grad():
            for parameter in model.parameters():
                parameter.grad = None
            yield
    finally:
        for parameter, gradient, wanted in gradients:
            parameter.requires_grad_(wanted).grad = gradient
        with torch.no_grad():
            for thing, before, copies in attributes:
                vars(thing).clear()
                vars(thing).update(before)
                for name, value in copies.items():
                    before[name].copy_(value)


def _copies(attributes: dict[str, Any]) -> dict[str, Tensor]:
    """Copy the tensors among attributes but those of a graph, which nobody writes."""
    return {n: v.clone() for n, v in attributes.items() if isinstance(v, Tensor) and not v.requires_grad}
