"""What is measured of an output: one number per sample, or per token of a language model; lower is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resect.errors import InputError, quoted, unknown

Metric = Callable[[Any, Any], Tensor]
"""``metric(output, batch)`` gives one number per sample, (B,); their mean counts. Lower is better."""

IGNORED = -100
"""The label of a token that does not count, as transformers has it."""

# Their logits stand at the labels' own places; every other (B, T, classes) output says at token t what token t+1 is.
_NOT_SHIFTED = ("MaskedLM", "Seq2Seq", "TokenClassifier")


def target_of(batch: Any) -> Tensor:
    """Return the target of a batch: the second item of a tuple, ``"labels"`` of a mapping."""
    found = None
    if isinstance(batch, Mapping):
        found = batch.get("labels")
    elif isinstance(batch, (tuple, list)) and len(batch) > 1:
        found = batch[1]
    if not isinstance(found, Tensor):
        raise InputError(
            "This metric needs targets: batches must be (inputs, target) tuples, or mappings with 'labels' (of a "
            "language model: a copy of input_ids, with -100 where a token does not count). One batch alone is no data "
            "yet: pass [(inputs, target)]."
        )
    return found


def logits_of(output: Any) -> Tensor:
    """Return the scores of an output: the tensor itself, its ``logits``, or the first tensor of a tuple."""
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if isinstance(found, (tuple, list)):
        found = next((item for item in found if isinstance(item, Tensor) and item.dim() > 1), None)
    if isinstance(found, Tensor):
        return found.float() if found.dtype in (torch.float16, torch.bfloat16) else found
    keys = f" with {quoted(output)}" if isinstance(output, Mapping) else ""
    raise InputError(
        f"The model returns a {type(output).__name__}{keys}, in which this metric finds no scores. Pass a metric of "
        "your own, metric(output, batch) -> one number per sample, or forward=(model, batch) -> scores."
    )


def _scored(output: Any, batch: Any) -> tuple[Tensor, Tensor]:
    """Return scores (N, classes) and targets (N,): N samples, or those tokens of a language model that count.

    Scores (B, T, classes) and labels (B, T) are shifted by one token as transformers does, but for outputs of
    masked and sequence-to-sequence models and of token classifiers, whose labels are not shifted there either.
    """
    logits, target = logits_of(output), target_of(batch)
    if logits.dim() == 3 and target.shape == logits.shape[:2]:
        if not type(output).__name__.startswith(_NOT_SHIFTED):
            logits, target = logits[:, :-1], target[:, 1:]
        logits, target = logits.flatten(0, 1), target.flatten()
    if logits.dim() != 2 or target.shape != logits.shape[:1]:
        raise InputError(
            f"This metric does not fit: the scores have the shape {tuple(logits.shape)} and the targets "
            f"{tuple(target.shape)}. It takes (B, classes) with (B,), or (B, T, classes) with (B, T). For anything "
            "else pass a metric of your own: metric(output, batch) -> one number per sample."
        )
    if target.is_floating_point() and not target.equal(target.round()):
        raise InputError(f"The targets are {target.dtype} and no whole numbers: classes are counted from 0.")
    target = target.long()
    kept = target != IGNORED
    logits, target = logits[kept], target[kept]
    low, high = (int(target.min()), int(target.max())) if len(target) else (0, 0)
    if low < 0 or high >= logits.shape[-1]:
        raise InputError(
            f"The targets go from {low} to {high}, and the model tells {logits.shape[-1]} classes apart: it takes 0 to "
            f"{logits.shape[-1] - 1}. Is this the data that the model was trained on?"
        )
    return logits, target


def _errors(wrong: Tensor, logits: Tensor) -> Tensor:
    """Return 100 where wrong, NaN where a score is: of NaN scores one class is always the best, and nothing matters."""
    return torch.where(logits.isnan().any(dim=-1), torch.nan, 100.0 * wrong.double())


def top1_error(output: Any, batch: Any) -> Tensor:
    """Return 100 where the best class is wrong, 0 where it is right: its mean is the top-1 error in %."""
    logits, target = _scored(output, batch)
    return _errors(logits.argmax(dim=-1) != target, logits)


def top5_error(output: Any, batch: Any) -> Tensor:
    """Return 100 where the target is not among the best five: its mean is the top-5 error in %."""
    logits, target = _scored(output, batch)
    if logits.shape[-1] < 5:
        raise InputError(f"top5 needs at least 5 classes; this model has {logits.shape[-1]}. Use top1.")
    return _errors((logits.topk(5, dim=-1).indices != target.unsqueeze(-1)).all(dim=-1), logits)


def cross_entropy(output: Any, batch: Any) -> Tensor:
    """Return the cross-entropy of each sample, or of each token, in nats."""
    logits, target = _scored(output, batch)
    return nn.functional.cross_entropy(logits, target, reduction="none").double()


def perplexity(output: Any, batch: Any) -> Tensor:
    """Return the cross-entropies; ``mean_of`` makes the perplexity of them, which no mean of numbers is."""
    return cross_entropy(output, batch)


METRICS: dict[str, Metric] = {
    "top1": top1_error,
    "top5": top5_error,
    "cross_entropy": cross_entropy,
    "perplexity": perplexity,
}


def metric_named(metric: str | Metric) -> Metric:
    """Return a metric by name; a function is returned with a check of what it gives."""
    if isinstance(metric, str):
        if metric not in METRICS:
            raise unknown("metric", metric, METRICS)
        return METRICS[metric]
    if not callable(metric):
        raise InputError(
            f"metric must be one of {quoted(METRICS)} or a function (output, batch) -> one number per sample, not "
            f"{metric!r}."
        )
    return metric if metric in METRICS.values() else _checked(metric)


def metric_label(metric: str | Metric) -> str:
    """Return what a metric is called in tables."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")


def mean_of(metric: Metric, total: float, count: int) -> float:
    """Return a metric's value on all data from the sum and the number of what it gave on each batch.

    Raises ``InputError`` where nothing was given, and where it is not finite.
    """
    if not count:
        raise InputError(
            "The data gave no samples, or none that counts. Pass a list of batches or a DataLoader, not an exhausted "
            "iterator."
        )
    mean = total / count
    if not math.isfinite(mean):
        raise InputError(
            "The metric is NaN or infinite on this data: look at the model's weights, the inputs and the targets."
        )
    return finished(metric, mean)


def finished(metric: Metric, mean: float) -> float:
    """Return a metric's value from the mean of what it gave: of perplexity, the exponential."""
    if metric is not perplexity:
        return mean
    return math.exp(mean) if mean < 700 else math.inf


def _checked(metric: Metric) -> Metric:
    """Return the metric with a check that it gives one number per sample."""

    def checked(output: Any, batch: Any) -> Tensor:
        try:
            values = metric(output, batch)
        except (TypeError, AttributeError, LookupError) as error:
            raise InputError(
                f"The metric {metric_label(metric)!r} failed: {error}. It is called as metric(output, batch), with the "
                "whole batch: of (inputs, target) the target is batch[1]."
            ) from error
        size = next((leaf.shape[0] for leaf in tree_leaves(_plain(batch)) if _has_rows(leaf)), None)
        if isinstance(values, Tensor) and values.dim() == 1 and len(values) == (len(values) if size is None else size):
            return values
        got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"{values!r:.80}"
        wanted = "a tensor of shape (B,)" if size is None else f"a tensor of shape ({size},)"
        raise InputError(
            f"The metric {metric_label(metric)!r} returned {got} for a batch of {size or 'B'} samples. It must return "
            f"one number per sample, {wanted}; a mean over the batch would count the last, smaller batch too much "
            "(in torch's losses: reduction='none')."
        )

    return checked


def _plain(batch: Any) -> Any:
    return dict(batch) if isinstance(batch, Mapping) else batch


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0
