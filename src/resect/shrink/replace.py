"""Put one linear map, fitted in closed form, in the place of residual blocks that go.

After ReplaceMe (Shopkhoev et al. 2025, arXiv 2505.02819): where the blocks before hand their value on, the map is
merged into the projection that ends the last branch before them, and costs nothing. Ours beyond that: elsewhere one
linear layer or 1×1 convolution is kept where the first of the blocks was; the fit is of the change to what is left,
with ridge, so that little data falls back to plain removal; runs are fitted one after the other, on what the earlier
ones left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace as changed
from typing import Any, Literal

from torch import Tensor, nn

from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.example import Forward, forward_batch
from resect.blocks.gate import resolve
from resect.blocks.plan import Plan
from resect.blocks.trace import quiet
from resect.blocks.unwrap import unwrap
from resect.errors import InputError, check_all, unknown
from resect.shrink.compact import compact as delete_emptied
from resect.shrink.history import REPLACED, grown, unspent
from resect.shrink.least_squares import LeastSquares
from resect.shrink.merge import Projection, projection_of
from resect.shrink.remove import Names, Removed, copied, remove
from resect.shrink.samples import SAMPLES, first_batches
from resect.shrink.seen import Seen, channels, rows_of, seen, strided
from resect.shrink.standin import filled, hindrance, linear_of, stand_in

Run = tuple[ResidualBlock, ...]


def replace(
    model: nn.Module,
    blocks: Blocks,
    plan: Names,
    data: Iterable[Any],
    *,
    by: Literal["linear"] = "linear",
    samples: int = SAMPLES,
    forward: Forward = forward_batch,
    compact: bool = False,
) -> nn.Module:
    """Remove residual blocks, and let one linear map do what it can of their work. Never called proven.

    Neighbouring blocks of the plan are one run. For each, W and b minimise the squared distance between the uncut
    model's sum after the run and the smaller model's, over all positions of all samples (closed form, float64):

    - merged: ``shortcut + (I + W)·branch + b`` of the last block before the run; exact in the branch's last
      ``nn.Linear`` or ``nn.Conv2d``, so the model costs what it costs after ``remove``. Without a bias there is no b.
    - kept, where nothing comes before, a norm does, or the branch does not end in such a layer:
      ``shortcut + W·entered + b`` in the place of the run's first branch, ``entered`` what its first module takes.

    Parameters
    ----------
    model, blocks, plan: as in ``remove``; the model is left alone.
    data: batches, labels not needed; the first ``samples`` samples are used, a fifth of the batches, but
        at least one, to measure; of a single batch both, see ``held_out`` below.
    by: ``"linear"``.
    forward: how to run one batch, ``(model, batch) -> output``, where the default does not fit.
    compact: as in ``remove``; only for runs that were merged.

    Returns
    -------
    The smaller model. ``small.resect_plan.evidence["replaced"]`` holds per run, by its first block's name, ``blocks``,
    ``merged_into`` (a module's name, or None), ``error`` and ``error_removed``: the relative distance ‖difference‖ /
    ‖sum after the run‖ with the map and with plain removal, on ``held_out`` batches that the fit did not see (0: the
    data were one batch, and this is the distance on what was fitted); and ``helps``, whether the first is the smaller.
    A map that does not help is put in place all the same: use ``remove``. ``resect.save`` and ``load`` take it.

    Raises
    ------
    InputError: no samples, values that are not finite, blocks that cannot be replaced (all are listed, with the
        reasons), or what ``remove`` raises.
    """
    if by != "linear":
        raise unknown("stand-in", by, ("linear",))
    blocks, model = resolve(model, blocks), unwrap(model)
    plan = unspent(Plan.of(blocks, plan))
    check_all(
        (f"{block.name} is a linear map already" for block in plan.blocks if _stands_in(model, block)),
        "What an earlier cut put in the place of blocks is not replaced again; use resect.remove",
    )
    runs = _runs(blocks, plan)
    batches = first_batches(model, data, samples)
    with quiet(model):
        ways = [projection_of(model, blocks, run[0], set(plan.names), batches[0], forward) for run in runs]
    kept = [run[0] for run, way in zip(runs, ways, strict=True) if way is None]
    check_all(
        (f"{block.name}: {reason}" for block in kept if (reason := hindrance(block))),
        "No linear map can take the place of these blocks, and none can be merged before them; use resect.remove",
    )
    going = [name for name in plan.names if name not in {block.name for block in kept}]
    small = remove(model, blocks, going) if going else copied(model)
    evidence = {}
    for run, way in zip(runs, ways, strict=True):
        evidence[run[0].name] = _fit(model, small, blocks, run, way, batches, forward)
    deleted = delete_emptied(small, blocks.example) if compact and blocks.example is not None else None
    whole = changed(plan, evidence={**plan.evidence, REPLACED: evidence})
    earlier = getattr(model, "resect_plan", None)
    small.resect_plan = grown(earlier if isinstance(earlier, Plan) else None, whole, deleted)  # type: ignore[assignment]
    return small


def _stands_in(model: nn.Module, block: ResidualBlock) -> bool:
    return any(isinstance(model.get_submodule(name), Removed) for name in block.modules)


def _runs(blocks: Blocks, plan: Plan) -> list[Run]:
    """Group the plan's blocks into neighbours over whose sums one shape goes through."""
    if not plan.blocks:
        raise InputError("The plan replaces nothing. Name at least one block, for instance blocks.names[-1].")
    parallel = [block for block in plan.blocks if sum(other.sum == block.sum for other in blocks) > 1]
    check_all(
        (f"{block.name} is one of several branches of one addition" for block in parallel),
        "Only the branches of an addition of two can be replaced",
    )
    runs: list[list[ResidualBlock]] = []
    going = set(plan.names)
    for block in blocks:
        if block.name not in going:
            continue
        last = runs[-1][-1] if runs else None
        follows = last is not None and block.index == last.index + 1 and block.shape == last.shape
        if follows and block.shortcut == "identity":
            runs[-1].append(block)
        else:
            runs.append([block])
    return [tuple(run) for run in runs]


def _fit(
    model: nn.Module, small: nn.Module, blocks: Blocks, run: Run, way: Projection | None, batches: Sequence[Any],
    forward: Forward,
) -> dict[str, Any]:  # fmt: skip
    """Fit one run's map on what the earlier runs left of the model, put it in place, and measure."""
    held_out = max(1, len(batches) // 5) if len(batches) > 1 else 0
    fitting, measuring = batches[: len(batches) - held_out], batches[len(batches) - held_out :] or batches
    carrier = run[0] if way is None else blocks[way.block]
    axis = channels(model, carrier)
    sums = LeastSquares(bias=way is None or way.has_bias)
    strides: tuple[int, ...] | None = None

    def both(batch: Any) -> tuple[Seen, Seen]:
        with quiet(model), quiet(small):
            wanted = seen(model, blocks, run[-1].name, batch, forward)
            here = seen(small, blocks, carrier.name, batch, forward)
        for name, values in ((run[-1].name, wanted), (carrier.name, here)):
            if not values.sum.isfinite().all():
                raise InputError(
                    f"{name}: its sum is not finite on these data. Look at the inputs, and at the weights up to there."
                )
        return wanted, here

    for batch in fitting:
        wanted, here = both(batch)
        left = here.sum if way is not None else here.shortcut
        features = here.branch
        if way is None:
            if here.entered is None:
                raise InputError(f"{carrier.name}: no tensor enters its branch's first module; use resect.remove.")
            features, strides = strided(here.entered, left, axis)
        sums.add(rows_of(features, axis), rows_of(wanted.sum - left, axis))
    removed = _distance(
        (wanted.sum, here.sum if way is not None else here.shortcut) for wanted, here in map(both, measuring)
    )
    weight, bias = sums.solve()
    kept: dict[str, Any] = {}
    if way is not None:
        way.merge(small, weight, bias)
    else:
        kept = {"in": weight.shape[1], "out": weight.shape[0]} | ({} if strides is None else {"stride": list(strides)})
        stand_in(small, carrier, filled(linear_of(kept), weight, bias))
    error = _distance((wanted.sum, here.sum) for wanted, here in map(both, measuring))
    return {
        "blocks": [block.name for block in run],
        "merged_into": None if way is None else way.module,
        "error": error,
        "error_removed": removed,
        "helps": error < removed,
        "held_out": held_out,
        "linear": kept or None,
    }


def _distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Relative distance of the second values from the first, over all of them."""
    apart, size = 0.0, 0.0
    for wanted, found in pairs:
        apart += float((wanted.double() - found.double()).square().sum())
        size += float(wanted.double().square().sum())
    return (apart / size) ** 0.5 if size else 0.0
