"""Merge a linear map into the projection that a branch ends with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.example import Forward
from resect.shrink.seen import seen


@dataclass(frozen=True)
class Projection:
    """The last layer of a branch, whose output is the branch end itself."""

    block: str
    module: str
    has_bias: bool

    def merge(self, model: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
        """Let the layer return ``(I + weight)·y + bias`` where it returned y; exact but for rounding."""
        layer: Any = model.get_submodule(self.module)
        whole = weight + torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        old = layer.weight.detach().to(weight.dtype)
        new = old @ whole.T if _is_transposed(layer) else torch.einsum("oi,i...->o...", whole, old)
        with torch.no_grad():
            layer.weight.copy_(new)
            if layer.bias is not None:
                assert bias is not None
                layer.bias.copy_(whole @ layer.bias.to(weight.dtype) + bias)


def projection_of(
    model: nn.Module, blocks: Blocks, first: ResidualBlock, going: set[str], batch: Any, forward: Forward
) -> Projection | None:
    """Return the projection into which a map before ``first`` can be merged exactly; None where there is none.

    The block before must stay, hand its sum to ``first`` as it is (or through a ReLU, which changes nothing twice),
    and end in a layer that no other part of the model uses and whose output is its branch's value to the bit.
    """
    before = next((block for block in blocks if block.index == first.index - 1), None)
    if before is None or first.shortcut != "identity":
        return None
    alone = sum(other.sum == before.sum for other in blocks) == 1
    if before.name in going or before.shape != first.shape or not (before.scalable and first.scalable and alone):
        return None
    outputs: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_hook(
            lambda _, __, output, name=name: outputs.setdefault(name, []).append(output.clone())
        )
        for top in before.modules
        for name, module in _inside(model, top)
        if _is_projection(module)
    ]
    try:
        here = seen(model, blocks, before.name, batch, forward)
    finally:
        for hook in hooks:
            hook.remove()
    there = seen(model, blocks, first.name, batch, forward)
    if not any(torch.equal(there.shortcut, value) for value in (here.sum, here.sum.relu())):
        return None
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    for name, values in outputs.items():
        layer: Any = model.get_submodule(name)
        own = all(uses[id(parameter)] == 1 for parameter in layer.parameters())
        if own and len(values) == 1 and values[0].shape == here.branch.shape and torch.equal(values[0], here.branch):
            return Projection(before.name, name, layer.bias is not None)
    return None


def _inside(model: nn.Module, top: str) -> list[tuple[str, nn.Module]]:
    return [(f"{top}.{name}" if name else top, module) for name, module in model.get_submodule(top).named_modules()]


def _is_transposed(layer: nn.Module) -> bool:
    """Whether the weight is (in, out): transformers' Conv1D."""
    return type(layer).__name__ == "Conv1D"


def _is_projection(module: nn.Module) -> bool:
    plain = type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) or _is_transposed(module)
    return plain and getattr(module, "groups", 1) == 1 and not hasattr(module, "parametrizations")
