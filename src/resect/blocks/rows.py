"""Some rows of a batch: what goes into a branch is cut to them, what comes out of it is added to them alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resect.blocks.inflight import AbsentError


@dataclass(frozen=True, eq=False)
class Rows:
    """The samples that a branch is computed on in one forward pass.

    ``index``: int64 (count,), in increasing order but for padding. ``factor`` of the branch: a number, or a tensor
    (count,) with one per row, on the index's device.
    """

    samples: int
    count: int
    index: Tensor
    factor: float | Tensor

    def take(self, tensor: Tensor, each: int = 1) -> Tensor:
        """Return these rows of a tensor (samples · each, …)."""
        if self.count == self.samples:
            return tensor
        if each > 1:
            return tensor.unflatten(0, (self.samples, each)).index_select(0, self.index.to(tensor.device)).flatten(0, 1)
        return _by_memory(lambda one: one.index_select(0, self.index.to(one.device)), tensor)

    def spread(self, tensor: Tensor) -> Tensor:
        """Return a tensor (samples, …) whose rows ``take`` gives back; the others repeat the first."""
        back = torch.zeros(self.samples, dtype=torch.int64, device=tensor.device)
        index = self.index.to(tensor.device)
        return tensor.index_select(0, back.index_copy(0, index, torch.arange(self.count, device=tensor.device)))

    def change(self, branch: Tensor) -> Tensor:
        """Return the branch (count, …) as it is: its factor comes with the addition."""
        return branch

    def join(self, other: Tensor, branch: Tensor) -> Tensor:
        """Return ``other`` with ``factor · branch`` added to these rows: one pass over the memory of the sum."""
        shape = self._shape(other, branch)
        dtype = torch.result_type(other, branch)
        other = other.to(dtype) if other.shape == shape else other.to(dtype).expand(shape)
        if self.count == self.samples:
            return torch.add(other, self._scaled(branch))
        alpha, branch = self._alpha(branch)
        branch = branch.to(dtype)
        if branch.shape[1:] != shape[1:]:
            branch = branch.expand(self.count, *shape[1:])
        index = self.index.to(other.device)
        return _by_memory(lambda one, two: _AddRows.apply(one, two, index, alpha), other, branch)

    def join_(self, other: Tensor, branch: Tensor, sign: float) -> Tensor:
        """Add ``sign · factor · branch`` to these rows of ``other`` in place."""
        if self._shape(other, branch) != other.shape:
            raise RuntimeError(f"a branch of shape {tuple(branch.shape)} is added in place to {tuple(other.shape)}")
        alpha, branch = self._alpha(branch)
        branch = branch.to(other.dtype).expand(self.count, *other.shape[1:])
        return other.index_add_(0, self.index.to(other.device), branch, alpha=alpha * sign)

    def _shape(self, other: Tensor, branch: Tensor) -> torch.Size:
        """Return the shape of the sum over all samples; raises if the branch has other rows than these."""
        if other.shape == (self.samples, *branch.shape[1:]) and len(branch) == self.count:
            return other.shape
        try:
            shape = torch.broadcast_shapes(other.shape, (self.samples, *branch.shape[1:]))
        except RuntimeError:
            shape = torch.Size()
        if not branch.ndim or len(branch) != self.count or branch.ndim != len(shape) or shape[0] != self.samples:
            raise AbsentError(
                f"a branch computed on {self.count} of {self.samples} samples is {tuple(branch.shape)} at its addition "
                f'to {tuple(other.shape)}: not as on the example. Use compute="mask", or find the blocks on an example '
                "like the batches"
            )
        return shape

    def _alpha(self, branch: Tensor) -> tuple[float, Tensor]:
        if isinstance(self.factor, Tensor):
            return 1.0, self._scaled(branch)
        return self.factor, branch

    def _scaled(self, branch: Tensor) -> Tensor:
        if isinstance(self.factor, Tensor):
            factor = self.factor.to(branch.device, branch.dtype)
            return branch * factor.view(-1, *([1] * (branch.ndim - 1)))
        return branch * self.factor


class _AddRows(torch.autograd.Function):
    """``index_add`` along the first dimension; torch's own keeps what it added for the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(other: Tensor, branch: Tensor, index: Tensor, alpha: float) -> Tensor:
        return other.index_add(0, index, branch, alpha=alpha)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, _, index, ctx.alpha = inputs
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (index,) = ctx.saved_tensors
        added = gradient.index_select(0, index)
        return gradient, added if ctx.alpha == 1 else added * ctx.alpha, None, None


def _by_memory(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Run a function of rows with the other dimensions in the order of memory: copies keep ``channels_last``."""
    if tensors[0].ndim in (4, 5) and not tensors[0].is_contiguous():
        moved = [tensor.movedim(1, -1) for tensor in tensors]
        if moved[0].is_contiguous():
            return function(*moved).movedim(-1, 1)
    return function(*tensors)
