"""Run a model forward and keep the tensor whose gradient is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from resect.blocks.block import Blocks
from resect.blocks.example import Example
from resect.blocks.modes import kept_modes
from resect.errors import InputError

LossFn = Callable[[Any, Tensor], Tensor]


def scalar_loss(loss_fn: LossFn, output: Any, target: Tensor) -> Tensor:
    """Return the loss, or raise ``InputError`` if it is not a scalar."""
    loss = loss_fn(output, target)
    if not isinstance(loss, Tensor) or loss.dim():
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"loss_fn must return a scalar tensor, the sum over samples, but returned {shape}.")
    return loss


def loss_and_place(
    model: nn.Module, blocks: Blocks, inputs: Any, target: Tensor, loss_fn: Any, at: str
) -> tuple[Tensor, Tensor]:
    """Run the model; return the loss and the tensor whose gradient is asked for."""
    seen: list[Tensor] = []

    def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not seen:
            seen.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

    if at == "input":
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise InputError("at='input' needs a floating-point input tensor; use at='first'.")
        inputs = inputs.detach().requires_grad_()
        # Not by an Example, which runs the model on copies.
        loss = scalar_loss(loss_fn, model(inputs), target)
        seen.append(inputs)
    else:
        block = blocks[0] if at == "first" else blocks[at]
        hook = model.get_submodule(block.modules[0]).register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
        try:
            loss = scalar_loss(loss_fn, Example.of(inputs).run(model), target)
        finally:
            hook.remove()
    return loss, seen[0]


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients; the math attention kernel, since the fused ones cannot be vectorised."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    # Frozen weights would cut the graph between the loss and the place asked for.
    for parameter in wanted:
        if parameter.is_floating_point():
            parameter.requires_grad_()
    try:
        with kept_modes(model), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            model.eval()
            yield
    finally:
        for parameter, needs in wanted.items():
            parameter.requires_grad_(needs)


def mean_factor(model: nn.Module, inputs: Any, target: Tensor, loss_fn: Any) -> float:
    """Return B if the loss is a mean over the B samples, 1 if it is a sum."""
    size = target.shape[0]
    if size == 1:
        return 1.0
    with torch.no_grad():
        output = Example.of(inputs).run(model)
        twice = tree_map_only(Tensor, lambda tensor: torch.cat([tensor, tensor]), output)
        once = float(scalar_loss(loss_fn, output, target))
        doubled = float(scalar_loss(loss_fn, twice, torch.cat([target, target])))
    return float(size) if abs(doubled - once) < 1e-3 * abs(once) else 1.0
