"""Look at every residual addition of a forward pass: branch, shortcut and their sum, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.channels import channel_axis
from resect.blocks.gate import Gates
from resect.blocks.recompute import is_recomputing
from resect.errors import InputError, quoted

Pool = Literal["mean", "last"]
UNITS = 32
"""Channels of a branch that are compared with those of others, evenly spaced among them."""
POSITIONS = 16
"""Places of a stream, evenly spaced, at which its direction is compared with that of other depths."""


@dataclass
class Look:
    """What one batch of B samples shows of one block; all on the CPU."""

    largest: Tensor
    """max|f|, (B,)."""
    branch: Tensor
    """L2 norm of the branch, (B,), float64; ``shortcut`` alike."""
    shortcut: Tensor
    cosine: Tensor
    """Of the angle between branch and shortcut, (B,), float64; NaN where one of them is zero."""
    units: Tensor
    """The branch's channels, pooled, (B, U)."""
    stream: Tensor
    """The sum, pooled, (B, C)."""
    positions: Tensor
    """The sum at some places, (B, P, C)."""
    before: tuple[Tensor, Tensor] | None
    """The shortcut likewise, of the first block alone."""
    descent: Tensor | None = None
    """Cosine of the branch with the negative gradient of the loss at the sum, (B,)."""


class Streams:
    """The joins of a model's blocks for one forward pass at a time; ``begin`` before each, then ``looks``."""

    def __init__(self, model: nn.Module, blocks: Blocks, gates: Gates, gradient: bool) -> None:
        self.blocks, self.gradient = blocks, gradient
        self.axes: dict[str, int] = {}
        sums = [block.sum for block in blocks]
        self._shared = {number for number in sums if sums.count(number) > 1}
        self.owners = {block.name: model.get_submodule(block.owner) for block in blocks}
        for gate in gates:
            gate.join_by(Join(self, gate.block))

    def begin(self, samples: int, mask: Tensor | None, pool: Pool) -> None:
        """Forget the pass before; the next one is of so many samples, with ``mask`` (B, T) over tokens."""
        self.samples, self.mask, self.pool = samples, mask, pool
        self.looks: dict[str, Look] = {}
        self._sums: dict[int, Tensor] = {}
        self._kept: list[tuple[str, Tensor, int, Tensor]] = []

    def check(self) -> None:
        """Raise ``InputError`` if a block did not run, or what came out of one is not finite."""
        missing = [block.name for block in self.blocks if block.name not in self.looks]
        if missing:
            raise InputError(f"{quoted(missing)} did not run on this batch. Choose blocks that every batch passes.")
        for block in self.blocks:
            look = self.looks[block.name]
            if not (look.largest.isfinite() & look.shortcut.isfinite()).all():
                raise InputError(
                    f"The branch or the shortcut of {block.name!r} is NaN or infinite for some sample, as in no block "
                    "before it. Look at the inputs, and at the weights up to there."
                )

    def descend(self, loss: Tensor) -> None:
        """Take down the cosine of each branch with the negative gradient of ``loss`` at its sum."""
        names, branches, versions, sums = zip(*self._kept, strict=True)
        if any(branch._version != version for branch, version in zip(branches, versions, strict=True)):
            raise InputError("This model writes into a branch after adding it: use gradient=False.")
        gradients = torch.autograd.grad(loss, sums, allow_unused=True)
        unreached = [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]
        if unreached:
            raise InputError(
                f"No gradient of the loss reaches {quoted(unreached)}: reentrant checkpointing cuts it off (give it "
                "use_reentrant=False), or they serve another output. Choose other blocks, or gradient=False."
            )
        for name, branch, gradient in zip(names, branches, gradients, strict=True):
            self.looks[name].descent = cosine(self._rows(branch), -self._rows(gradient))
        self._kept = []

    def note(self, block: ResidualBlock, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Take down what meets at the addition of a block; return the sum."""
        if is_recomputing():  # by gradient checkpointing, in the backward pass: it was looked at before
            return (shortcut + branch).clone()
        if block.name in self.looks:
            raise InputError(f"{block.name!r} ran twice in one pass, which its name does not tell apart.")
        total = shortcut + branch
        if self.gradient and not total.requires_grad:
            total.requires_grad_()
        with torch.no_grad():
            shortcut = shortcut.detach()
            # Parallel branches of one sum arrive one after another: the shortcut is what the first one met.
            if block.sum in self._shared:
                shortcut = self._sums.setdefault(block.sum, shortcut.clone())
            self.looks[block.name] = self._look(block, shortcut, branch.detach(), total.detach())
        if self.gradient:
            kept = branch.detach()
            self._kept.append((block.name, kept, kept._version, total))
            return total.clone()  # what follows may write into it
        return total

    def _look(self, block: ResidualBlock, shortcut: Tensor, branch: Tensor, total: Tensor) -> Look:
        axis = self.axes.setdefault(block.name, channel_axis(total, self.owners[block.name]))
        shortcut, branch = shortcut.expand_as(total), branch.expand_as(total)
        rows, other = self._rows(branch), self._rows(shortcut)
        places, start = self._places(total, axis), self._places(shortcut, axis)
        return Look(
            largest=largest(branch).cpu(),
            branch=size(rows).cpu(),
            shortcut=size(other).cpu(),
            cosine=cosine(rows, other),
            units=some(self._pooled(self._places(branch, axis)), UNITS, 1).cpu(),
            stream=self._pooled(places).cpu(),
            positions=self._positions(places).cpu(),
            before=(self._pooled(start).cpu(), self._positions(start).cpu()) if block == self.blocks[0] else None,
        )

    def _rows(self, value: Tensor) -> Tensor:
        """A row per sample, float32 at least, with padding left out."""
        mask = self._mask_of(value)
        rows = (value if mask is None else value * mask[..., None]).flatten(1)
        return rows if rows.dtype == torch.float64 else rows.float()

    def _mask_of(self, value: Tensor) -> Tensor | None:
        fits = self.mask is not None and value.ndim == 3 and self.mask.shape == value.shape[:2]
        return self.mask if fits else None

    def _places(self, value: Tensor, axis: int) -> Tensor:
        """A stream as (B, places, C)."""
        return value.movedim(axis, -1).reshape(len(value), -1, value.shape[axis])

    def _pooled(self, places: Tensor) -> Tensor:
        if self.pool == "last":
            return self._last(places)[:, 0].float()
        mask = self._mask_of(places)
        if mask is None:
            return places.float().mean(dim=1)
        weights = mask[..., None].float()
        return (places * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)

    def _positions(self, places: Tensor) -> Tensor:
        return self._last(places) if self.pool == "last" else some(places, POSITIONS, 1)

    def _last(self, places: Tensor) -> Tensor:
        mask = self._mask_of(places)
        if mask is None:
            return places[:, -1:]
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)
        return places[torch.arange(len(places), device=places.device), last][:, None]


class Join:
    """Adds as the model does, and lets the addition be looked at."""

    def __init__(self, streams: Streams, block: ResidualBlock) -> None:
        self.streams, self.block = streams, block

    def __call__(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """Return ``shortcut + branch``."""
        return self.streams.note(self.block, shortcut, branch)


def largest(value: Tensor) -> Tensor:
    """Return ``max|value|`` of each sample, (B,), float32 at least; NaN where an element is."""
    low, high = value.flatten(1).aminmax(dim=1)
    found = torch.maximum(high, -low)
    return found if found.dtype == torch.float64 else found.float()


def size(rows: Tensor) -> Tensor:
    """Return the L2 norm of each row, (B,), summed in float64."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)


def cosine(one: Tensor, other: Tensor) -> Tensor:
    """Return the cosine of each pair of rows, (B,), float64 on the CPU; NaN where one of them is zero."""
    dot = (one * other).sum(dim=1, dtype=torch.float64)
    return (dot / (size(one) * size(other))).clamp(-1, 1).cpu()


def some(value: Tensor, count: int, dim: int) -> Tensor:
    """Return at most ``count`` entries along a dimension, evenly spaced, the first and the last among them."""
    length = value.shape[dim]
    if length <= count:
        return value
    return value.index_select(dim, torch.linspace(0, length - 1, count, device=value.device).round().long())


def unwatched(block: ResidualBlock, samples: int | None) -> str | None:
    """Why a block cannot be looked at, or None; ``samples``: of the example that its shape was found on."""
    if not block.scalable:
        return block.reason
    if len(block.shape) < 2 or (samples is not None and block.shape[0] != samples):
        return f"its sum has the shape {block.shape}, not one row per sample"
    return None


def samples_of(batch: Any) -> int:
    """Return the number of samples of a batch: the length of its first tensor."""
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if not tensors:
        raise InputError(
            f"A batch must hold tensors: (inputs, target), or a mapping; this is a {type(batch).__name__}."
        )
    return len(tensors[0])
