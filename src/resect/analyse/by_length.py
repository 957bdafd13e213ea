"""The exact gradient by path length, from one vectorised backward pass.

At every branch end the forward is the identity, and the backward shifts the gradient one place along a
slot dimension; the shortcut does not. Started with 1 in slot 0, slot k ends with the sum of the gradients
of all paths that pass exactly k branches. The slot dimension is a ``torch.vmap`` over the backward pass
(``is_grads_batched=True`` would ignore the shift's own rule and be silently wrong).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resect.analyse.backward import loss_and_place
from resect.blocks.block import Blocks
from resect.blocks.gate import gates


class _Shift(torch.autograd.Function):
    """Move each slot of the vmapped dimension one place up: slot k takes what slot k − 1 held."""

    generate_vmap_rule = False

    @staticmethod
    def forward(gradient: Tensor) -> Tensor:
        raise RuntimeError("the shift of path lengths ran outside vmap, where it would do nothing")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None], gradient: Tensor) -> tuple[Tensor, int]:
        slots = (
            gradient.movedim(in_dims[0], 0)
            if in_dims[0] is not None
            else gradient.expand(info.batch_size, *gradient.shape)
        )
        return torch.cat([torch.zeros_like(slots[:1]), slots[:-1]]), 0


class _CountBranch(torch.autograd.Function):
    """The identity; backward, the gradient has passed one more branch."""

    @staticmethod
    def forward(ctx: Any, branch: Tensor) -> Tensor:
        # A clone: the model may add in place into what it gets.
        return branch.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Shift.apply(gradient)


def gradients_by_length(
    model: nn.Module, blocks: Blocks, inputs: Any, target: Tensor, loss_fn: Any, at: str, lengths: int
) -> Tensor:
    """Return per sample the norm of the summed gradient of all paths of each length: (n+1, B)."""
    with gates(model, blocks) as handle:
        for gate in handle:
            gate.apply(_CountBranch.apply)
        loss, where = loss_and_place(model, blocks, inputs, target, loss_fn, at)
        seeds = torch.zeros(lengths, dtype=loss.dtype, device=loss.device)
        seeds[0] = 1
        slots = torch.vmap(lambda seed: torch.autograd.grad(loss, where, seed, retain_graph=True)[0])(seeds)
    return slots.flatten(2).norm(dim=2).cpu()
