"""Measure a model on data with subsets of its blocks closed, without changing it."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from resect.blocks.block import Blocks
from resect.blocks.example import Forward, device_of, forward_batch, to_device
from resect.blocks.metrics import Metric, finished, metric_named
from resect.blocks.ranks import rank_of_ranks, together
from resect.blocks.running import Proof, Subset, canonical, in_order, running
from resect.blocks.store import Store, fingerprint, noting
from resect.blocks.units import is_sharded
from resect.errors import BlocksError, InputError, quoted

Progress = Callable[[int, int], None]
"""``progress(done, total)``, called as measurements finish; total 0: not known."""

Evaluate = Callable[[nn.Module, Any], Tensor]
"""``evaluate(model, batch)`` runs the model as it likes and gives one number per sample, (B,); their mean counts."""


def count_of(data: Any) -> int:
    """Return how many batches data hold; 0 where they do not say, as a loader of an ``IterableDataset``."""
    try:
        return len(data)
    except TypeError:
        return 0


Values = dict[tuple[str, ...], float]

CHUNK = 256
"""Subsets that one pass over the data serves, and that share the beginnings of runs."""

KEPT = 16
"""The same where what is finished goes to a store: an interruption loses no more than this."""


def measured(
    model: nn.Module,
    blocks: Blocks,
    data: Iterable[Any],
    subsets: Iterable[Subset],
    metric: str | Metric = "top1",
    forward: Forward = forward_batch,
    progress: Progress | None = None,
    *,
    evaluate: Evaluate | None = None,
    store: str | Path | None = None,
    proof: Proof | None = None,
) -> Iterator[tuple[tuple[str, ...], float]]:
    """Yield ``(subset, metric)`` as they are finished: first of the whole model, ``()``, then of each subset.

    Subsets are drawn from their iterable when they are needed, ``CHUNK`` at a time (``KEPT`` with a store), and every
    batch serves all of a chunk. Several processes (``torch.distributed``) that are given the same share the subsets out
    among them, and each yields everything, to the bit what one process would. Parts of a model sharded by FSDP2 are
    gathered by all: there, every process measures everything.

    Parameters
    ----------
    model, blocks: left exactly as they are.
    data: batches, gone through once per chunk; an iterator that runs dry will do for one chunk.
    subsets: names of blocks to close together; they are yielded in the blocks' order, each once.
    metric: a name, or ``metric(output, batch)``, one number per sample. Not used where ``evaluate`` is given.
    forward: how to run one batch, ``(model, batch) -> output``.
    progress: called as ``progress(done, total)``, in subsets.
    evaluate: ``evaluate(model, batch)`` runs the model and gives one number per sample.
    store: a file for what is finished, 16 subsets at a time. What it holds of the same study (model, metric, the same
        batches in the same order) is not measured again.
    proof: carries from one call to the next what was found out about leaving out what networks share.

    Raises ``BlocksError`` for an empty selection; ``InputError`` for data without samples or that cannot be repeated,
    an unknown metric, one that is NaN or not one number per sample, a store of another study, processes that differ.
    """
    if not blocks:
        raise BlocksError("There is nothing to close: the selection of residual blocks is empty.")
    name = metric if isinstance(metric, str) and evaluate is None else getattr(evaluate or metric, "__name__", "metric")
    measure = metric_named(metric) if evaluate is None else _as_given
    study: dict[str, Any] = {"metric": name, "blocks": blocks.names}
    rank, ranks = rank_of_ranks()
    kept = None if store is None or rank else Store(store, study | {"weights": fingerprint(model)})
    known: Values = together(lambda: kept.read() if kept else {})[0]
    total, done, first = len(subsets) if isinstance(subsets, Sequence) else 0, 0, True
    proof = Proof() if proof is None else proof
    size = (CHUNK if store is None else KEPT) * ranks
    for chunk, last in _chunks(subsets, blocks, size):
        if not last and iter(data) is data:
            raise InputError(
                f"The data is an iterator that runs dry after one pass, and more than {size} subsets take "
                "several. Pass list(data), or the DataLoader itself."
            )
        todo = in_order(blocks, (subset for subset in dict.fromkeys(chunk) if subset and subset not in known))
        share = [()] * first + (todo if is_sharded(model) else todo[rank::ranks])
        tell = partial(_tell, progress, done, len(chunk), total) if progress else None
        facts = study | {"subsets": _digest(chunk, last)}
        work = partial(_one_pass, model, blocks, data, share, measure, evaluate or forward, proof, tell, facts)
        told = together(partial(work, stored=store is not None))
        _check_same([facts for _, facts in told])
        values = {subset: value for found, _ in told for subset, value in found.items()}
        together(partial(_keep, kept, values, told[0][1] if first else None))
        if first:
            known[()] = values[()]
            yield (), values[()]
        yield from ((subset, values[subset] if subset in values else known[subset]) for subset in chunk)
        done, first = done + len(chunk), False
        if progress:
            progress(done, total)


def measure_closed(
    model: nn.Module,
    blocks: Blocks,
    data: Iterable[Any],
    subsets: Sequence[Subset],
    metric: str | Metric = "top1",
    forward: Forward = forward_batch,
    progress: Progress | None = None,
    **options: Any,
) -> tuple[float, list[float]]:
    """Return the metric of the whole model, and with each subset of blocks closed; ``options`` as of `measured`."""
    (_, whole), *found = measured(model, blocks, data, subsets, metric, forward, progress, **options)
    return whole, [value for _, value in found]


def _chunks(subsets: Iterable[Subset], blocks: Blocks, size: int) -> Iterator[tuple[list[tuple[str, ...]], bool]]:
    """Yield chunks of subsets, by canonical names, and whether it is the last; a single empty one for none."""
    named = (canonical(blocks, subset) for subset in subsets)
    chunk = list(itertools.islice(named, size))
    while True:
        after = list(itertools.islice(named, size))
        yield chunk, not after
        if not after:
            return
        chunk = after


def _one_pass(
    model: nn.Module,
    blocks: Blocks,
    data: Iterable[Any],
    subsets: list[tuple[str, ...]],
    measure: Metric,
    forward: Forward,
    proof: Proof,
    tell: Callable[[float], None] | None,
    facts: dict[str, Any],
    stored: bool,
) -> tuple[Values, dict[str, Any]]:
    """Return the mean of the metric per subset over one pass; and the ``facts``, with those of the whole model.

    ``stored``: take down what the data are, for the store.
    """
    if not subsets:
        return {}, facts
    totals, counts = dict.fromkeys(subsets, 0.0), dict.fromkeys(subsets, 0)
    device, batches, digest = device_of(model), count_of(data), hashlib.sha256()
    with running(model, blocks, forward, proof) as run:
        for number, batch in enumerate(noting(data, digest) if stored and () in totals else data, start=1):
            batch = to_device(batch, device)
            for subset, output in zip(subsets, run.each(batch, subsets), strict=True):
                values = _per_sample(measure(output, batch))
                totals[subset] += float(values.double().sum())
                counts[subset] += values.numel()
                if not math.isfinite(totals[subset]):
                    raise _not_finite(subset)
            if tell and batches:
                tell(number / batches)
    if not all(counts.values()):
        raise InputError("The data gave no samples. Pass a list of batches or a DataLoader, not an exhausted iterator.")
    means = {subset: finished(measure, totals[subset] / counts[subset]) for subset in subsets}
    if () in means:
        data_noted = {"data": digest.hexdigest()} if stored else {}
        facts = facts | {"samples": counts[()], "baseline": means[()]} | data_noted
    return means, facts


def _as_given(output: Any, batch: Any) -> Any:
    """The metric of a model that ``evaluate`` ran: its own answer."""
    return output


def _per_sample(values: Any) -> Tensor:
    if not isinstance(values, Tensor) or not values.ndim:
        what = "a tensor without dimensions" if isinstance(values, Tensor) else type(values).__name__
        raise InputError(
            f"The metric must give one number per sample, a tensor (B,), but gave {what}. Leave the mean out "
            "(reduction='none'): batches may differ in size."
        )
    return values


def _not_finite(subset: Subset) -> InputError:
    if subset:
        return InputError(
            f"The metric is NaN or infinite with {quoted(subset, 4)} closed, and a number with the whole model. Leave "
            "such subsets out, or compute in float32."
        )
    return InputError(
        "The metric is NaN or infinite on this data: look at the model's weights, at the inputs and targets, and at "
        "what the metric divides by."
    )


def _tell(progress: Progress, done: int, chunk: int, total: int, share: float) -> None:
    if share < 1:
        progress(done + int(chunk * share), total)


def _keep(kept: Store | None, values: Values, facts: dict[str, Any] | None) -> None:
    if kept and facts:
        kept.begin({key: facts[key] for key in ("samples", "baseline", "data")})
    if kept:
        kept.add((subset, value) for subset, value in values.items() if subset)


def _digest(chunk: list[tuple[str, ...]], last: bool) -> str:
    return hashlib.sha256(json.dumps([chunk, last]).encode()).hexdigest()


def _check_same(told: list[dict[str, Any]]) -> None:
    """Raise ``InputError`` unless every process measures the same, naming what differs."""
    for rank, other in enumerate(told):
        differing = [key for key in other if other[key] != told[0].get(key)]
        here = ", ".join(f"{key} {told[0].get(key)}" for key in differing)
        there = ", ".join(f"{key} {other[key]}" for key in differing)
        if differing:
            raise InputError(
                f"The processes do not measure the same: {here} on process 0; {there} on process {rank}. Give all the "
                "same model, blocks, subsets, metric and data, all of it: the subsets are what they share out."
            )
