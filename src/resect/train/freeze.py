"""Freeze parts of a model for one optimizer step: parameters, buffers and optimizer state bit for bit.

Three things move a weight that should stand still: its gradient, the optimizer's momentum and decay (which
act on a gradient of zeros too), and buffers written in the forward pass. So the frozen parameters need no
gradient while the step lasts (which also saves computing it), their ``.grad`` is None when the optimizer looks,
and their buffers are put back to what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Generic, Literal, TypeVar

import torch
from torch import nn

from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.nesting import around
from resect.blocks.state import Gate
from resect.blocks.units import is_sharded
from resect.errors import AttachError

Stillness = Literal["skip", "zero"]
Norms = Literal["batch", "moving", "eval"]
T = TypeVar("T")


class Freeze:
    """What stands still in one optimizer step, from the beginning of the step until ``release()``.

    ``stillness="skip"`` gives the optimizer no gradient (None): no update, momentum or weight decay.
    ``"zero"`` gives it zeros: momentum and decay go on, as in Huang's code (one flat parameter vector).
    ``holders``: the modules whose own buffers stand still.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        holders: Iterable[nn.Module] = (),
        stillness: Stillness = "skip",
        evaluating: Iterable[nn.Module] = (),
    ) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.saved = [
            (holder._buffers, name, buffer, buffer.detach().clone())
            for holder in holders
            for name, buffer in holder._buffers.items()
            if buffer is not None
        ]
        self.stillness = stillness
        self.evaluating = [module for module in evaluating if module.training]
        for parameter in self.parameters:
            parameter.requires_grad_(False)
        for module in self.evaluating:
            module.training = False

    def __str__(self) -> str:
        """Say what stands still; "" where no weight does."""
        return f"{len(self.parameters)} parameters" if self.parameters else ""

    def check(self) -> None:
        """Raise ``AttachError`` if a norm that was put in eval mode has been put back by someone else."""
        if any(module.training for module in self.evaluating):
            raise AttachError(
                'norms="eval" was undone: model.train() was called after begin_step(). Call it before begin_step().'
            )

    def forget_buffers(self) -> None:
        """Do not put buffers back: they have just been loaded."""
        self.saved = []

    def release(self, training: bool = True) -> None:
        """End the freezing: call when all backward passes of the step are done, before the optimizer looks.

        ``training``: whether the model is in train mode by now.
        """
        for parameter in self.parameters:
            parameter.requires_grad_(True)
            parameter.grad = torch.zeros_like(parameter) if self.stillness == "zero" else None
        with torch.no_grad():
            for buffers, name, buffer, before in self.saved:
                now = buffers.get(name)
                if now is not None and (now.dtype, now.device) != (before.dtype, before.device):
                    now.copy_(before)  # the model was cast or moved in the meantime
                else:
                    buffers[name] = buffer.copy_(before)  # a module may have put a new tensor in its place
        for module in self.evaluating:
            module.training = training
        self.parameters, self.saved, self.evaluating = [], [], []


def branch_parameters(model: nn.Module, block: ResidualBlock) -> list[nn.Parameter]:
    """Return all parameters that the block's branch uses."""
    raw = [model.get_parameter(name) for name in block.raw_parameters]
    return [parameter for name in block.modules for parameter in model.get_submodule(name).parameters()] + raw


def branch_modules(model: nn.Module, block: ResidualBlock) -> list[nn.Module]:
    """Return all modules of the block's branch."""
    return list({id(m): m for name in block.modules for m in model.get_submodule(name).modules()}.values())


class Share(Generic[T]):
    """Parameters, or modules, of a model, by the blocks that use them: what several share stands still if all do.

    ``used`` says what a block uses; one that is ``nested`` in the branch of another uses nothing while that is closed.
    The ``rest`` of ``everything`` is what is used, ``outside`` or by blocks that were not selected, whatever these do.
    """

    def __init__(
        self, everything: Iterable[T], blocks: Blocks, nested: Mapping[str, set[str]],
        used: Callable[[ResidualBlock], list[T]], outside: Iterable[T] = (),
    ) -> None:  # fmt: skip
        places = {name: place for place, name in enumerate(blocks.names)}
        users: dict[int, dict[str, set[int]]] = {id(item): {"": set()} for item in outside}
        for block in sorted(blocks.found, key=lambda block: block.sum):  # inner ones first
            inner = {name for name, outer in nested.items() if block.name in outer}
            needs = {places[name] for name in (block.name, *nested[block.name]) if name in places}
            for item in used(block):
                by = users.setdefault(id(item), {})
                if inner.isdisjoint(by):  # else it is used there, not here
                    by[block.name] = needs
        self._uses: list[tuple[T, list[set[int]]]] = []
        self.rest: list[T] = []
        for item in everything:
            needs_of = list(users.get(id(item), {"": set()}).values())
            if all(needs_of):
                self._uses.append((item, needs_of))
            else:
                self.rest.append(item)

    def only(self, places: set[int]) -> list[T]:
        """Return what nothing uses while these blocks are closed."""
        return [item for item, uses in self._uses if all(needs & places for needs in uses)]

    def any(self, places: set[int]) -> list[T]:
        """Return what at least one of these blocks uses."""
        return [item for item, uses in self._uses if any(needs & places for needs in uses)]


class Parts:
    """The parameters and modules of a model, sorted by block; the rest is of no branch (stem, shortcuts, head)."""

    def __init__(self, model: nn.Module, blocks: Blocks) -> None:
        nested, outside = around(blocks.found), _outside(model, blocks)
        self.modules = Share(model.modules(), blocks, nested, lambda block: branch_modules(model, block))
        self.parameters = Share(
            model.parameters(), blocks, nested, lambda block: branch_parameters(model, block), outside
        )
        self._known = _ids(model)
        self._blocks, self._sharded = blocks, is_sharded(model)

    def check(self, model: nn.Module, name: str) -> None:
        """Raise ``AttachError`` if the model's parameters are other objects than when it was sorted.

        Those of a model that has been sharded since are sorted anew.
        """
        if _ids(model) != self._known:
            if is_sharded(model) and not self._sharded:
                self.__init__(model, self._blocks)  # type: ignore[misc]
                return
            raise AttachError(
                f"The model's parameters were replaced while {name} is attached (load_state_dict(assign=True), a new "
                "head, or a cast). Detach first, then change the model, and attach again."
            )

    def freeze(
        self,
        frozen: list[bool],
        *,
        rest: bool,
        stillness: Stillness = "skip",
        norms: Norms = "batch",
        holders: Iterable[nn.Module] = (),
    ) -> Freeze:
        """Freeze the blocks marked True, with ``rest`` all that belongs to no block, and the buffers of ``holders``.

        ``norms``: their norms use the "batch" and keep their running statistics, let them go on "moving", or "eval".
        """
        still = {place for place, is_still in enumerate(frozen) if is_still}
        modules = self.modules.only(still) + (self.modules.rest if rest else [])
        return Freeze(
            self.parameters.only(still) + (self.parameters.rest if rest else []),
            {id(module): module for module in [*holders, *(modules if norms != "moving" else ())]}.values(),
            stillness,
            [module for module in modules if _is_norm(module)] if norms == "eval" else (),
        )

    def leave_out(self, places: Iterable[int], stillness: Stillness = "skip") -> None:
        """Take the gradients of whole blocks away, as ``freeze`` does, after the backward pass."""
        Freeze(self.parameters.only(set(places)), (), stillness).release()

    def leave_out_closed(self, gates: Iterable[Gate], stillness: Stillness = "skip") -> None:
        """Leave closed blocks out: ``zero_grad(set_to_none=False)`` gives zeros, on which momentum and decay act."""
        closed = [place for place, gate in enumerate(gates) if gate.is_closed and (gate.acts or gate.served)]
        self.leave_out(closed, stillness)


def check_modes(gates: Iterable[Gate], training: list[bool], name: str) -> None:
    """Raise ``AttachError`` if a block trains now that was in eval mode at ``begin_step()``: it was not frozen."""
    late = [gate.block.name for gate, before in zip(gates, training, strict=True) if gate.owner.training and not before]
    if late:
        raise AttachError(
            f"model.train() was called after {name}.begin_step(), which found {late[0]!r} in eval mode and left "
            f"{len(late)} such blocks alone. Call model.train() before begin_step()."
        )


def _outside(model: nn.Module, blocks: Blocks) -> list[nn.Parameter]:
    """Return what modules hold that are in no branch, without what a branch takes from there (a raw layer scale)."""
    inside = {module for block in blocks.found for module in branch_modules(model, block)}
    raw = {name for block in blocks.found for name in block.raw_parameters}
    return [
        parameter
        for path, module in model.named_modules(remove_duplicate=False)
        if module not in inside
        for name, parameter in module._parameters.items()
        if parameter is not None and (f"{path}.{name}" if path else name) not in raw
    ]


def _ids(model: nn.Module) -> set[int]:
    """The ids of all parameters. `parameters()` makes a name for each module on the way: this runs in every step."""
    found, seen, waiting = set[int](), set[int](), [model]
    for module in waiting:  # grows on the way
        if id(module) not in seen:
            seen.add(id(module))
            found.update(map(id, module._parameters.values()))
            waiting.extend(child for child in module._modules.values() if child is not None)
    return found - {id(None)}


def _is_norm(module: nn.Module) -> bool:
    """Whether the module keeps running statistics."""
    return getattr(module, "running_mean", None) is not None
