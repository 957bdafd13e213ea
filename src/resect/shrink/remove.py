"""Remove residual blocks for good: their modules are taken out, and what is left equals the closed model."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import replace as changed
from typing import Any

import torch
from torch import Tensor, nn

from resect.blocks.absent import Absent, absent_of_shape
from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.frame import absent_parameter
from resect.blocks.gate import check_detached, closed, resolve
from resect.blocks.install import install
from resect.blocks.plan import Plan
from resect.blocks.state import PORT, REMOVED, Gate
from resect.blocks.trace import quiet
from resect.blocks.twin import absent_output, meta_copy
from resect.blocks.units import is_sharded
from resect.blocks.unwrap import unwrap
from resect.blocks.upkeep import Upkeep
from resect.blocks.verify import compare, observe
from resect.errors import BlocksError, InputError, ProofError
from resect.shrink.compact import compact as delete_emptied
from resect.shrink.history import grown, unspent

Names = Plan | Blocks | str | Iterable[str]


class Removed(nn.Module):
    """Stands where a branch module was: no parameters, nothing computed, the shortcut passes alone.

    What the model's code asks of the module itself still answers: plain attributes as they were, weights as
    values that were not computed.
    """

    def __init__(self, block: ResidualBlock, position: int, original: nn.Module, upkeep: Upkeep) -> None:
        super().__init__()
        self.block = block
        self.upkeep = upkeep
        self._position = position
        self.__dict__["_resect_twin"] = meta_copy(original)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's recorded output with an Absent for every tensor."""
        if self.upkeep:
            self.upkeep.keep(args, kwargs)
        return absent_output(self.block, self._position, self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        twin = self.__dict__.get("_resect_twin")
        if twin is None or name.startswith("__"):
            return super().__getattr__(name)
        found = getattr(twin, name)
        if isinstance(found, Tensor):
            return absent_of_shape(float("inf"), self.block, self.training, tuple(found.shape), found.dtype)
        return found

    def bare(self) -> dict[nn.Module | None, Removed]:
        """Return the stubs to put for each part of what took the branch's place; nothing did here."""
        return {}

    def extra_repr(self) -> str:
        """Show which block was here."""
        return self.block.name


def remove(
    model: nn.Module, blocks: Blocks, plan: Names, *, compact: bool = False, in_place: bool = False
) -> nn.Module:
    """Take residual blocks out of a model, and prove the result equal to the model with them closed.

    A model can be cut again and again: find the blocks of what is left, and the plan grows.

    Parameters
    ----------
    model: the model; left alone unless ``in_place``.
    blocks: its blocks, from ``find_blocks(model, example)``; the proof runs on that example.
    plan: a ``Plan``, or the names of the blocks to go.
    compact: delete the layers that are left without any block from their containers, renumber what follows and
        repair the model's own bookkeeping (``layer_idx``, a transformers ``config``); see ``docs/removing.md``.
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
    model = unwrap(model)
    plan = unspent(Plan.of(blocks, plan))
    if not plan.blocks:
        raise InputError("The plan removes nothing. Name at least one block, for instance blocks.names[-1].")
    if blocks.example is None:
        raise BlocksError("These blocks carry no example to prove the removal on. Use find_blocks(model, example).")
    check_detached(model)
    if is_sharded(model):
        raise BlocksError(
            f"This {type(model).__name__} is sharded by fully_shard (FSDP2): this process holds pieces of it. Load its "
            "full state dict (torch.distributed.checkpoint.state_dict, full_state_dict=True) into the model freshly "
            "built, and remove there: the names are the same."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ProofError(
            "The model is on the meta device, so there are no values to prove a removal on. Remove the blocks from the "
            "model with its weights: their names hold there too."
        )
    if any(block not in tuple(blocks) for block in plan.blocks):
        # A plan from another run of the same architecture: act on this model's own blocks.
        plan = changed(plan, blocks=tuple(blocks.select(plan.names)))
    gone = [repr(block.name) for block in plan.blocks if _is_gone(model, block)]
    if gone:
        raise InputError(
            f"Already removed from this {type(model).__name__}: {', '.join(gone)}. Find the blocks of what is left: "
            "resect.find_blocks(model, example)."
        )
    small = model if in_place else copied(model)
    with quiet(model):
        with closed(model, blocks.select(plan.names)):
            expected = observe(model, blocks.example, blocks)
        originals = take_out(small, plan.blocks)
        try:
            with quiet(small):
                difference = compare(expected, observe(small, blocks.example, blocks))
            if difference:
                raise ProofError(f"Removing {', '.join(plan.names)} does not give the closed model: {difference}.")
            deleted = delete_emptied(small, blocks.example) if compact else None
        except BaseException:
            put_back(small, originals)
            raise
    earlier = getattr(model, "resect_plan", None)  # cut before: the plan says all that is gone
    small.resect_plan = grown(earlier if isinstance(earlier, Plan) else None, plan, deleted)  # type: ignore[assignment]
    return small


def copied(model: nn.Module) -> nn.Module:
    """Return a deep copy; what was computed with gradients and kept (by weight norm, say) is copied as values."""
    memo = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    with torch.inference_mode(False):  # in it, the copy's weights could never be trained
        return copy.deepcopy(model, memo)


def _is_gone(model: nn.Module, block: ResidualBlock) -> bool:
    """Whether an earlier cut took a block out of a model."""
    modules = dict(model.named_modules())
    names = [*block.modules, *(name.rpartition(".")[0] for name in block.raw_parameters), block.owner]
    ports = [vars(modules[name]).get(PORT) for name in names]
    return (
        any(isinstance(part := modules[name], Removed) and not part.bare() for name in block.modules)
        or any(
            gate.holder == REMOVED and gate.block.name == block.name for port in ports if port for gate in port.gates
        )
        or any(isinstance(vars(modules[path]).get(name), Absent) for path, name in map(_split, block.raw_parameters))
    )


def _split(name: str) -> tuple[str, str]:
    path, _, attribute = name.rpartition(".")
    return path, attribute


def take_out(model: nn.Module, blocks: Iterable[ResidualBlock]) -> dict[str, Any]:
    """Put a ``Removed`` in the place of every branch module; return what was there.

    A raw parameter of a branch gives way to an ``Absent``, so that the owner's code still finds its name. What
    other blocks use too stays, and so does what the owner's call needs: a gate is closed there for good.
    """
    blocks = list(blocks)
    modules = dict(model.named_modules())
    originals: dict[str, Any] = {}
    for block in blocks:
        for name in block.raw_parameters if block.counted_in is None else ():
            parent, attribute = _parent(model, name)
            if attribute not in parent._parameters:
                continue
            stand_in = absent_parameter(block, name, parent)
            originals[name] = parent._parameters.pop(attribute)
            parent.__dict__[attribute] = stand_in
        for position, name in enumerate(block.modules):
            if block.calls[position] is not None:
                continue  # it also runs elsewhere
            part = modules[name]
            stubs = (
                part.bare()
                if isinstance(part, Removed)
                else {part: Removed(block, position, part, Upkeep.of(model, name)).train(part.training)}
            )
            for path, parent in [(path, parent) for path, parent in model.named_modules()]:
                for attribute, child in list(parent._modules.items()):
                    if child in stubs:
                        originals[f"{path}.{attribute}" if path else attribute] = child
                        setattr(parent, attribute, stubs[child])
        if block.counted_in is not None or block.unwrap or block.spreads:
            present = dict(model.named_modules())
            gate = Gate(block, REMOVED, present[block.owner]).close()
            with ExitStack() as undo:
                install(present, gate, undo)
                originals[f"{block.name} (gate)"] = undo.pop_all()
    return originals


def put_back(model: nn.Module, originals: dict[str, Any]) -> None:
    """Undo ``take_out``, last to first: what was taken from inside a branch finds its parent there again."""
    for name, original in reversed(originals.items()):
        if isinstance(original, ExitStack):
            original.close()
            continue
        parent, attribute = _parent(model, name)
        if isinstance(original, nn.Parameter):
            parent.__dict__.pop(attribute, None)
        setattr(parent, attribute, original)


def _parent(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, attribute = _split(name)
    return model.get_submodule(path), attribute
