"""What a model costs: parameters, FLOPs of one pass, and measured latency."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from resect.blocks.cost import count_flops, interleaved, resized, samples_in
from resect.blocks.example import Example
from resect.blocks.modes import kept_modes
from resect.errors import InputError

__all__ = ["count_flops", "count_parameters", "latency"]


def count_parameters(model: nn.Module) -> int:
    """Number of parameters (not bytes); one that is shared by several modules counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def latency(
    variants: Mapping[str, Callable[[], Any] | tuple[nn.Module, Any]],
    rounds: int = 15,
    warmup: int = 3,
    *,
    batches: Sequence[int] | None = None,
    at_least_ms: float = 5.0,
) -> list[dict[str, Any]]:
    """Time variants in turns (A B C A B C …), so that a busy moment of the machine slows all of them alike.

    A variant is a callable without arguments, or (model, example), which runs in eval mode without
    gradients; the modes of all modules are restored afterwards. ``batches`` repeats or shortens the
    examples along their first dimension to these batch sizes; without it they run as they are.

    One measurement repeats the call as often as it takes to last ``at_least_ms``. Returns one row per
    variant and batch size: variant, batch (None for a callable), median_ms, low_ms and high_ms (lower and
    upper quartile over ``rounds`` measurements), all per call.
    """
    if rounds < 2 or warmup < 0:
        raise InputError(f"rounds must be at least 2 and warmup at least 0; got {rounds} and {warmup}.")
    if batches is not None and any(not isinstance(variant, tuple) for variant in variants.values()):
        raise InputError("batches= needs every variant as (model, example): a callable brings its own data.")
    models = [variant[0] for variant in variants.values() if isinstance(variant, tuple)]
    rows = []
    with kept_modes(*models), torch.no_grad():
        for model in models:
            model.eval()
        for batch in [None] if batches is None else batches:
            calls = {name: _bind(variant, batch) for name, variant in variants.items()}
            sizes = {name: _batch(variant, batch) for name, variant in variants.items()}
            for name, times in interleaved(calls, rounds, warmup, at_least_ms / 1e3).items():
                low, median, high = (1e3 * value for value in statistics.quantiles(times, n=4, method="inclusive"))
                rows.append(
                    {
                        "variant": name,
                        "batch": sizes[name],
                        "median_ms": median,
                        "low_ms": low,
                        "high_ms": high,
                    }
                )
    return rows


def _batch(variant: Any, batch: int | None) -> int | None:
    """The batch size a variant runs at: as asked, or the first dimension of its first tensor."""
    if batch is not None or not isinstance(variant, tuple):
        return batch
    return samples_in(Example.of(variant[1]))


def _bind(variant: Any, batch: int | None) -> Callable[[], Any]:
    """A variant as a callable, with its example cycled or shortened to ``batch`` samples."""
    if not isinstance(variant, tuple):
        return variant
    model, example = variant
    example = Example.of(example) if batch is None else resized(Example.of(example), batch)
    return lambda: model(*example.args, **example.kwargs)
