"""Remove residual blocks for good: their modules are taken out, and what is left equals the closed model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from resect.blocks.absent import Absent, absent_like
from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.gate import check_detached, closed, resolve
from resect.blocks.plan import Plan
from resect.blocks.trace import quiet
from resect.blocks.verify import compare, observe
from resect.errors import BlocksError, InputError, ProofError

Names = Plan | Blocks | str | Iterable[str]


class Removed(nn.Module):
    """Stands where a branch module was: no parameters, nothing computed, the shortcut passes alone."""

    def __init__(self, block: ResidualBlock, position: int) -> None:
        super().__init__()
        self.block = block
        self._template = block.templates[position]
        nearest = block.modules[position] == (block.end or block.modules[-1])
        self._pending = block.inner_adds if nearest else float("inf")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's recorded output with an Absent for every tensor."""
        return absent_like(self._template, self._pending, self.block.clone or self.training)

    def extra_repr(self) -> str:
        """Show which block was here."""
        return self.block.name


def remove(model: nn.Module, blocks: Blocks, plan: Names, *, in_place: bool = False) -> nn.Module:
    """Take residual blocks out of a model, and prove the result equal to the model with them closed.

    A model can be cut again and again: find the blocks of what is left, and the plan grows.

    Parameters
    ----------
    model: the model; left alone unless ``in_place``.
    blocks: its blocks, from ``find_blocks(model, example)``; the proof runs on that example.
    plan: a ``Plan``, or the names of the blocks to go.
    in_place: change ``model`` itself instead of a copy.

    Returns
    -------
    The smaller model: same class, same forward code, the removed branches' parameters gone from its
    ``state_dict``; the other keys as before. ``small.resect_plan`` is the plan.

    Raises
    ------
    ProofError: the removed and the closed model differ on the example; nothing is returned or changed.
    InputError, BlocksError: the names, the plan or the blocks do not fit the model.
    AttachError: a gate or method is still attached.
    """
    blocks = resolve(model, blocks)
    plan = Plan.of(blocks, plan)
    if not plan.blocks:
        raise InputError("The plan removes nothing. Name at least one block, for instance blocks.names[-1].")
    if blocks.example is None:
        raise BlocksError("These blocks carry no example to prove the removal on. Use find_blocks(model, example).")
    check_detached(model)
    if any(block not in tuple(blocks) for block in plan.blocks):
        # A plan from another run of the same architecture: act on this model's own blocks.
        plan = Plan(tuple(blocks.select(plan.names)), plan.by, plan.scores, plan.evidence, plan.model)
    small = model if in_place else copy.deepcopy(model)
    with quiet(model):
        with closed(model, blocks.select(plan.names)):
            expected = observe(model, blocks.example, blocks)
        originals = take_out(small, plan.blocks)
        try:
            with quiet(small):
                difference = compare(expected, observe(small, blocks.example, blocks))
            if difference:
                raise ProofError(f"Removing {', '.join(plan.names)} does not give the closed model: {difference}.")
        except BaseException:
            put_back(small, originals)
            raise
    earlier = getattr(model, "resect_plan", None)
    if isinstance(earlier, Plan):  # cut before: the plan says all that is gone
        plan = replace(plan, blocks=(*earlier.blocks, *plan.blocks))
    small.resect_plan = plan  # type: ignore[assignment]
    return small


def take_out(model: nn.Module, blocks: Iterable[ResidualBlock]) -> dict[str, Any]:
    """Put a ``Removed`` in the place of every branch module; return what was there.

    A raw parameter of a branch gives way to an ``Absent``, so that the owner's code still finds its name.
    """
    originals: dict[str, Any] = {}
    for block in blocks:
        for name in block.raw_parameters:
            parent, attribute = _parent(model, name)
            originals[name] = parent._parameters.pop(attribute)
            setattr(parent, attribute, Absent())
        for position, name in enumerate(block.modules):
            parent, attribute = _parent(model, name)
            originals[name] = getattr(parent, attribute)
            setattr(parent, attribute, Removed(block, position).train(originals[name].training))
    return originals


def put_back(model: nn.Module, originals: dict[str, Any]) -> None:
    """Undo ``take_out``."""
    for name, original in originals.items():
        parent, attribute = _parent(model, name)
        if isinstance(original, nn.Parameter):
            parent.__dict__.pop(attribute, None)
        setattr(parent, attribute, original)


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    parent, _, attribute = name.rpartition(".")
    return model.get_submodule(parent), attribute
