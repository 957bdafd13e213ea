"""Lesion studies: close blocks of a trained model, or swap its layers, and measure.

Veit, Wilber, Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", NIPS
2016, section 4: deleting one block hardly matters; deleting or reordering many raises the error smoothly.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from resect.analyse import reorder, subsets
from resect.analyse.greedy import greedy_cost, greedy_deletion
from resect.analyse.measuring import Measuring
from resect.analyse.repeatable import check_repeatable
from resect.analyse.study import Lesion, LesionStudy
from resect.analyse.subnetworks import measure_teams, subnetworks, team_sizes
from resect.analyse.swappable import swappable
from resect.blocks.block import Blocks
from resect.blocks.example import Forward, forward_batch
from resect.blocks.gate import Which, resolve
from resect.blocks.measure import Evaluate, Progress
from resect.blocks.metrics import Metric, metric_label, metric_named
from resect.errors import BlocksError, InputError, check_counts

Order = tuple[int, int, list[str], tuple[int, ...], bool]
"""Number of swaps, draw, layers, which layer then stands at each place, and whether all such orders are measured."""


def lesion_study(
    model: nn.Module,
    blocks: Which,
    data: Iterable[Any],
    *,
    metric: str | Metric = "top1",
    each: bool = True,
    random_counts: int | Sequence[int] = (),
    runs: int | Sequence[int] = (),
    groups: str | Sequence[str] = (),
    greedy: bool | int = False,
    pairs: bool = False,
    swaps: int | Sequence[int] = (),
    paths: int | Sequence[int] = (),
    draws: int = 10,
    seed: int = 0,
    forward: Forward = forward_batch,
    evaluate: Evaluate | None = None,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> LesionStudy:
    """Close blocks of a trained model in one way or several, and measure every time.

    Parameters
    ----------
    model, blocks: a trained model and its blocks; the model is left exactly as it was, its modes included.
    data: batches, gone through once per measurement: a list, a DataLoader, any iterable that can be
        repeated. A tuple is (inputs, target), a mapping is run as keyword arguments.
    metric: ``"top1"``, ``"top5"`` (errors in %), ``"cross_entropy"`` (nats), ``"perplexity"``, or
        ``f(output, batch)`` that returns one number per sample, (B,). Lower is better. Of a language model, logits
        (B, T, V) with labels (B, T), every token counts; labels are shifted as transformers does, −100 is left out.
    each: close each block alone.
    random_counts: for each k of these (here and below also one number alone), close k blocks drawn at
        random, ``draws`` times.
    runs: for each m of these, close every run of m neighbouring blocks.
    groups: any of ``"stage"``, ``"part"`` (attention, mlp, conv), ``"layer"``, ``"kind"`` (downsampling or not):
        close every such group as a whole. A downsampling block's shortcut stays.
    greedy: close one block after the other, always the one that is missed least; a number: so many of them. Takes
        n + (n − 1) + … measurements.
    pairs: close every pair of blocks; ``interactions()`` says how much that differs from closing each, which is
        measured too.
    swaps: for each k of these, swap k random pairs of layers built alike, ``draws`` times (figure 5b of the paper).
    paths: for each length of these, ``draws`` random sub-networks of so many open branches, all others closed; and
        the ensembles of 2, 4, 8 … of them, whose output is the logarithm of the mean of their probabilities.
    draws: of each random kind; no two alike, so fewer where fewer subsets, orders or sub-networks exist: then all.
    seed: of the draws; the same seed gives the same draws for the same names on any machine.
    forward: how to run one batch, ``(model, batch) -> output``, where the default does not fit.
    evaluate: ``evaluate(model, batch)`` that runs the model and gives one number per sample, instead of ``metric``.
    store: a file for what is finished; an interrupted study that is given it again goes on from there, with the
        same batches in the same order. It holds what closing blocks gives; swaps and paths are measured again.
    progress: called as ``progress(done, total)`` as measurements finish.

    Several processes (``torch.distributed``) share out the subsets, with the same result as one.

    Raises
    ------
    InputError: no data or data that cannot be repeated, an unknown metric, one that is NaN or gives anything but one
        number per sample, a number outside 0 … number of blocks, a model that computes something random in eval mode.
    BlocksError: no blocks; swaps where no two layers can change places (it says why for each).
    """
    blocks = resolve(model, blocks)
    if not blocks:
        raise BlocksError("There is nothing to close: the selection of residual blocks is empty.")
    check_counts(draws=(draws, 1))
    if pairs and len(blocks) < 2:
        raise InputError("Pairs need at least two blocks, and there is one.")
    random_counts, runs, swaps, paths = (
        subsets.whole_numbers(name, given)
        for name, given in {"random_counts": random_counts, "runs": runs, "swaps": swaps, "paths": paths}.items()
    )
    depth = {True: len(blocks), False: 0}[greedy] if isinstance(greedy, bool) else greedy
    if not isinstance(depth, int) or not 0 <= depth <= len(blocks):
        raise InputError(f"greedy must be a number of blocks from 0 to {len(blocks)}, but is {greedy!r}.")
    if paths and evaluate:
        raise InputError("Ensembles are made of the model's outputs: paths need a metric, and not evaluate.")
    metric_named(metric)
    single = [
        *(subsets.each(blocks) if each or pairs else ()),
        *subsets.random_subsets(blocks, random_counts, draws, seed),
        *subsets.runs(blocks, runs),
        *subsets.groups(blocks, groups),
        *(subsets.pairs(blocks) if pairs else ()),
    ]
    by_length = list(subnetworks(blocks, paths, draws, seed))
    orders = list(_orders(model, blocks, swaps, draws, seed)) if swaps else []
    check_repeatable(model, _first(data), evaluate or forward)
    total = len(single) + greedy_cost(len(blocks), depth) + len(orders) + sum(len(drawn) for _, drawn in by_length)
    measuring = Measuring(model, blocks, data, metric, forward, evaluate, store, progress, total)
    lesions = [Lesion.of(subset, value) for subset, value in zip(single, measuring.closed(single), strict=True)]
    lesions += [Lesion.of(subset, value) for subset, value in greedy_deletion(blocks.names, depth, measuring.closed)]
    lesions += [_swapped(measuring, order) for order in orders]
    for length, drawn in by_length:
        lesions += measure_teams(measuring, length, drawn, team_sizes(len(drawn)))
    name = metric_label(evaluate or metric)
    return LesionStudy(name, measuring.baseline(), tuple(lesions), blocks)


def _swapped(measuring: Measuring, order: Order) -> Lesion:
    k, draw, layers, places, every = order
    with reorder.reordered(measuring.model, layers, places):
        value = measuring.as_it_is()
    where = reorder.describe(layers, places)
    return Lesion((), value, "swaps", k, where, draw, reorder.kendall_tau(places), every=every)


def _orders(model: nn.Module, blocks: Blocks, swaps: Sequence[int], draws: int, seed: int) -> Iterator[Order]:
    """Draw ``draws`` new orders of the layers for each number of swaps."""
    layers, groups = swappable(model, blocks)
    for k in swaps:
        if k < 0:
            raise InputError(f"Cannot swap {k} pairs of layers. Give numbers from 0 on.")
        found, every = reorder.random_orders(layers, groups, k, draws, f"{seed}/swap/{k}")
        yield from ((k, draw, layers, order, every) for draw, order in enumerate(found))


def _first(data: Iterable[Any]) -> Any:
    """Return the first batch of data that can be repeated."""
    iterator = iter(data)
    if iterator is data:
        raise InputError(
            "The data is an iterator that runs dry after one pass. Pass list(data), or the DataLoader itself."
        )
    for batch in iterator:
        return batch
    raise InputError("The data gave no samples. Pass a list of batches or a DataLoader that is not empty.")
