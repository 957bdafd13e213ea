"""What running a model costs: FLOPs of one pass, and seconds, measured in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from resect.blocks.example import Example
from resect.blocks.modes import kept_modes

clock = time.perf_counter  # seconds; a name of its own, so that tests can put a clock of theirs here


def count_flops(model: nn.Module, example: Any) -> int:
    """FLOPs of one forward pass on ``example``, in eval mode and without gradients.

    As torch's counter counts: matrix products, convolutions and attention, a multiply-add being 2 FLOPs;
    normalisation, activations and additions are not counted.
    """
    with kept_modes(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        Example.of(example).run(model.eval())
    return int(counter.get_total_flops())


def samples_in(example: Example) -> int | None:
    """Return the number of samples of an example: the first dimension of its first tensor that has one."""
    return next((tensor.shape[0] for tensor in example.tensors() if tensor.dim()), None)


def resized(example: Example, batch: int) -> Example:
    """Return an example cycled or shortened to ``batch`` samples; what does not follow its batch stays."""
    size = samples_in(example)

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.dim() or leaf.shape[0] != size:
            return leaf
        return leaf[torch.arange(batch, device=leaf.device) % size]

    return Example(*tree_map(resize, (example.args, dict(example.kwargs))))


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warmup: int, at_least: float
) -> dict[str, list[float]]:
    """Return seconds per call, ``rounds`` of them for each variant, taken in turns.

    One measurement repeats a call until ``at_least`` seconds have passed.
    """
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
    synchronize()
    start = clock()
    for _ in range(repeats):
        run()
    synchronize()
    return clock() - start


def synchronize() -> None:
    """Wait for the accelerator, if there is one: it works on after a call has returned."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
