"""A table of what models cost, side by side: what they are, what they hold, and how fast they run in several ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from resect.blocks.cost import resized
from resect.blocks.example import Example, device_of
from resect.blocks.modes import kept_modes
from resect.errors import InputError
from resect.report.cost import count_flops, count_parameters, latency
from resect.report.memory import activation_memory

Ready = Callable[[nn.Module, Example], Callable[[], Any]]
"""Makes a model, in eval mode, ready to run on an example: a call without arguments. Compiles or exports it, say."""


def eager(model: nn.Module, example: Example) -> Callable[[], Any]:
    """The model as it is."""
    here = example.to(device_of(model))
    return lambda: model(*here.args, **here.kwargs)


def costs(
    models: Mapping[str, nn.Module],
    example: Any,
    *,
    batches: Sequence[int] = (1, 32),
    ways: Mapping[str, Ready] | None = None,
    rounds: int = 15,
) -> list[dict[str, Any]]:
    """What models cost on one example: a row per model, batch size and way to run it.

    Columns: net, batch, way; parameters (number), flops (of one pass at this batch size, a multiply-add being 2),
    activation_bytes (`activation_memory`); median_ms, low_ms and high_ms (quartiles of ``rounds`` measurements) of a
    pass without gradients, all models and ways of a batch size in turns; per_second (samples, at the median).

    Args:
        models: left as they are; they run in eval mode.
        example: what all of them take; repeated or shortened to each of ``batches`` along its first dimension.
        ways: how they run, ``{"eager": eager}`` without it. What they make ready is not timed.

    Raises:
        InputError: no model, no batch size, or fewer than two rounds.
    """
    if not models or not batches:
        raise InputError("costs needs at least one model and one batch size.")
    ways, rows = ways or {"eager": eager}, []
    with kept_modes(*models.values()):
        for model in models.values():
            model.eval()
        for batch in batches:
            sized = resized(Example.of(example), batch)
            with torch.no_grad():
                calls = {(net, way): ways[way](model, sized) for net, model in models.items() for way in ways}
            static = {
                net: {
                    "parameters": count_parameters(model),
                    "flops": count_flops(model, sized),
                    "activation_bytes": activation_memory(model, sized),
                }
                for net, model in models.items()
            }
            timed = latency({f"{net}\n{way}": call for (net, way), call in calls.items()}, rounds)
            for (net, way), time in zip(calls, timed, strict=True):
                spread = {key: time[key] for key in ("median_ms", "low_ms", "high_ms")}
                speed = {"per_second": 1e3 * batch / time["median_ms"] if time["median_ms"] else float("inf")}
                rows.append({"net": net, "batch": batch, "way": way} | static[net] | spread | speed)
    return rows
