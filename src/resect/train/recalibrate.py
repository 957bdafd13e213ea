"""Renew the running statistics of batch norm: those of a training describe the thinned nets it ran."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from resect.blocks.example import Forward, forward_batch
from resect.blocks.modes import kept_modes
from resect.errors import InputError


def recalibrate(model: nn.Module, data: Iterable[Any], forward: Forward | None = None) -> int:
    """Set the running mean and variance of every batch norm to their plain average over ``data``; return the batches.

    The net runs in train mode without gradients and as it is now, so detach methods first for the full net; norms of
    closed blocks, and those that ``model.train()`` leaves in eval mode, keep what they have. Weights, modes, other
    buffers and the setting of every ``momentum`` are as before afterwards; a net without batch norm is left alone.

    ``data``: batches of training data, as for ``lesion_study``; some dozens are enough.

    Raises ``InputError`` if there is no batch; the statistics are then as before.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    momenta = [norm.momentum for norm in norms]
    renewed: set[int] = set()
    batches = 0
    try:
        with kept_modes(model), torch.no_grad(), torch.random.fork_rng():
            model.train()
            renewing = [norm for norm in norms if norm.training]  # a frozen one may stay in eval mode
            for norm in renewing:
                norm.reset_running_stats()
                norm.momentum = None  # torch's word for a plain average
            for batch in data:
                (forward or forward_batch)(model, batch)
                batches += 1
        if not batches:
            raise InputError("recalibrate needs at least one batch of data, and there is none.")
        ran = [norm for norm in renewing if norm.num_batches_tracked is not None and int(norm.num_batches_tracked)]
        renewed = {id(buffer) for norm in ran for buffer in norm.buffers(recurse=False)}
    finally:
        with torch.no_grad():
            for buffer, value in before:
                if id(buffer) not in renewed:  # after a failure, of norms that did not run, of other modules
                    buffer.copy_(value)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return batches
