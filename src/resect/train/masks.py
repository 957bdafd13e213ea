"""Drop path: a branch left out for some samples of a batch and kept for the others."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resect.blocks.block import Blocks
from resect.blocks.response import look_on_example
from resect.errors import AttachError
from resect.train.draws import draw_dropped

Per = Literal["batch", "sample"]


class SampleMasks:
    """Which samples drop which branch in one step: a function of (seed, step, number of samples) alone.

    Plain data, so that a copy of the model keeps the draws of its step.
    """

    def __init__(self, probs: list[float], seed: int, step: int) -> None:
        self.probs, self.seed, self.step = probs, seed, step
        self._drawn: dict[tuple[int, torch.device], Tensor] = {}

    def dropped(self, place: int, samples: int, device: torch.device) -> Tensor:
        """Return for one block which samples drop it, bool (samples,); one copy to the device per step."""
        key = (samples, device)
        if key not in self._drawn:
            self._drawn[key] = draw_dropped(self.probs, samples, self.seed, self.step).to(device, non_blocking=True)
        return self._drawn[key][place]

    def every(self, place: int) -> bool:
        """Whether all samples seen in this step drop the block."""
        return all(bool(drawn[place].all()) for drawn in self._drawn.values())

    def none(self, place: int) -> bool:
        """Whether no sample seen in this step drops the block."""
        return not any(bool(drawn[place].any()) for drawn in self._drawn.values())


def over_samples(mask: Tensor, value: Tensor) -> Tensor:
    """Shape a mask (samples,) so that it broadcasts over ``value`` (samples, …)."""
    return mask.view(-1, *([1] * (value.ndim - 1)))


class DropSamples:
    """The gate function of drop path: 0 for dropped samples, ``scale`` times the branch for the others."""

    def __init__(self, masks: SampleMasks, place: int, scale: float) -> None:
        self.masks, self.place, self.scale = masks, place, scale

    def __call__(self, branch: Tensor) -> Tensor:
        """Return the branch end (samples, …) with dropped samples at 0."""
        dropped = self.masks.dropped(self.place, len(branch), branch.device)
        factor = torch.where(dropped, 0.0, self.scale).to(branch.dtype)
        return branch * over_samples(factor, branch)


def check_batch_first(model: nn.Module, blocks: Blocks, name: str) -> None:
    """Raise ``AttachError`` if some branch's first dimension is not the batch, as far as the example shows."""
    if blocks.example is None:
        return
    tensors = [leaf for leaf in tree_leaves((blocks.example.args, blocks.example.kwargs)) if isinstance(leaf, Tensor)]
    samples = {len(tensor) for tensor in tensors if tensor.ndim}
    first = look_on_example(model, blocks, blocks.example, len)
    wrong = {block: size for block, size in first.items() if size not in samples}
    if wrong:
        block, size = next(iter(wrong.items()))
        raise AttachError(
            f'{name}(per="sample") needs the batch as the first dimension of every branch, but that of {block!r} is '
            f'{size} for a batch of {max(samples)}. Use per="batch", or leave out such blocks '
            f"({len(wrong)} of {len(first)})."
        )
