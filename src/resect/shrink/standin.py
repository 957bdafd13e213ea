"""What takes a branch's place: one linear map, or 1×1 convolution, of what entered the branch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resect.blocks.absent import Absent
from resect.blocks.block import ResidualBlock
from resect.blocks.template import replaced, tensors_in
from resect.blocks.upkeep import Upkeep
from resect.errors import InputError
from resect.shrink.remove import Removed


class Entry(Removed):
    """Stands where the branch began: keeps what entered it until the stand-in at its end takes it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return Absents, as a removed module does."""
        self.__dict__["_entered"] = entered(args, kwargs)
        return super().forward(*args, **kwargs)

    def take(self) -> Tensor:
        """Return what entered, once."""
        return self.__dict__.pop("_entered")


class StandIn(Removed):
    """Stands where the branch ended, and returns ``linear`` of what entered the branch."""

    def __init__(
        self, block: ResidualBlock, original: nn.Module, upkeep: Upkeep, linear: nn.Module, entry: Entry | None
    ) -> None:
        assert block.end is not None
        super().__init__(block, block.end, original, upkeep)
        self.linear = linear
        self.__dict__["_entry"] = entry  # not a child: it has a place in the model already

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's recorded output with the linear map's value in the branch end's place."""
        entry = self.__dict__["_entry"]
        value = self.linear(entered(args, kwargs) if entry is None else entry.take())
        return replaced(super().forward(*args, **kwargs), self.block.end_leaf or (), value)

    def bare(self) -> dict[nn.Module | None, Removed]:
        """Return the stubs to put for this and for where the branch began, once the linear map goes too."""
        return {
            part: Removed(part.block, part._position, part.__dict__["_resect_twin"], part.upkeep).train(part.training)
            for part in (self, self.__dict__["_entry"])
            if part is not None
        }

    def __getattr__(self, name: str) -> Any:
        # A removed module answers as the one whose place it took; this one has a part of its own.
        return self.__dict__["_modules"]["linear"] if name == "linear" else super().__getattr__(name)


def entered(args: Any, kwargs: Any) -> Tensor | None:
    """Return the tensor that a branch begins with: the first that its first module is called with, if there is one."""
    return next((tensor for tensor in tensors_in((args, kwargs)) if not isinstance(tensor, Absent)), None)


def hindrance(block: ResidualBlock) -> str:
    """Why no linear map can take a branch's place; empty where it can."""
    if block.end is None:
        return block.reason
    if block.end >= len(block.modules) or block.raw_parameters:
        return "part of its branch is no module"
    if not block.exact:
        return "operations follow its branch's last module"
    if block.counted_in is not None or any(call is not None for call in block.calls):
        return "its branch shares modules with others"
    if block.zeros or block.spreads:
        return "its branch's value goes elsewhere too"
    return ""


def linear_of(shape: Mapping[str, Any]) -> nn.Module:
    """Build the linear map that a plan describes: ``in``, ``out``, and ``stride`` where it is a convolution."""
    if "stride" in shape:
        return nn.Conv2d(shape["in"], shape["out"], 1, stride=tuple(shape["stride"]))
    return nn.Linear(shape["in"], shape["out"])


def filled(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Give a linear map its values."""
    with torch.no_grad():
        linear.weight.copy_(weight.reshape(linear.weight.shape))  # type: ignore[operator, arg-type]
        if bias is not None:
            linear.bias.copy_(bias)  # type: ignore[operator]
    return linear


def stand_in(model: nn.Module, block: ResidualBlock, linear: nn.Module) -> None:
    """Put a linear map in the place of a branch."""
    problem = hindrance(block)
    if problem:
        raise InputError(f"Cannot replace {block.name!r}: {problem}.")
    assert block.end is not None
    modules = dict(model.named_modules())
    example = next(model.parameters(), None)
    if example is not None:
        linear = linear.to(example.device, example.dtype)
    linear = linear.train(modules[block.modules[0]].training)
    entry: Entry | None = None
    for position, name in enumerate(block.modules):
        original, upkeep = modules[name], Upkeep.of(model, name)
        stub: Removed
        if position == block.end:
            stub = StandIn(block, original, upkeep, linear, entry)
        elif position == 0:
            stub = entry = Entry(block, position, original, upkeep)
        else:
            stub = Removed(block, position, original, upkeep)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, stub.train(original.training))
