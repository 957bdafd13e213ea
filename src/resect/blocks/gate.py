"""Open, close and scale residual blocks of a model, leaving no trace behind."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn

from resect.blocks.block import Blocks, Key, ResidualBlock
from resect.blocks.install import install, strip
from resect.blocks.ranks import meeting_place, said_by_all, several_ranks
from resect.blocks.state import PORT, REMOVED, Gate, Mode
from resect.blocks.units import is_sharded
from resect.blocks.unwrap import unwrap
from resect.errors import AttachError, BlocksError, InputError, check_all, quoted

Which: TypeAlias = "Blocks | Key | Iterable[Key]"

_found: weakref.WeakKeyDictionary[nn.Module, Blocks] = weakref.WeakKeyDictionary()


def remember(model: nn.Module, blocks: Blocks) -> None:
    """Keep the blocks of a model, so that names alone are enough later."""
    _found[model] = blocks


def remembered(model: nn.Module) -> Blocks:
    """Return the blocks that were found on a model; none where it was not searched."""
    return _found.get(model, Blocks(()))


def resolve(model: nn.Module, which: Which) -> Blocks:
    """Return the blocks of ``model`` meant by ``which``: Blocks, names, places or one of them.

    Raises ``BlocksError`` if names are given for a model whose blocks were never found, or if the blocks
    belong to another model.
    """
    model = unwrap(model)
    if not isinstance(which, Blocks):
        which = [which] if isinstance(which, (str, int, ResidualBlock)) else list(which)
        if all(isinstance(key, ResidualBlock) for key in which):
            which = Blocks(key for key in which if isinstance(key, ResidualBlock))
        elif model in _found:
            which = _found[model].select(which)
        else:
            raise BlocksError(
                f"The blocks of this {type(model).__name__} are not known yet, so {which!r} cannot be looked up. "
                "Call resect.find_blocks(model, example) first and pass what it returns."
            )
    present = dict(model.named_modules())
    missing = (
        f"{block.name!r} has no module {name!r} here"
        for block in which
        for name in (*block.modules, *(parameter.rpartition(".")[0] for parameter in block.raw_parameters))
        if name not in present
    )
    check_all(missing, f"These blocks do not belong to this {type(model).__name__}", BlocksError)
    return which


class Gates:
    """One gate per block, attached to a model until ``detach()``.

    ``g["layer3.4"]`` or ``g[0]`` is a gate: ``close()``, ``scale(0.5)``, ``apply(function)``, ``open()``.
    """

    def __init__(
        self,
        model: nn.Module,
        which: Which,
        *,
        holder: str = "gates",
        exclusive: bool = False,
        mode: Mode = None,
    ) -> None:
        self.blocks = resolve(model, which)
        model = unwrap(model)
        modules = dict(model.named_modules())
        self._gates = {b.name: Gate(b, holder, modules[b.owner], mode) for b in self.blocks}
        if exclusive:
            _check_free(model, self.blocks, holder)
        with ExitStack() as undo:
            for gate in self:
                install(modules, gate, undo)
            if holder == "gates" and several_ranks() and is_sharded(model):
                hook = model.register_forward_pre_hook(Agreement(self._gates), prepend=True)
                undo.callback(hook.remove)
            self._undo = undo.pop_all()

    def __getitem__(self, key: str | int) -> Gate:
        return self._gates[self.blocks[key].name]

    def __iter__(self) -> Iterator[Gate]:
        return iter(self._gates.values())

    def __len__(self) -> int:
        return len(self._gates)

    def detach(self) -> None:
        """Take every gate away; the model is exactly what it was."""
        self._undo.close()

    def __repr__(self) -> str:
        changed = [repr(gate) for gate in self if gate.state != "open"]
        return f"<Gates: {len(self)} blocks, {', '.join(changed) or 'all open'}>"


class Agreement:
    """A hook before the forward pass of a sharded model: raise where processes have closed other blocks.

    The units that they gather would not be the same, and torch would mix the weights of two without a word.
    """

    def __init__(self, gates: dict[str, Gate]) -> None:
        self.gates = gates

    def __call__(self, model: nn.Module, *_: Any) -> None:
        """Compare with the other processes; all of them must run the model with gates attached."""
        if torch.compiler.is_compiling():
            return
        shut = [name for name, gate in self.gates.items() if gate.is_closed]
        told = [said["closed"] for said in said_by_all({"closed": shut}, meeting_place(model))]
        for rank, others in enumerate(told):
            if others != shut:
                raise AttachError(
                    f"The processes have closed other blocks of a sharded model: {quoted(shut, 3) or 'none'} here, "
                    f"{quoted(others, 3) or 'none'} on process {rank}. Close the same blocks on all of them."
                )


def held(model: nn.Module) -> list[Gate]:
    """Return every gate on a model but those that stand for removed blocks."""
    ports = [module.__dict__[PORT] for module in model.modules() if PORT in module.__dict__]
    return [gate for port in ports for gate in port.gates if gate.holder != REMOVED]


def _check_free(model: nn.Module, blocks: Blocks, holder: str) -> None:
    """Raise if another training method already holds one of the blocks."""
    modules = {name for block in blocks for name in (*block.modules, *block.raw_parameters)}
    taken = {
        f"{gate.block.name!r} already has a {gate.holder}"
        for gate in held(model)
        if gate.holder != "gates" and (gate.block in blocks or _overlap(gate.block, blocks, modules))
    }
    check_all(sorted(taken), f"Cannot attach {holder} (detach the other method first)", AttachError)


def _overlap(block: ResidualBlock, blocks: Blocks, modules: set[str]) -> bool:
    numbered = any(call is not None for call in block.calls)
    return not numbered and bool(modules & {*block.modules, *block.raw_parameters})


@contextmanager
def gates(model: nn.Module, blocks: Which) -> Iterator[Gates]:
    """Attach one open gate per block for the length of a ``with`` statement.

    >>> with resect.gates(model, blocks) as g:
    ...     g["layer3.4"].close(); g["layer2.1"].scale(0.5)
    ...     output = model(x)

    On leaving, also by an exception, the model is exactly what it was. Lesions stack on training methods:
    a closed gate wins.
    """
    handle = Gates(model, blocks)
    try:
        yield handle
    finally:
        handle.detach()


@contextmanager
def closed(model: nn.Module, blocks: Which) -> Iterator[Gates]:
    """Run the model without these blocks for the length of a ``with`` statement.

    The branches are not computed, their gradients stay None and their buffers stand still.

    >>> with resect.closed(model, blocks[3:5]):
    ...     output = model(x)
    """
    with gates(model, blocks) as handle:
        for gate in handle:
            gate.close()
        yield handle


def detach(model: nn.Module) -> nn.Module:
    """Take every gate off a copy of a model that had a method or lesions attached; return it.

    A copy (deepcopy, ``AveragedModel``, pickle) carries its gates as they were when it was made, and no method
    leads them any more. The original is detached by its method, or by leaving the ``with``.

    >>> average = resect.detach(torch.optim.swa_utils.AveragedModel(model))
    """
    strip(model)
    return model


def check_number(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Raise ``InputError`` unless ``low <= value <= high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        span = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise InputError(f"{name} must be a number {span}, but is {value!r}.")


def check_detached(model: nn.Module) -> None:
    """Raise if any gate is attached to the model."""
    holders = sorted({gate.holder for gate in held(model)})
    if holders:
        raise AttachError(
            f"This model still has {', '.join(holders)} attached. Detach first: leave the `with`, or .detach(); a copy "
            "of an attached model: resect.detach(copy)."
        )
