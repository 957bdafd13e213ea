"""The gradient that flows along paths of each length, in two different quantities.

Veit, Wilber, Belongie (NIPS 2016), section 5: the gradient of one path shrinks exponentially with its
length, so that most of it comes along short paths although most paths are of middle length.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from resect.analyse.backward import LossFn, differentiable, mean_factor
from resect.analyse.by_length import gradients_by_length
from resect.analyse.interval import interval
from resect.analyse.paths import path_lengths
from resect.analyse.single_paths import sample_path_gradients
from resect.blocks.example import device_of, to_device
from resect.blocks.gate import Which, resolve
from resect.blocks.measure import Progress
from resect.errors import BlocksError, InputError


@dataclass(frozen=True)
class PathGradients:
    """Size of the gradient that arrives at ``at``, by path length 0 … n.

    Two different quantities, not to be drawn on one axis:

    ``norm_of_sum`` is exact: mean over samples of ‖sum of the gradients of all paths of that length‖₂.
    ``sum_of_norms`` is the paper's (section 5, figure 6c): number of paths × mean ‖gradient of one path‖₂,
    sampled; ``low`` and ``high`` bound it (95 %), ``mean_norm`` is the mean of one path alone. Empty
    tensors when nothing was sampled.
    """

    norm_of_sum: Tensor
    sum_of_norms: Tensor
    low: Tensor
    high: Tensor
    mean_norm: Tensor
    paths: tuple[int, ...]
    at: str
    rescaled: bool
    """The loss was a mean over the batch and was turned into a sum."""

    @property
    def coherence(self) -> Tensor:
        """Return norm of the sum over sum of the norms, (n+1,): 1 if all paths of a length pull one way."""
        return self.norm_of_sum / self.sum_of_norms

    def rows(self) -> list[dict[str, float]]:
        """Return one dict per path length, for CSV and tables."""
        sampled = len(self.sum_of_norms) > 0
        return [
            {"length": k, "paths": float(self.paths[k]), "norm_of_sum": float(self.norm_of_sum[k])}
            | ({"sum_of_norms": float(self.sum_of_norms[k]), "low": float(self.low[k]), "high": float(self.high[k])}
               if sampled else {})
            for k in range(len(self.norm_of_sum))
        ]  # fmt: skip


def path_gradients(
    model: nn.Module,
    blocks: Which,
    batch: tuple[Any, Tensor],
    loss_fn: LossFn,
    *,
    at: str = "first",
    samples: int = 100,
    seed: int = 0,
    chunk: int = 64,
    progress: Progress | None = None,
) -> PathGradients:
    """Split the gradient of the loss by the length of the paths it flows along.

    Parameters
    ----------
    model, blocks: left exactly as they are; the model runs in eval mode (samples must not be coupled).
    batch: ``(inputs, target)``, B samples.
    loss_fn: ``loss_fn(output, target)``, a scalar: the sum over samples. A mean is detected and rescaled.
    at: where the gradient is taken: ``"first"`` (what enters the first block), ``"input"`` (the model's
        input) or the name of a block (what enters that block).
    samples: single paths drawn per length for ``sum_of_norms``; 0 leaves it out.
    seed: of those draws.
    chunk: samples handled at once in the exact part, whose memory grows with ``chunk × (n+1)``.

    The exact part runs the model once and one backward pass vectorised over path lengths: at every branch
    end the forward is the identity and the backward shifts the gradient one slot up, so that slot k ends
    with the summed gradient of all paths of length k.

    Raises
    ------
    BlocksError, InputError: no blocks; a block whose branch end cannot be acted on; a loss that is not a scalar.
    """
    blocks = resolve(model, blocks)
    if not blocks:
        raise BlocksError("Path gradients need at least one residual block, and the selection is empty.")
    unusable = [block for block in blocks if not block.scalable]
    if unusable:
        raise InputError(f"Path gradients cannot follow {unusable[0].name!r}: {unusable[0].reason}.")
    inputs, target = to_device(tuple(batch), device_of(model))
    with differentiable(model):
        factor = mean_factor(model, inputs, target, loss_fn)
        counts = path_lengths(blocks)
        exact = torch.cat(
            [
                # Within a chunk a mean loss divides by the chunk's own size.
                gradients_by_length(model, blocks, part, wanted, loss_fn, at, len(counts))
                * (len(wanted) if factor != 1 else 1)
                for part, wanted in _chunks(inputs, target, chunk)
            ],
            dim=1,
        )
        if not exact[0].any():
            raise InputError(
                f"What enters block {at!r} cannot be seen: its branch begins with an operation outside any module. "
                "Use at='input', or the name of a block whose branch begins with a module."
            )
        if samples:
            drawn = sample_path_gradients(model, blocks, inputs, target, loss_fn, at, counts, samples, seed, progress)
            norms = [[value * factor for value in values] for values in drawn]
        else:
            norms = []
    means = torch.tensor([sum(values) / len(values) for values in norms], dtype=torch.float64)
    bounds = torch.tensor([interval(values) for values in norms], dtype=torch.float64).reshape(-1, 2)
    scale = torch.tensor([float(count) for count in counts[: len(norms)]], dtype=torch.float64)
    return PathGradients(
        norm_of_sum=exact.double().mean(dim=1),
        sum_of_norms=scale * means,
        low=scale * bounds[:, 0].clamp_min(0),
        high=scale * bounds[:, 1],
        mean_norm=means,
        paths=tuple(counts),
        at=at,
        rescaled=factor != 1,
    )


def _chunks(inputs: Any, target: Tensor, size: int) -> Iterator[tuple[Any, Tensor]]:
    """Split a batch along its first dimension."""
    count = target.shape[0]

    def part(tensor: Tensor, start: int) -> Tensor:
        return tensor[start : start + size] if len(tensor) == count else tensor

    for start in range(0, count, size):
        yield tree_map_only(Tensor, functools.partial(part, start=start), inputs), part(target, start)
