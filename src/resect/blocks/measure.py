"""Measure a model on data, without changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resect.blocks.block import Blocks
from resect.blocks.example import Forward, device_of, forward_batch, to_device
from resect.blocks.gate import gates
from resect.blocks.modes import kept_modes
from resect.errors import BlocksError, InputError, unknown

Metric = Callable[[Any, Any], Tensor]
"""``metric(output, batch)`` gives one number per sample, (B,); their mean counts. Lower is better."""

Progress = Callable[[int, int], None]
"""``progress(done, total)``, called after every measurement."""


def target_of(batch: Any) -> Tensor:
    """Return the target of a batch: the second item of a tuple, ``"labels"`` of a mapping."""
    target = batch.get("labels") if isinstance(batch, dict) else batch[1] if isinstance(batch, (tuple, list)) else None
    if not isinstance(target, Tensor):
        raise InputError(
            "This metric needs targets: batches must be (inputs, target) tuples, or mappings with 'labels'."
        )
    return target


def logits_of(output: Any) -> Tensor:
    """Return the (B, classes) scores of an output: the tensor itself, or its ``logits``."""
    return output if isinstance(output, Tensor) else output.logits


def top1_error(output: Any, batch: Any) -> Tensor:
    """Return 100 where the best class is wrong, 0 where it is right: its mean is the top-1 error in %."""
    return 100.0 * (logits_of(output).argmax(dim=-1) != target_of(batch)).double()


def top5_error(output: Any, batch: Any) -> Tensor:
    """Return 100 where the target is not among the best five: its mean is the top-5 error in %."""
    best = logits_of(output).topk(5, dim=-1).indices
    return 100.0 * (best != target_of(batch).unsqueeze(-1)).all(dim=-1).double()


def cross_entropy(output: Any, batch: Any) -> Tensor:
    """Return the cross-entropy of each sample, in nats."""
    return nn.functional.cross_entropy(logits_of(output), target_of(batch), reduction="none").double()


METRICS: dict[str, Metric] = {"top1": top1_error, "top5": top5_error, "cross_entropy": cross_entropy}


def metric_named(metric: str | Metric) -> Metric:
    """Return a metric by name, or the function itself."""
    if callable(metric):
        return metric
    if metric not in METRICS:
        raise unknown("metric", metric, METRICS)
    return METRICS[metric]


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
