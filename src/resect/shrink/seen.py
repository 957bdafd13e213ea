"""What goes through a block: what enters its branch, its shortcut, its branch end and their sum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.example import Forward
from resect.blocks.gate import gates
from resect.shrink.standin import entered

_CHANNELS_FIRST = (
    nn.modules.conv._ConvNd,
    nn.modules.batchnorm._BatchNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
)


@dataclass
class Seen:
    """The values of one block in one forward pass, as copies."""

    entered: Tensor | None
    """None where the branch begins with a linear map that takes its value elsewhere."""
    shortcut: Tensor
    branch: Tensor
    sum: Tensor


def seen(model: nn.Module, blocks: Blocks, name: str, batch: Any, forward: Forward) -> Seen:
    """Run a batch and return what went through one block."""
    found: dict[str, Any] = {}
    block = blocks[name]

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = entered(args, kwargs)
        found["entered"] = None if tensor is None else tensor.detach().clone()

    def join(shortcut: Tensor, branch: Tensor) -> Tensor:
        found["shortcut"], found["branch"] = shortcut.detach().clone(), branch.detach().clone()
        total = shortcut + branch
        found["sum"] = total.detach().clone()
        return total

    hook = model.get_submodule(block.modules[0]).register_forward_pre_hook(enter, with_kwargs=True)
    try:
        with torch.no_grad(), gates(model, blocks.select([name])) as handle:
            handle[name].join_by(join)
            forward(model, batch)
    finally:
        hook.remove()
    return Seen(**found)


def channels(model: nn.Module, block: ResidualBlock) -> int:
    """Return the axis of the channels: 1 where the branch begins with a convolution or its norm, else the last."""
    first = next(part for part in model.get_submodule(block.modules[0]).modules() if not list(part.children()))
    return 1 if isinstance(first, _CHANNELS_FIRST) else -1


def rows_of(values: Tensor, axis: int) -> Tensor:
    """Return values as (positions, channels)."""
    return values.movedim(axis, -1).flatten(0, -2)


def strided(features: Tensor, wanted: Tensor, axis: int) -> tuple[Tensor, tuple[int, ...] | None]:
    """Return the features at the positions that a strided block keeps, and the strides (None: there is no space)."""
    if axis != 1 or features.dim() != 4:
        return features, None
    strides = tuple(-(-a // b) for a, b in zip(features.shape[2:], wanted.shape[2:], strict=True))
    return features[:, :, :: strides[0], :: strides[1]], strides
