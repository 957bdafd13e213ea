"""Gradients of single random paths: the paper's own measurement."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from resect.analyse.backward import loss_and_place
from resect.analyse.paths import PathChooser
from resect.blocks.block import Blocks
from resect.blocks.gate import gates
from resect.blocks.measure import Progress


def sample_path_gradients(
    model: nn.Module,
    blocks: Blocks,
    inputs: Any,
    target: Tensor,
    loss_fn: Any,
    at: str,
    counts: list[int],
    samples: int,
    seed: int,
    progress: Progress | None,
) -> list[list[float]]:
    """Return per length the gradient norms of single random paths, one path per sample of the batch.

    A single path's gradient (section 5): through the branch of the blocks on the path and not through
    their shortcut, through the shortcut of all others and not through their branch. Values stay the same.
    """
    size = target.shape[0]
    draw = random.Random(seed)
    norms: list[list[float]] = [[] for _ in counts]
    pending = [length for length in range(len(counts)) for _ in range(samples)]
    draw.shuffle(pending)
    chooser = PathChooser(blocks)
    for start in range(0, len(pending), size):
        lengths = (pending[start : start + size] * size)[:size]
        on_path = {name: [] for name in blocks.names}  # type: dict[str, list[bool]]
        for length in lengths:
            chosen = chooser.draw(length, draw)
            for name, choices in on_path.items():
                choices.append(name in chosen)
        with gates(model, blocks) as handle:
            for gate in handle:
                gate.join_by(_Route(torch.tensor(on_path[gate.block.name], device=target.device)))
            loss, where = loss_and_place(model, blocks, inputs, target, loss_fn, at)
            gradient = torch.autograd.grad(loss, where)[0]
        sizes = gradient.flatten(1).norm(dim=1).tolist()
        for length, norm in zip(pending[start : start + size], sizes, strict=False):
            norms[length].append(norm)
        if progress:
            progress(min(start + size, len(pending)), len(pending))
    return norms


class _Route:
    """``shortcut + branch`` whose gradient goes to the branch for samples on the path, else to the shortcut."""

    def __init__(self, on_path: Tensor) -> None:
        self.on_path = on_path

    def __call__(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return _Choose.apply(shortcut, branch, self.on_path)


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, branch: Tensor, on_path: Tensor) -> Tensor:
        ctx.save_for_backward(on_path)
        return shortcut + branch

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (on_path,) = ctx.saved_tensors
        mask = on_path.view(-1, *(1,) * (gradient.dim() - 1))
        zero = torch.zeros((), dtype=gradient.dtype, device=gradient.device)
        return torch.where(mask, zero, gradient), torch.where(mask, gradient, zero), None
