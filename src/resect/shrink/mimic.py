"""Let a cut model learn, without labels, to compute the features that the uncut one computes.

After PRACTISE (Wang and Wu, "Practical Network Acceleration with Tiny Sets", CVPR 2023, arXiv 2202.07861): the mean
squared distance between the features of the two is minimised on some 500 images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from resect.blocks.example import Forward, forward_batch
from resect.blocks.features import Place, before_head, check_place, tapped
from resect.blocks.gate import check_detached
from resect.blocks.measure import Progress
from resect.blocks.modes import Buffers, kept_buffers, kept_modes
from resect.blocks.trace import quiet
from resect.blocks.unwrap import unwrap
from resect.errors import InputError, check_all
from resect.shrink.history import name_in
from resect.shrink.samples import SAMPLES, again_and_again, dealt, first_batches, joined, seed_problems, size_of

LR = 1e-3
"""Of AdamW, which needs no other rate for transformers: in 100 steps it came closer than SGD at PRACTISE's 0.02
on a ResNet, a vision transformer and a language model."""
DECAYS = (0.4, 0.8)
"""PRACTISE's schedule: after these parts of the steps the rate falls to a tenth."""


def mimic(
    small: nn.Module,
    model: nn.Module,
    data: Iterable[Any],
    *,
    steps: int = 1000,
    lr: float = LR,
    batch_size: int | None = 64,
    samples: int = SAMPLES,
    at: str | None = None,
    seed: int = 0,
    forward: Forward = forward_batch,
    progress: Progress | None = None,
) -> list[float]:
    """Train a cut model, in place, to give the features of the uncut one; labels are not needed.

    Minimises the mean of (features of ``small`` − features of ``model``)², by AdamW; the rate falls to a tenth after
    40 % of the steps and again after 80 %. As in PRACTISE every batch norm of ``small`` takes the statistics of the
    batch meanwhile, and its running ones move; all else (dropout, stochastic depth) is as in evaluation. The head
    learns nothing, nor does a weight with ``requires_grad=False``.

    Parameters
    ----------
    small: the cut model; its weights and running statistics change. Its ``.grad`` are None afterwards.
    model: the uncut one; left exactly as it is.
    data: batches, as for ``rank``; of a tuple only the inputs count.
    steps, lr: optimizer steps and learning rate.
    batch_size: samples per step, dealt anew out of the first ``samples`` of the data, in every pass. None: the
        batches as they come from ``data``, which is gone through again and again (an augmenting loader, texts of
        several lengths).
    at: the module of ``model`` whose output counts (for a ResNet PRACTISE takes "layer4", before the pooling). By
        default what enters the head: the last ``nn.Linear``, where that gives the output; else the output.
    seed: of the order of the samples. The same seed gives the same weights; other random numbers are left alone.
    forward: how to run one batch, ``(model, batch) -> output``, where the default does not fit.
    progress: called as ``progress(done, steps)``.

    Returns
    -------
    The loss of every step, before it.

    Raises
    ------
    InputError: no samples, features that do not fit together, nothing to learn, a loss that is not finite; ``small`` is
        then as it was.

    >>> losses = resect.mimic(small, model, data)
    """
    small, model = unwrap(small), unwrap(model)
    _check(small, model, steps, lr, batch_size, samples, seed)
    if batch_size is None:
        batches = again_and_again(data)
    else:
        pool = joined([inputs_of(batch, forward) for batch in first_batches(model, data, samples)])
        batches = dealt(pool, min(batch_size, size_of(pool)), seed)
    weights, buffers = [(weight, weight.detach().clone()) for weight in small.parameters()], Buffers(small)
    try:
        with kept_modes(small, model), kept_buffers(model), torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(seed)
            return fit(small, model, batches, steps, lr, at, forward, progress)
    except BaseException:
        buffers.restore()
        with torch.no_grad():
            for weight, value in weights:
                weight.copy_(value)
        raise
    finally:
        small.zero_grad()


def _check(
    small: nn.Module, model: nn.Module, steps: int, lr: float, batch_size: int | None, samples: int, seed: int
) -> None:
    check_detached(small)
    counts = {"steps": steps, "samples": samples} | ({} if batch_size is None else {"batch_size": batch_size})
    check_all(
        [
            f"{name} must be a whole number of at least 1, not {value!r}"
            for name, value in counts.items()
            if isinstance(value, bool) or not isinstance(value, int) or value < 1
        ]
        + ([] if isinstance(lr, (int, float)) and 0 < lr < math.inf else [f"lr must be above 0, not {lr!r}"])
        + seed_problems(seed),
        "mimic",
    )
    own = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in own for parameter in small.parameters()):
        raise InputError(
            "The cut model and the uncut one share weights, so there is nothing to mimic. Keep a copy of the uncut "
            "model before remove(…, in_place=True)."
        )


def fit(
    small: nn.Module, model: nn.Module, batches: Iterable[Any], steps: int, lr: float, at: str | None,
    forward: Forward, progress: Progress | None,
) -> list[float]:  # fmt: skip
    """Do what ``mimic`` says on a stream of batches; leaves modes and gradients to the caller."""
    for module in (*small.modules(), *model.modules()):
        module.training = False
    batches = iter(batches)
    batch = next(batches)
    here, there = places(small, model, at, partial(forward, model, batch))
    head = {id(parameter) for parameter in small.get_submodule(here.module).parameters()} if here.enters else set()
    learning = [parameter for parameter in small.parameters() if parameter.requires_grad and id(parameter) not in head]
    if not learning:
        raise InputError("No weight of the cut model may learn: all have requires_grad=False, or belong to the head.")
    optimizer = torch.optim.AdamW(learning, lr=lr, weight_decay=1e-4)
    for norm in small.modules():
        norm.training = isinstance(norm, _BatchNorm)
    losses: list[float] = []
    with tapped(small, {"features": here}) as own, tapped(model, {"features": there}) as wanted:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * 0.1 ** sum(step >= part * steps for part in DECAYS)
            with torch.no_grad():
                forward(model, batch)
            forward(small, batch)
            loss = distance(own["features"], wanted["features"])
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise InputError(f"mimic: the loss is {losses[-1]} in step {step + 1}. Lower lr, which is {lr:g}.")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if progress:
                progress(step + 1, steps)
            batch = next(batches) if step + 1 < steps else None
    return losses


def feature_distance(
    small: nn.Module,
    model: nn.Module,
    data: Iterable[Any],
    *,
    at: str | None = None,
    forward: Forward = forward_batch,
) -> float:
    """Return the mean squared distance between the features of two models on ``data``, in eval mode; see ``mimic``."""
    small, model = unwrap(small), unwrap(model)
    apart, seen = 0.0, 0
    with quiet(small), quiet(model):
        here = there = None
        for batch in data:
            if here is None or there is None:
                here, there = places(small, model, at, partial(forward, model, batch))
            with tapped(small, {"features": here}) as own, tapped(model, {"features": there}) as wanted:
                forward(model, batch)
                forward(small, batch)
            apart += float(distance(own["features"], wanted["features"])) * own["features"].numel()
            seen += own["features"].numel()
    if not seen:
        raise InputError("The data gave no samples. Pass a list of batches or a DataLoader.")
    return apart / seen


def places(small: nn.Module, model: nn.Module, at: str | None, run: Callable[[], Any]) -> tuple[Place, Place]:
    """Return where the features are in a cut model and in the uncut one; ``at`` is a name in the uncut one."""
    if at is None:
        place = before_head(model, run)
    else:
        check_place(model, at)
        place = Place(at)
    return Place(name_in(small, place.module), place.enters), place


def distance(own: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean squared distance of features, in float32, as a tensor (). The second get no gradient."""
    if own.shape != wanted.shape:
        raise InputError(
            f"The features do not fit together: {tuple(own.shape)} in the cut model, {tuple(wanted.shape)} in the "
            "uncut one. Name a module whose output has one shape in both: at=…"
        )
    return F.mse_loss(own.float(), wanted.detach().to(own.device).float())


def inputs_of(batch: Any, forward: Forward) -> Any:
    """Return what of a batch is needed: of (inputs, target) the inputs."""
    return (batch[0],) if forward is forward_batch and isinstance(batch, (tuple, list)) else batch
