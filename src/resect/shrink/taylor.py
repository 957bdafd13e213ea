"""The first-order estimate of what closing a branch does to the loss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resect.blocks.block import Blocks
from resect.blocks.cost import samples_in
from resect.blocks.example import Forward, device_of, to_device
from resect.blocks.gate import gates
from resect.blocks.metrics import Metric, cross_entropy
from resect.blocks.modes import kept_buffers, kept_modes
from resect.blocks.unwrap import eager
from resect.errors import BlocksError, InputError, quoted


def taylor_scores(
    model: nn.Module,
    blocks: Blocks,
    data: Iterable[Any],
    gone: Iterable[str],
    sets: Sequence[tuple[str, ...]],
    forward: Forward,
    loss: Metric = cross_entropy,
) -> list[float]:
    """Return Σ over samples of |Σ over the blocks of ⟨∂L/∂f, f⟩| over their number, for each set of blocks.

    ⟨∂L/∂f, f⟩ is the derivative of a sample's loss by a factor on the branch f, and its negative the first-order change
    of the loss where f goes: Molchanov et al. 2017 (arXiv 1611.06440), section 2.2, of a whole branch for a feature
    map. L is ``loss``, by default the cross-entropy; of language models it counts per token. One pass forward and
    backward; ``gone`` are closed meanwhile. The model, its gradients included, is left exactly as it was.

    Raises ``InputError`` for no samples, no targets, or a loss that the blocks do not reach or that is not finite;
    ``BlocksError`` where nothing can act on a branch end.
    """
    gone, names = set(gone), list(dict.fromkeys(name for names in sets for name in names))
    hidden = [f"{name!r}: {why}" for name in names if (why := _why_not(blocks, name))]
    if hidden:
        raise BlocksError(
            f"by='taylor' scales branches, and some cannot be scaled; leave them out. {'; '.join(hidden)}."
        )
    totals, count = torch.zeros(len(sets), dtype=torch.float64), 0
    with ExitStack() as stack:
        for context in (kept_modes(model), kept_buffers(model), eager(), torch.random.fork_rng(), torch.enable_grad()):
            stack.enter_context(context)
        handle = stack.enter_context(gates(model, blocks))
        for name in gone:
            handle[name].close()
        model.eval()
        for batch in data:
            batch = to_device(batch, device_of(model))
            factors = [_ones(batch, blocks[name].shape) for name in names]
            for name, factor in zip(names, factors, strict=True):
                handle[name].apply(Times(factor))
            losses = loss(forward(model, batch), batch)
            if not losses.numel():
                continue
            if not losses.requires_grad:
                raise InputError(
                    "by='taylor' goes backward from the metric, and no gradient comes of this one: take a loss, as "
                    "metric='cross_entropy', or rank by='lesion'."
                )
            found = torch.autograd.grad(losses.sum(), factors, allow_unused=True)
            idle = [name for name, gradient in zip(names, found, strict=True) if gradient is None]
            if idle:
                raise InputError(
                    f"No gradient of the loss reaches {quoted(idle)}: leave them out, or rank by='lesion'."
                )
            slopes = {
                name: part.double().flatten().cpu() for name, part in zip(names, found, strict=True) if part is not None
            }
            totals += torch.stack([torch.stack([slopes[name] for name in names]).sum(0).abs().sum() for names in sets])
            count += losses.numel()
    if not count:
        raise InputError("The data gave no samples. Pass a list of batches or a DataLoader, not an exhausted iterator.")
    if not totals.isfinite().all():
        raise InputError("by='taylor' is NaN or infinite on these data: look at the inputs and at the model's weights.")
    return (totals / count).tolist()


class Times:
    """Multiplies a branch end by a factor for each sample, in the branch's own type."""

    def __init__(self, factor: Tensor) -> None:
        self.factor = factor

    def __call__(self, branch: Tensor) -> Tensor:
        """Return ``factor * branch``."""
        return branch * self.factor.to(branch.dtype)


def _ones(batch: Any, shape: tuple[int, ...]) -> Tensor:
    """A factor 1 for each sample that broadcasts against a branch end of a shape like ``shape``."""
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim), None)
    if first is None:
        raise InputError(
            f"A batch must hold tensors: (inputs, target), or a mapping; this is a {type(batch).__name__}."
        )
    return torch.ones(len(first), *(1 for _ in shape[1:]), device=first.device, requires_grad=True)


def _why_not(blocks: Blocks, name: str) -> str:
    samples = samples_in(blocks.example) if blocks.example else None
    block = blocks[name]
    if block.scalable and samples not in (None, block.shape[0] if block.shape else None):
        return f"its sum has the shape {block.shape}, not one row per sample"
    return block.reason if not block.scalable else ""
