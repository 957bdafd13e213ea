"""From what a user wants to lose to a plan, for ``resect shrink``: how long that takes, and what to expect of it."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch

import resect
from resect.blocks.block import Blocks
from resect.blocks.example import forward_batch
from resect.blocks.measure import measure_closed
from resect.blocks.plan import Plan
from resect.errors import InputError, check_all, unknown
from resect.lab.display import Bars
from resect.lab.open import Opened
from resect.lab.text import TextData
from resect.shrink.costs import BlockCosts, check_shares
from resect.shrink.rank import By, Search, Unit, units_of
from resect.shrink.ranking import CONTROLS, meant

BATCHES = (1, 32)
"""Batch sizes at which latency is measured."""
_ROUNDS = 15
_FIT = 50 * 64 * 4
"""Samples' worth of forward passes that a fit for recoverability takes."""


@dataclass(frozen=True)
class Wishes:
    """What ``resect shrink`` was asked for."""

    number: int | None = None
    names: str | None = None
    plan: Plan | None = None
    """What a file says."""
    fewer: dict[str, float] = field(default_factory=dict)
    worse: float | None = None
    keep: tuple[str, ...] = ()
    by: str = "lesion"
    search: str = "once"
    unit: str | None = None
    limit: int = 1000

    @property
    def ranked(self) -> bool:
        """Whether blocks are to be ranked."""
        return self.number is not None or bool(self.fewer) or self.worse is not None


def read_wishes(
    fewer: str, target_latency: float | None, keep: str, *, plan: Path | None = None, **others: Any
) -> Wishes:
    """Read ``latency=0.3,flops=0.2``, ``layer1.0,layer2.0``, the share of latency to be left, and the file of a plan.

    Raises ``InputError`` with everything that is wrong with them; ``FileError`` for a file that is no plan.
    """
    shares: dict[str, float] = {}
    wrong = []
    for part in filter(None, (part.strip() for part in fewer.split(","))):
        name, _, share = part.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError:
            wrong.append(f"--fewer {part!r} must look like latency=0.3, flops=0.3 or parameters=0.3")
    if target_latency is not None:
        if "latency" in shares:
            wrong.append("--target-latency and --fewer latency=… say the same: give one")
        if not 0 < target_latency < 1:
            wrong.append(
                f"--target-latency is the share of latency that is left, 0.7 for 30 % less, not {target_latency:g}"
            )
        shares["latency"] = 1 - target_latency
    worse = others.get("worse")
    if worse is not None and not 0 <= worse < math.inf:
        wrong.append(f"--at-most-worse is points of error that it may cost, from 0 up, not {worse:g}")
    check_all(wrong, "What shall go")
    if shares:
        check_shares(shares)
    wishes = Wishes(fewer=shares, keep=tuple(filter(None, (name.strip() for name in keep.split(",")))), **others)
    for what, said, known in (("score", wishes.by, By), ("search", wishes.search, Search), ("unit", wishes.unit, Unit)):
        if said is not None and said not in get_args(known):
            raise unknown(what, said, get_args(known))
    if sum((wishes.ranked, wishes.names is not None, plan is not None)) > 1:
        raise InputError(
            "Give one of --names, --plan, and what is to be ranked for: --blocks, --fewer, --target-latency, "
            "--at-most-worse."
        )
    if not wishes.ranked and (wishes.keep or wishes.by != "lesion" or wishes.search != "once" or wishes.unit):
        raise InputError(
            "--keep, --by, --search and --unit are about ranking. Say how much shall go: --blocks N, "
            "--fewer flops=0.3, --target-latency 0.7 or --at-most-worse 0.5."
        )
    return wishes if plan is None else replace(wishes, plan=_read(plan))


def _read(file: Path) -> Plan:
    """The plan in a file, or in the folder of a cut model or a run."""
    return Plan.load(file / "plan.json" if file.is_dir() else file)


def choose_plan(opened: Opened, blocks: Blocks, wishes: Wishes, display: Bars, say: Callable[[str], None]) -> Plan:
    """Return the plan that is wished for: by rank, names, a file, or the run's own plan.

    Raises ``InputError`` for wishes that cannot be met, none, or a plan that cuts nothing.
    """
    if wishes.ranked:
        return _by_rank(opened, blocks, wishes, display, say)
    if wishes.names is not None:
        return Plan.of(blocks, [name.strip() for name in wishes.names.split(",")])
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
    return plan


def _by_rank(opened: Opened, blocks: Blocks, wishes: Wishes, display: Bars, say: Callable[[str], None]) -> Plan:
    kept = {name for key in wishes.keep for name in meant(blocks, key)}
    blocks = blocks.select([name for name in blocks.names if name not in kept])
    if not blocks:
        raise InputError("--keep leaves no block that may go.")
    units, kind = units_of(blocks, wishes.unit)  # type: ignore[arg-type]
    depth = wishes.number if wishes.number is None else min(wishes.number, len(units))
    data = None if wishes.by in CONTROLS and wishes.worse is None else opened.batches("train", wishes.limit)
    say(f"Choosing takes about {_said(foreseen(opened, blocks, wishes, len(units), data))} at most.")
    costs = costs_of(opened, blocks) if wishes.fewer else None
    ranking = resect.rank(
        opened.model, blocks, data, by=wishes.by, unit=kind, search=wishes.search, metric="cross_entropy",  # type: ignore[arg-type]
        costs=None if wishes.search == "beam" else costs, depth=depth,
        progress=functools.partial(display.steps, "ranked"),
    )  # fmt: skip
    if wishes.worse is not None:
        assert data is not None
        told = functools.partial(display.steps, "measured")
        ranking = ranking.measure(opened.model, data, metric=metric_of(opened), progress=told)
    return ranking.choose(wishes.number, fewer=wishes.fewer or None, at_most_worse=wishes.worse, costs=costs)


def costs_of(opened: Opened, blocks: Blocks) -> BlockCosts:
    """Return what blocks cost here, at batch 1 and 32."""
    return resect.block_costs(opened.model, blocks, opened.example(), BATCHES, rounds=_ROUNDS)


def metric_of(opened: Opened) -> str:
    """Return what "worse" is measured in: points of top-1 error, or of perplexity."""
    return "perplexity" if isinstance(opened.data, TextData) else "top1"


def foreseen(opened: Opened, blocks: Blocks, wishes: Wishes, count: int, data: list[Any] | None) -> float:
    """Return about how many seconds choosing takes: the number of passes, by the time of one batch."""
    passes = 0.0
    growing = sum(count - step for step in range(min(wishes.number or count, count)))
    if wishes.by == "lesion":
        passes += {"once": count, "greedy": growing, "beam": 4 * growing, "runs": count * (count + 1) / 2}[
            wishes.search
        ]
    elif wishes.by not in CONTROLS:
        each = {"taylor": 3.0, "recoverability": count * _FIT / wishes.limit}.get(wishes.by, 1.0)
        passes += each * (count if wishes.search == "greedy" else 1)
    passes += count if wishes.worse is not None else 0
    seconds = 0.0
    if data:
        seconds += passes * len(data) * _seconds(lambda: forward_batch(opened.model, data[0]))
    if wishes.fewer:
        example = resect.Example.of(opened.example())
        samples = len(example.tensors()[0])
        one = _seconds(lambda: example.run(opened.model))
        seconds += 1.6 * (_ROUNDS + 2) * one * sum(max(batch / samples, 0.1) for batch in BATCHES)
    return seconds


def _seconds(run: Callable[[], Any]) -> float:
    with torch.inference_mode():
        run()
        start = time.perf_counter()
        run()
    return time.perf_counter() - start


def _said(seconds: float) -> str:
    return f"{max(1, round(seconds))} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"


def expected(opened: Opened, blocks: Blocks, plan: Plan, limit: int) -> Iterator[str]:
    """Say what a plan is expected to save, and to cost before recovery; nothing is changed or written."""
    costs = costs_of(opened, blocks)
    for batch in BATCHES:
        (whole, more), (cut, less) = costs.latency((), batch), costs.latency(plan.names, batch)
        change = f"{whole:.2f} ± {more:.2f} → {cut:.2f} ± {less:.2f} ms ({cut / whole - 1:+.1%})"
        noisy = more > whole / 3 or less > cut / 3
        doubt = " (too noisy to say: try again on a quiet machine)" if noisy else ""
        yield f"Latency at batch {batch}: {change}.{doubt}"
    flops, parameters = (costs.saved(quantity, plan.names) for quantity in ("flops", "parameters"))
    yield f"FLOPs: {-flops:+.1%}. Parameters: {-parameters:+.1%}."
    if opened.data is None:
        return
    metric = metric_of(opened)
    data = opened.batches("train", limit)
    whole, [cut] = measure_closed(opened.model, blocks, data, [tuple(plan.names)], metric)
    samples = "sequences" if isinstance(opened.data, TextData) else "training images"
    unit = " %" * (metric == "top1")
    yield f"{metric} on {limit} {samples}, before recovery: {whole:.4g}{unit} → {cut:.4g}{unit}."
