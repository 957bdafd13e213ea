"""Renew the running statistics of batch norm: those of a training describe the thinned nets it ran."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from resect.blocks.example import Forward, forward_batch
from resect.blocks.modes import kept_modes
from resect.errors import InputError


def recalibrate(model: nn.Module, data: Iterable[Any], forward: Forward | None = None) -> int:
    """Set the running mean and variance of every batch norm to their plain average over ``data``; return the batches.

    The net runs in train mode without gradients and as it is now, so detach methods first for the full net. Weights,
    modes and the setting of every ``momentum`` are as before afterwards; a net without such norms is left alone.

    ``data``: batches of training data, as for ``lesion_study``; some dozens are enough.

    Raises ``InputError`` if there is no batch; the statistics are then as before.
    """
    norms = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    momenta: list[Any] = [norm.momentum for norm in norms]
    batches = 0
    try:
        with kept_modes(model), torch.no_grad(), torch.random.fork_rng():
            model.train()
            for norm in norms:
                norm.reset_running_stats()  # type: ignore[operator]
                norm.momentum = None  # type: ignore[assignment]  # torch's word for a plain average
            for batch in data:
                (forward or forward_batch)(model, batch)
                batches += 1
        if not batches:
            raise InputError("recalibrate needs at least one batch of data, and there is none.")
    except BaseException:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return batches
