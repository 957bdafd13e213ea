"""Measure a model on data, without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.example import Forward, device_of, forward_batch, to_device
from resect.blocks.gate import gates
from resect.blocks.metrics import Metric, metric_named
from resect.blocks.modes import kept_modes
from resect.errors import BlocksError, InputError

Progress = Callable[[int, int], None]
"""``progress(done, total)``, called after every measurement."""


def mean_metric(model: nn.Module, data: Iterable[Any], metric: Metric, forward: Forward = forward_batch) -> float:
    """Return the mean of a metric over every sample of the data; in eval mode, without gradients.

    Raises ``InputError`` for data without samples and for a metric that is not finite.
    """
    total, count = 0.0, 0
    device = device_of(model)
    for batch in data:
        batch = to_device(batch, device)
        values = metric(forward(model, batch), batch)
        total += float(values.double().sum())
        count += values.numel()
    if not count:
        raise InputError("The data gave no samples. Pass a list of batches or a DataLoader, not an exhausted iterator.")
    mean = total / count
    if mean != mean:
        raise InputError("The metric is NaN on this data: the model's outputs or the targets hold NaN.")
    return mean


def measure_closed(
    model: nn.Module,
    blocks: Blocks,
    data: Iterable[Any],
    subsets: Sequence[Sequence[str]],
    metric: str | Metric = "top1",
    forward: Forward = forward_batch,
    progress: Progress | None = None,
) -> tuple[float, list[float]]:
    """Return the metric of the whole model, and with each subset of blocks closed.

    Raises ``BlocksError`` for an empty selection and ``InputError`` for data that cannot be repeated, an
    unknown metric, or one that is NaN.
    """
    if not blocks:
        raise BlocksError("There is nothing to close: the selection of residual blocks is empty.")
    measure = metric_named(metric)
    if iter(data) is data:
        raise InputError(
            "The data is an iterator that runs dry after one pass. Pass list(data), or the DataLoader itself."
        )
    values = []
    with kept_modes(model), torch.no_grad(), gates(model, blocks) as handle:
        model.eval()
        whole = mean_metric(model, data, measure, forward)
        for done, subset in enumerate(subsets, start=1):
            for name in subset:
                handle[name].close()
            values.append(mean_metric(model, data, measure, forward))
            for name in subset:
                handle[name].open()
            if progress:
                progress(done, len(subsets))
    return whole, values
