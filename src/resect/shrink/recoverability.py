"""How well a model can do without some blocks once the rest has adapted a little: PRACTISE's recoverability."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from resect.blocks.example import Forward, forward_batch
from resect.blocks.gate import Which, closed, resolve
from resect.blocks.modes import kept_buffers, kept_modes
from resect.blocks.unwrap import unwrap
from resect.errors import check_all
from resect.shrink.mimic import LR, feature_distance, fit, inputs_of
from resect.shrink.remove import copied
from resect.shrink.samples import SAMPLES, dealt, first_batches, joined, seed_problems, size_of


def recoverability(
    model: nn.Module,
    blocks: Which,
    gone: Which,
    data: Iterable[Any],
    *,
    steps: int = 50,
    lr: float = LR,
    batch_size: int = 64,
    samples: int = SAMPLES,
    at: str | None = None,
    seed: int = 0,
    forward: Forward = forward_batch,
) -> float:
    """Return how far features stay from the uncut model's when blocks go and the rest mimics it for a few steps.

    The mean squared distance in eval mode, on the samples that were mimicked; lower is better. PRACTISE ranks blocks
    by it per millisecond saved; it fits 1×1 convolutions beside the block for 1000 steps, here all that is left
    learns. The model is left alone. Raises ``InputError`` for a seed that torch does not take.

    Parameters
    ----------
    gone: the blocks to go, as ``blocks.select`` takes them. All else is as in ``mimic``.
    """
    check_all(seed_problems(seed), "recoverability")
    model = unwrap(model)
    going = resolve(model, blocks).select(gone)
    small = copied(model)
    pool = joined([inputs_of(batch, forward) for batch in first_batches(model, data, samples)])
    size = min(batch_size, size_of(pool))
    with closed(small, going):
        with kept_modes(small, model), kept_buffers(model), torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(seed)
            fit(small, model, dealt(pool, size, seed), steps, lr, at, forward, None)
        return feature_distance(small, model, [pool], at=at, forward=forward)
