"""What must hold around the call of a block's owner: raw parameters taken away, the attention fast path off.

An owner that is compiled has a frame too: gates are noted around the call, because inside nothing is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from resect.blocks.absent import Absent, absent_of_shape
from resect.blocks.block import ResidualBlock
from resect.blocks.carried import Carried
from resect.blocks.recompute import reentrant
from resect.blocks.state import Acting, Gate
from resect.errors import AttachError


class Frame:
    """Stands around the call of a block's owner where the branch begins, or ends, outside any module."""

    def __init__(self, block: ResidualBlock, holders: dict[str, nn.Module]) -> None:
        self.block = block
        self.call = block.owner_call
        self.holders = holders
        """Per raw parameter, the module that holds it."""
        self.gates: list[Gate] = []
        self._taken: list[tuple[nn.Module, str, nn.Parameter]] = []

    def enter(self) -> None:
        """Put an Absent, or a value that a gate will act on, in the place of raw parameters."""
        block = self.block
        for gate in self.gates:
            if not torch.compiler.is_compiling():
                gate.note_forward()
        acting = [gate for gate in self.gates if gate.acts]
        if any(gate.is_closed for gate in acting):
            for name in block.entries:
                stand_in = absent_parameter(block, name, self.holders[name])
                if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                    stand_in.__class__ = _Entry
                self._take(name, stand_in)
            if not torch.compiler.is_compiling():
                for gate in acting:
                    gate.served |= gate.is_closed
        elif block.end is not None and block.end >= len(block.modules):
            changing = [gate for gate in acting if gate.function or gate.join]
            if changing:
                name = block.raw_parameters[block.end - len(block.modules)]
                value = getattr(self.holders[name], name.rpartition(".")[2])
                self._take(name, Carried(((value, Acting(changing)),), block.pending[block.end]))

    @property
    def claims(self) -> bool:
        """Whether it changes what other threads would see meanwhile, or cannot tell their values apart."""
        block = self.block
        return bool(block.entries) or block.unwrap or (block.end is not None and block.end >= len(block.modules))

    @property
    def spreads(self) -> bool:
        """Whether what the closed branch would write may make tensors of the owner's own absent too."""
        return self.block.spreads and any(gate.is_closed and gate.acts for gate in self.gates)

    def _take(self, name: str, stand_in: Any) -> None:
        holder, attribute = self.holders[name], name.rpartition(".")[2]
        parameter = holder._parameters.pop(attribute, None)
        if parameter is not None:
            self._taken.append((holder, attribute, parameter))
            holder.__dict__[attribute] = stand_in

    def leave(self) -> None:
        """Give the parameters back."""
        while self._taken:
            holder, attribute, parameter = self._taken.pop()
            holder.__dict__.pop(attribute, None)
            holder._parameters[attribute] = parameter

    def __deepcopy__(self, memo: dict[int, Any]) -> Frame:
        twin = Frame(self.block, copy.deepcopy(self.holders, memo))
        twin.gates = copy.deepcopy(self.gates, memo)
        return twin


class _Entry(Absent):
    """A raw parameter that is absent during its owner's call, and back when a checkpoint in there recomputes."""

    def pass_through(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Begin the branch, unless the backward pass would begin it again, unnoticed, with the parameter."""
        if not torch.is_grad_enabled() and reentrant() is not None:
            raise AttachError(
                f"{self.block.name!r} begins at a raw parameter, inside reentrant gradient checkpointing: the "
                "recomputation would find the parameter at its place. Use checkpoint(…, use_reentrant=False)."
            )
        return super().pass_through(func, args, kwargs)


def absent_parameter(block: ResidualBlock, name: str, holder: nn.Module) -> Absent:
    """Return the Absent that stands for a raw parameter of a branch."""
    parameter = getattr(holder, name.rpartition(".")[2])
    pending = block.pending[len(block.modules) + block.raw_parameters.index(name)]
    return absent_of_shape(pending, block, holder.training, tuple(parameter.shape), parameter.dtype)


@contextmanager
def fast_path_off(off: bool) -> Iterator[None]:
    """Keep PyTorch's fused inference of whole encoder layers off: it would not call the modules inside."""
    before = torch.backends.mha.get_fastpath_enabled()
    if not off or not before:
        yield
        return
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
