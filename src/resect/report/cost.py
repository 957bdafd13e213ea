"""What a model costs: parameters, FLOPs of one pass, and measured latency."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from resect.blocks.example import Example
from resect.blocks.modes import kept_modes
from resect.errors import InputError

clock = time.perf_counter  # seconds; a name of its own, so that tests can put a clock of theirs here


def count_parameters(model: nn.Module) -> int:
    """Number of parameters (not bytes); one that is shared by several modules counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_flops(model: nn.Module, example: Any) -> int:
    """FLOPs of one forward pass on ``example``, in eval mode and without gradients.

    As torch's counter counts: matrix products, convolutions and attention, a multiply-add being 2 FLOPs;
    normalisation, activations and additions are not counted.
    """
    with kept_modes(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        Example.of(example).run(model.eval())
    return int(counter.get_total_flops())


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
    with kept_modes(*models), torch.inference_mode():
        for model in models:
            model.eval()
        for batch in [None] if batches is None else batches:
            calls = {name: _bind(variant, batch) for name, variant in variants.items()}
            sizes = {name: _batch(variant, batch) for name, variant in variants.items()}
            for name, times in _interleave(calls, rounds, warmup, at_least_ms / 1e3).items():
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
    return next((tensor.shape[0] for tensor in Example.of(variant[1]).tensors() if tensor.dim()), None)


def _bind(variant: Any, batch: int | None) -> Callable[[], Any]:
    """A variant as a callable, with its example cycled or shortened to ``batch`` samples."""
    if not isinstance(variant, tuple):
        return variant
    model, example = variant
    args, kwargs = Example.of(example).args, dict(Example.of(example).kwargs)
    size = _batch(variant, None)
    if batch is not None and size is not None:

        def resize(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor) or not leaf.dim() or leaf.shape[0] != size:
                return leaf
            return leaf[torch.arange(batch, device=leaf.device) % size]

        args, kwargs = tree_map(resize, (args, kwargs))
    return lambda: model(*args, **kwargs)


def _interleave(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warmup: int, at_least: float
) -> dict[str, list[float]]:
    """Seconds per call, ``rounds`` of them for each variant, taken in turns."""
    for _ in range(warmup):
        for run in calls.values():
            run()
    repeats = dict.fromkeys(calls, 1)
    for name, run in calls.items():
        # From one timed call to the number that fills the time, with a look at whether it really does.
        while (spent := _seconds(run, repeats[name])) < at_least and repeats[name] < 2**20:
            wanted = 1.2 * at_least * repeats[name] / spent if spent > 0 else 0.0
            repeats[name] = min(2**20, max(2 * repeats[name], round(wanted)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, run in calls.items():
            times[name].append(_seconds(run, repeats[name]) / repeats[name])
    return times


def _seconds(run: Callable[[], Any], repeats: int) -> float:
    """Seconds for ``repeats`` calls, the work of an accelerator included."""
    _synchronize()
    start = clock()
    for _ in range(repeats):
        run()
    _synchronize()
    return clock() - start


def _synchronize() -> None:
    """Wait for the accelerator, if there is one: it works on after a call has returned."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
