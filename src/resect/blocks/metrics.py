"""What is measured of an output: one number per sample, lower is better."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from resect.errors import InputError, unknown

Metric = Callable[[Any, Any], Tensor]
"""``metric(output, batch)`` gives one number per sample, (B,); their mean counts. Lower is better."""


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
