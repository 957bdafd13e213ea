"""A plan that promises time is cut and timed before it is believed; where it falls short, more goes.

What blocks cost is told apart within passes of the whole network, and added up. In the network that is left a block
may take a few per cent more: caches and the pace of memory do not add up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.cost import interleaved, resized
from resect.blocks.example import Example, device_of
from resect.blocks.modes import kept_modes
from resect.blocks.plan import Plan
from resect.errors import InputError
from resect.shrink.costs import BlockCosts, without
from resect.shrink.ranking import Ranking

Times = dict[str, dict[str, list[float]]]
"""By batch size, of the ``whole`` and of the ``cut`` network: ms, and ±, the half-width of their 95 % interval."""
_TRIES = 8


def measured(
    model: nn.Module, blocks: Blocks, names: Collection[str], example: Any, batches: Sequence[int], rounds: int
) -> Times:
    """Time a network in eval mode, whole and without some blocks, in turns; the model is left as it is."""
    nets = {"whole": model, "cut": without(model, blocks, names).eval()}
    found: Times = {}
    with kept_modes(model), torch.no_grad():
        model.eval()
        for batch in batches:
            inputs = resized(Example.of(example).to(device_of(model)), batch)
            calls = {name: lambda net=net: net(*inputs.args, **inputs.kwargs) for name, net in nets.items()}  # noqa: B023
            times = interleaved(calls, rounds, 2, 0.005)
            found[str(batch)] = {name: _middle(times[name]) for name in nets}
    return found


def _middle(seconds: list[float]) -> list[float]:
    """The median in ms, and the half-width of its 95 % interval, from the quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    error = (high - low) / 1.349 * (torch.pi / 2 / len(seconds)) ** 0.5
    return [1e3 * median, 1e3 * 1.96 * error]


def saved(times: Times) -> float:
    """The share of latency that is gone: the least of all batch sizes."""
    return min(1 - row["cut"][0] / row["whole"][0] for row in times.values())


def meeting(
    ranking: Ranking,
    fewer: Mapping[str, float],
    measure: Callable[[list[str]], Times],
    say: Callable[[str], None],
    *,
    costs: BlockCosts | None,
    **wishes: Any,
) -> Plan:
    """Return the plan that ``ranking.choose`` finds for the wishes and that saves the latency wished for, measured.

    Its evidence holds the times, as ``measured_ms``. Raises ``InputError`` for wishes that cannot be met.
    """
    asked, before = dict(fewer), 0.0
    for _ in range(_TRIES):
        try:
            plan = ranking.choose(fewer=asked or None, costs=costs, **wishes)
        except InputError as error:
            if not before:
                raise
            raise InputError(
                f"Cut and timed, no plan saves {fewer['latency']:.1%} of the latency; the last one saved {before:.1%}. "
                f"Ask for less, --target-latency {1 - before:.2f}, or try again on a quiet machine."
            ) from error
        if "latency" not in fewer:
            return plan
        times = measure(plan.names)
        before, wanted = saved(times), fewer["latency"]
        plan = replace(plan, evidence={**plan.evidence, "measured_ms": times})
        if before >= wanted:
            return plan
        promised = plan.evidence["saved"]["latency"]
        say(f"{promised:.1%} less latency was predicted; cut and timed it is {before:.1%}, so more has to go.")
        asked["latency"] = min(promised + 1e-6, 0.999)  # the next that is said to save more
    raise InputError(
        f"Cut and timed, {_TRIES} plans saved less than {wanted:.1%} of the latency, the last one {before:.1%}. "
        f"Ask for less, --target-latency {1 - before:.2f}, or try again on a quiet machine."
    )
