"""How the benchmarks time: sides in turns, medians and quartiles, and when a claim counts as kept."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Work = Callable[[], object]


def clock(work: Work, best_of: int = 1) -> float:
    """Seconds of this process's processor time, the least of some tries."""
    took = []
    for _ in range(best_of):
        start = time.process_time()
        work()
        took.append(time.process_time() - start)
    return min(took)


def wall(work: Work) -> float:
    """Seconds on the clock until the work is done, on an accelerator too."""
    if torch.cuda.is_available():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def fair(work: Work) -> float:
    """Seconds of processor time with one thread on the CPU, which other work disturbs least; else on the clock."""
    return clock(work) if torch.get_num_threads() == 1 and not torch.cuda.is_available() else wall(work)


def in_turns(
    sides: Mapping[str, Work], rounds: int, warm_up: int = 2, seconds: Callable[[Work], float] = fair
) -> dict[str, list[float]]:
    """Seconds of every side in every round; the side that begins changes, so that a slow moment meets all alike."""
    names = list(sides)
    for _ in range(warm_up):
        for name in names:
            sides[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds(sides[name]))
    return times


def quartiles(values: list[float]) -> list[float]:
    """The three quartiles."""
    return statistics.quantiles(values, n=4)


def holds(values: list[float], limit: float, at_least: bool = False) -> bool:
    """Whether the median keeps the limit, and the spread stays within half the margin."""
    low, middle, high = quartiles(values)
    margin = middle - limit if at_least else limit - middle
    return margin >= 0 and high - low <= margin / 2


def shown(name: str, values: list[float], unit: str, good: bool) -> list[float]:
    """Print the quartiles and return them, rounded."""
    low, middle, high = quartiles(values)
    print(f"{name}: {middle:.3g} {unit} ({low:.3g} … {high:.3g}){'' if good else '   NOT KEPT'}", flush=True)
    return [round(value, 4) for value in (low, middle, high)]


def step(model: nn.Module, x: Tensor, method: Any = None) -> Work:
    """One ordinary training step: forward, backward, SGD with momentum; with a method one line more."""
    model.train()
    y = torch.randint(0, 10, (len(x),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def work() -> None:
        if method is not None:
            method.begin_step()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return work
