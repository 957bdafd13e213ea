"""From what a user wants to lose to a plan, for ``resect shrink``: how long that takes, and what to expect of it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

import resect
from resect.analyse.streams import samples_of
from resect.blocks.block import Blocks
from resect.blocks.example import forward_batch
from resect.blocks.measure import measure_closed
from resect.blocks.plan import Plan
from resect.errors import InputError, check_all
from resect.lab.display import Bars
from resect.lab.open import Opened
from resect.lab.shrink.candidate import Times, measured, meeting
from resect.lab.shrink.wishes import Wishes
from resect.lab.text import TextData
from resect.shrink.costs import BlockCosts
from resect.shrink.rank import Unit, units_of
from resect.shrink.ranking import CONTROLS, meant

BATCHES = (1, 32)
"""Batch sizes at which latency is measured."""
_ROUNDS = 15
_FIT = 50 * 64 * 4
"""Samples' worth of forward passes that a fit for recoverability takes."""


def check_fit(opened: Opened, blocks: Blocks, wishes: Wishes) -> None:
    """Raise ``InputError``, before any work, with everything that this model cannot be asked for."""
    wrong = []
    for option, names in (("--keep", wishes.keep), ("--names", wishes.names or ())):
        for name in names:
            try:
                meant(blocks, name)
            except InputError as error:
                wrong.append(f"{option}: {error}")
    if wishes.ranked and not wrong:
        _, kind, count = _free(blocks, wishes)
        if not count:
            wrong.append("--keep leaves no block that may go.")
        elif (wishes.n or 0) > count:
            wrong.append(f"--blocks {wishes.n}: there are {count} {kind}s that may go")
    check_all(wrong, opened.name)
    if wishes.needs_data:
        opened.batches("train", 1)


def _free(blocks: Blocks, wishes: Wishes) -> tuple[Blocks, Unit, int]:
    """The blocks that may go, by what they go, and how many of these there are: a unit of which one stays, stays."""
    kept = {name for key in wishes.keep for name in meant(blocks, key)}
    units, kind = units_of(blocks, wishes.unit)  # type: ignore[arg-type]
    free = [names for names in units.values() if not kept & set(names)]
    going = {name for names in free for name in names}
    return blocks.select([name for name in blocks.names if name in going]), kind, len(free)


def choose_plan(opened: Opened, blocks: Blocks, wishes: Wishes, display: Bars, say: Callable[[str], None]) -> Plan:
    """Return the plan that is wished for: by rank, names, a file, or the run's own plan.

    Raises ``InputError`` for wishes that cannot be met, none, or a plan that cuts nothing.
    """
    if wishes.ranked:
        return by_rank(opened, blocks, wishes, display, say)
    if wishes.names is not None:
        return Plan.of(blocks, [name for key in wishes.names for name in meant(blocks, key)])
    # That of a net that was cut says what is gone already.
    own = opened.folder / "plan.json" if opened.folder and not hasattr(opened.model, "resect_plan") else None
    if wishes.plan is None and (own is None or not own.exists()):
        raise InputError(
            "Nothing says which blocks to cut. Give --blocks N, --target-latency 0.7, --names a,b or --plan FILE."
        )
    plan = wishes.plan or Plan.load(own)  # type: ignore[arg-type]
    if not plan.blocks:
        raise InputError(
            "This plan cuts nothing: no block was muted in every step of the last epochs. "
            "Train longer, or cut the blocks that are missed least: --blocks N."
        )
    return Plan.of(blocks, plan)


def by_rank(opened: Opened, blocks: Blocks, wishes: Wishes, display: Bars, say: Callable[[str], None]) -> Plan:
    """Return the plan of what is missed least."""
    blocks, kind, count = _free(blocks, wishes)
    data = None if wishes.by in CONTROLS and wishes.at_most_worse is None else opened.batches("train", wishes.limit)
    say(f"Choosing takes about {_said(foreseen(opened, blocks, wishes, count, data))} at most.")
    costs = costs_of(opened, blocks) if wishes.fewer else None
    ranking = resect.rank(
        opened.model, blocks, data, by=wishes.by, unit=kind, search=wishes.search,  # type: ignore[arg-type]
        metric="cross_entropy",
        costs=None if wishes.search == "beam" else costs, depth=wishes.n,
        progress=functools.partial(display.steps, "ranked"),
    )  # fmt: skip
    if wishes.at_most_worse is not None:
        assert data is not None
        told = functools.partial(display.steps, "measured")
        ranking = ranking.measure(opened.model, data, metric=metric_of(opened), progress=told)
    timed = functools.partial(times_of, opened, blocks)
    return meeting(ranking, wishes.fewer, timed, say, costs=costs, n=wishes.n, at_most_worse=wishes.at_most_worse)


def costs_of(opened: Opened, blocks: Blocks) -> BlockCosts:
    """Return what blocks cost here, at batch 1 and 32."""
    return resect.block_costs(opened.model, blocks, opened.example(), BATCHES, rounds=_ROUNDS)


def times_of(opened: Opened, blocks: Blocks, names: Collection[str]) -> Times:
    """Return what the net takes here, whole and without some blocks, at batch 1 and 32."""
    return measured(opened.model, blocks, names, opened.example(), BATCHES, _ROUNDS)


def metric_of(opened: Opened) -> str:
    """Return what "worse" is measured in: points of top-1 error, or of perplexity."""
    return "perplexity" if isinstance(opened.data, TextData) else "top1"


def foreseen(opened: Opened, blocks: Blocks, wishes: Wishes, count: int, data: list[Any] | None) -> float:
    """Return about how many seconds choosing takes: the number of passes, by the time of one batch."""
    passes = 0.0
    growing = sum(count - step for step in range(min(wishes.n or count, count)))
    if wishes.by == "lesion":
        passes += {"once": count, "greedy": growing, "beam": 4 * growing, "runs": count * (count + 1) / 2}[
            wishes.search
        ]
    elif wishes.by not in CONTROLS:
        each = {"taylor": 3.0, "recoverability": count * _FIT / wishes.limit}.get(wishes.by, 1.0)
        passes += each * (count if wishes.search == "greedy" else 1)
    passes += count if wishes.at_most_worse is not None else 0
    seconds = 0.0
    if data:
        seconds += passes * len(data) * _seconds(lambda: forward_batch(opened.model, data[0]))
    if wishes.fewer:
        example = resect.Example.of(opened.example())
        samples = len(example.tensors()[0])
        one = _seconds(lambda: example.run(opened.model))
        seconds += 3.3 * (_ROUNDS + 2) * one * sum(max(batch / samples, 0.1) for batch in BATCHES)
    return seconds


def _seconds(run: Callable[[], Any]) -> float:
    with torch.no_grad():
        run()
        start = time.perf_counter()
        run()
    return time.perf_counter() - start


def _said(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def expected(opened: Opened, blocks: Blocks, plan: Plan, wishes: Wishes) -> Iterator[str]:
    """Say what a plan saves, timed on a copy that is cut, and costs before recovery; nothing is changed or written."""
    just = plan.evidence.get("measured_ms") if wishes.ranked else None  # a file may say what another machine measured
    times: Times = just or times_of(opened, blocks, plan.names)
    for batch, row in times.items():
        (whole, more), (cut, less) = row["whole"], row["cut"]
        change = f"{whole:.2f} ± {more:.2f} → {cut:.2f} ± {less:.2f} ms ({cut / whole - 1:+.1%})"
        noisy = more > whole / 3 or less > cut / 3
        doubt = " (too noisy to say: try again on a quiet machine)" if noisy else ""
        yield f"Latency at batch {batch}: {change}.{doubt}"
    costs = resect.block_costs(opened.model, blocks, opened.example(), ())
    flops, parameters = (costs.saved(quantity, plan.names) for quantity in ("flops", "parameters"))
    yield f"FLOPs: {-flops:+.1%}. Parameters: {-parameters:+.1%}."
    if opened.data is None:
        return
    metric = metric_of(opened)
    data = opened.batches("train", wishes.limit)
    whole, [cut] = measure_closed(opened.model, blocks, data, [tuple(plan.names)], metric)
    samples = f"{sum(map(samples_of, data))} {'sequences' if isinstance(opened.data, TextData) else 'training images'}"
    unit = " %" * (metric == "top1")
    yield f"{metric} on {samples}, before recovery: {whole:.4g}{unit} → {cut:.4g}{unit}."
