"""A score per unit, a search, and from them a ladder."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.example import Forward, forward_batch
from resect.blocks.gate import Which, resolve
from resect.blocks.measure import Progress
from resect.blocks.metrics import Metric, metric_label, metric_named
from resect.errors import BlocksError, InputError, check_all, check_counts, nearest, quoted, unknown
from resect.shrink import search as find
from resect.shrink.costs import BlockCosts
from resect.shrink.missed import Missed
from resect.shrink.ranking import CONTROLS, Ranking, Rung
from resect.shrink.recoverability import recoverability
from resect.shrink.samples import first_batches
from resect.shrink.streams import SCORES, stream_scores, unbroken
from resect.shrink.taylor import taylor_scores

By: TypeAlias = Literal["lesion", "influence", "angle", "size", "taylor", "recoverability", "random", "last"]
Unit: TypeAlias = Literal["block", "layer"]
Search: TypeAlias = Literal["once", "greedy", "beam", "runs"]
Set = tuple[str, ...]
Scorer = Callable[[Set, list[Set]], list[float]]
"""``score(gone, sets)``: how much each set of blocks is missed where ``gone`` are gone already."""


def rank(
    model: nn.Module,
    blocks: Which,
    data: Iterable[Any] | None = None,
    *,
    by: By | Mapping[str, float] = "lesion",
    unit: Unit | None = None,
    search: Search = "once",
    metric: str | Metric = "top1",
    costs: BlockCosts | None = None,
    depth: int | None = None,
    width: int = 3,
    steps: int | None = None,
    seed: int = 0,
    forward: Forward = forward_batch,
    progress: Progress | None = None,
) -> Ranking:
    """Score units by how much the model misses them, and say for every number of units which of them go.

    Parameters
    ----------
    model, blocks: left exactly as they are.
    data: batches; gone through several times by everything but one pass of ``influence``, ``angle``, ``size`` and
        ``taylor``, and ``recoverability``, which keeps 512 samples for all fits. ``random``, ``last`` and numbers of
        your own need none.
    by: the score; whatever it is, the lowest go first.

        - ``"lesion"``: how much the metric rises when the unit is closed. Exact.
        - ``"influence"``: 1 − cos of the stream before and after, per token or place (ShortGPT, 2403.03853). No labels.
        - ``"angle"``: arccos(cos)/π at the last token (2403.17887), of images at 16 places; made for ``"runs"``.
        - ``"size"``: ‖what the unit adds‖ / ‖stream before‖ (1710.04773).
        - ``"taylor"``: |first-order change of the loss| (1611.06440): the cross-entropy, or ``metric`` if a function.
        - ``"recoverability"``: how far the features stay from the whole model's once the rest has mimicked them for
          ``steps`` (PRACTISE, 2202.07861, there per millisecond saved: give ``costs``). No labels; a fit per unit.
        - ``"random"`` (by ``seed``), ``"last"`` (the deepest first, the very last unit at the end: the simple strategy
          of 2403.17887): controls, which no cost changes.
        - a mapping {block or unit: number}; of several blocks the sum counts.
    unit: ``"block"``, or ``"layer"``: all blocks of a layer go together. By default layers where one holds several
        blocks, as in transformers: only cut by whole layers they load with their own class.
    search: N units, of which at most ``depth`` go:

        - ``"once"``: in the order of the scores. Lesions: N measurements; other scores one pass.
        - ``"greedy"``: re-scored after each cut: N + (N − 1) + … measurements, or ``depth`` passes.
        - ``"beam"``: the ``width`` best sets of each size grow (lesions only): at most width + 1 times as many; never
          ends above greedy.
        - ``"runs"``: neighbouring units, the best run of each length: N (N + 1) / 2 measurements at most, or one pass.
          Scores of the stream take runs without another shortcut inside.
    metric: of ``"lesion"``, lower is better; a name or a function, as in ``lesion_study``.
    costs: from ``block_costs``: what is missed least *per millisecond saved* goes first (per FLOP where no latency was
        measured). Not with ``"beam"``, which compares nets of one size by the metric alone.
    depth: the largest number of units, by default all.
    width: of the beam.
    steps: of ``"recoverability"`` alone: optimizer steps of each unit's fit, by default 50.
    seed: of ``"random"``, and of the order of the samples in ``"recoverability"``.
    forward, progress: as in ``lesion_study``.

    Raises
    ------
    InputError: unknown options, with the nearest that exist; options without effect; numbers that are missing, not
        finite, or of unknown blocks; data that run dry; a metric that is NaN.
    BlocksError: no blocks, or blocks or layers that a score cannot look at.

    >>> ranking = resect.rank(model, blocks, data, by="influence")
    >>> plan = ranking.choose(n=4)
    """
    blocks = resolve(model, blocks)
    if not blocks:
        raise BlocksError("There is nothing to rank: the selection of residual blocks is empty.")
    check_all(option_mistakes(by, unit, search, costs=costs is not None, steps=steps), "rank()")
    _check_data(by, search, data)
    units, kind = units_of(blocks, unit)
    if by in SCORES:
        _check_unbroken(blocks, units, str(by))
    sets, count = list(units.values()), len(units)
    depth = count if depth is None else depth
    if isinstance(depth, bool) or not isinstance(depth, int) or not 1 <= depth <= count:
        raise InputError(f"depth must be a whole number from 1 to {count}, the {kind}s ranked, not {depth!r}.")
    check_counts(width=(width, 1))
    data = () if data is None else data
    missed = Missed(model, blocks, data, metric, forward, progress)
    score = _scorer(model, blocks, data, by, units, metric, forward, steps, seed, missed)
    control = by in CONTROLS

    def gain(places: tuple[int, ...]) -> float:
        return 1.0 if costs is None or control else costs.gain(_joined(sets, places))

    def scored(gone: tuple[int, ...], places: list[tuple[int, ...]]) -> list[float]:
        return score(_joined(sets, gone), [_joined(sets, several) for several in places])

    alone: list[float]
    if search == "runs":
        several = find.runs(count, depth, lambda at: by not in SCORES or unbroken(blocks, _joined(sets, at)))
        missed.total = len(several)
        scores = scored((), several)
        alone = scores[:count]  # a unit by itself is always a run
        found = find.best_runs(several, scores, gain)
    elif search == "once":
        missed.total = count
        alone = scored((), [(place,) for place in range(count)])
        order = find.in_order(alone, gain)
        found = [tuple(order[: size + 1]) for size in range(depth)]
    elif search == "greedy":
        missed.total = sum(count - step for step in range(depth))
        found = list(find.greedy(count, depth, scored, gain))
        alone = scored((), [(place,) for place in range(count)])
    else:
        missed.total = 0
        found = list(find.beam(count, depth, lambda places: missed.values([_joined(sets, at) for at in places]), width))
        alone = scored((), [(place,) for place in range(count)])
    names = list(units)
    ladder = tuple(
        Rung(tuple(names[place] for place in places), missed.known.get(missed.named(_joined(sets, places))))
        for places in found
    )
    return Ranking(
        blocks, by if isinstance(by, str) else "numbers", dict(zip(names, alone, strict=True)), units, ladder, search,
        kind, metric_label(metric) if missed.known else "", missed.known.get(()), costs,
    )  # fmt: skip


def units_of(blocks: Blocks, unit: Unit | None = None) -> tuple[dict[str, Set], Unit]:
    """Return what goes together, {name: names of its blocks}, and whether that is blocks or layers."""
    layers = blocks.layers()
    if unit is None:
        unit = "layer" if len(layers) < len(blocks) else "block"
    if unit == "block":
        return {name: (name,) for name in blocks.names}, unit
    return {name: tuple(layer.names) for name, layer in layers.items()}, unit


def _joined(sets: Sequence[Set], places: Iterable[int]) -> Set:
    return tuple(name for place in sorted(places) for name in sets[place])


def _scorer(
    model: nn.Module,
    blocks: Blocks,
    data: Iterable[Any],
    by: By | Mapping[str, float],
    units: Mapping[str, Set],
    metric: str | Metric,
    forward: Forward,
    steps: int | None,
    seed: int,
    missed: Missed,
) -> Scorer:
    if by == "lesion":
        return missed.rises
    if by == "taylor":
        loss = {} if isinstance(metric, str) else {"loss": metric_named(metric)}
        return lambda gone, sets: taylor_scores(model, blocks, data, gone, sets, forward, **loss)
    if by == "recoverability":
        how: dict[str, Any] = {"seed": seed} if steps is None else {"seed": seed, "steps": steps}
        kept = first_batches(model, data)  # drawn once: every unit is fitted on the same samples
        return lambda gone, sets: [
            recoverability(model, blocks, (*gone, *names), kept, forward=forward, **how) for names in sets
        ]
    if by in SCORES:
        return lambda gone, sets: stream_scores(model, blocks, data, gone, sets, str(by), forward)
    if by == "random":
        dice = random.Random(seed)
        drawn = {names: dice.random() for names in units.values()}
        return lambda _, sets: [drawn[names] if names in drawn else dice.random() for names in sets]
    if by == "last":
        depth = {name: -place for place, names in enumerate(units.values()) for name in names}
        final = list(units.values())[-1][0]
        return lambda _, sets: [1.0 if final in names else float(depth[names[0]]) for names in sets]
    numbers = _numbers(by, blocks, units)  # type: ignore[arg-type]
    return lambda _, sets: [math.fsum(numbers[name] for name in names) for names in sets]


def _numbers(by: Mapping[str, float], blocks: Blocks, units: Mapping[str, Set]) -> dict[str, float]:
    """A number for each block, from numbers for blocks or units; a unit's own is shared out among its blocks."""
    found: dict[str, float] = {}
    wrong = []
    for name, number in by.items():
        owned = [block.name for block in blocks if name in (block.name, block.owner)]
        names = units[name] if name in units else tuple(owned[:1]) if len(owned) == 1 else ()
        if not names:
            near = nearest(str(name), [*units, *blocks.names])
            wrong.append(f"{name!r} is no block or unit here" + f"; did you mean {near[0]!r}?" * bool(near))
        elif isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            wrong.append(f"{name!r} has {number!r}, which is no finite number")
        else:
            found |= dict.fromkeys(names, number / len(names))
    missing = [name for name in blocks.names if name not in found]
    wrong += [f"there is no number for {quoted(missing, 4)}"] * bool(missing and not wrong)
    check_all(wrong, "by, a mapping of numbers")
    return found


def option_mistakes(by: Any, unit: Any, search: Any, *, costs: bool = False, steps: Any = None) -> list[str]:
    """Say what is wrong with options of ``rank``, with any model: unknown ones, and those without effect."""
    own = isinstance(by, Mapping)
    known = (("score", by, By), ("search", search, Search), ("unit", unit, Unit))
    wrong = [
        str(unknown(what, value, get_args(valid)))
        for what, value, valid in known
        if value not in get_args(valid) and not (what == "score" and own) and not (what == "unit" and value is None)
    ]
    if wrong:
        return wrong
    said = "numbers of your own" if own else f"by={by!r}"
    if search == "greedy" and (own or by in CONTROLS):
        wrong.append(f"search='greedy' scores again after each cut, which changes nothing of {said}. Use 'once'.")
    if search == "beam" and by != "lesion":
        wrong.append(f"search='beam' compares nets by the metric, so it goes with by='lesion', not with {said}.")
    if search == "beam" and costs:
        wrong.append("search='beam' compares nets of one size by the metric alone: costs go with the other searches.")
    if steps is not None and by != "recoverability":
        wrong.append(f"steps={steps!r} are those of the fit of by='recoverability', and there is none with {said}.")
    elif steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        wrong.append(f"steps must be a whole number of at least 1, not {steps!r}.")
    return wrong


def _check_unbroken(blocks: Blocks, units: Mapping[str, Set], by: str) -> None:
    """Raise ``BlocksError`` for units with another shortcut inside: the stream before is not what they leave behind."""
    check_all(
        (f"{name!r}: {quoted(names)}" for name, names in units.items() if not unbroken(blocks, names)),
        f"by={by!r} compares the stream before and after, and after the first block of these layers comes a shortcut "
        "that is no identity. Use unit='block' or by='lesion'",
        BlocksError,
    )


def _check_data(by: Any, search: Search, data: Any) -> None:
    if not isinstance(by, Mapping) and by not in CONTROLS and data is None:
        raise InputError(f"by={by!r} needs data: rank(model, blocks, data).")
    if search in ("greedy", "beam") and by != "recoverability" and iter(data) is data:
        raise InputError(
            "The data is an iterator that runs dry after one pass, and this search takes several: list(data)."
        )
