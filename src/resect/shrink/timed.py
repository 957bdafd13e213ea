"""Milliseconds of each block, told apart within passes of the whole network."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from resect.blocks import cost
from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.example import Example
from resect.errors import BlocksError, check_all

_WARMUP = 2
_NORMAL = 1.349  # quartiles of a normal distribution are so many standard deviations apart


@dataclass(frozen=True)
class Latency:
    """Milliseconds at one batch size, as a sum: of the network without any block, and of each block."""

    ms: Tensor
    """(1 + n,), float64: what is left without any block, then each block."""
    error: Tensor
    """(1 + n,): standard error of each, from the spread over the rounds."""

    def of(self, kept: Tensor) -> tuple[float, float]:
        """Return the ms of the network with these blocks, (n,) of 0 and 1, and the half-width of its 95 % interval."""
        row = torch.cat([kept.new_ones(1), kept])
        return float(row @ self.ms), 1.96 * float((row * self.error).norm())


def timed(whole: nn.Module, bare: nn.Module, blocks: Blocks, example: Example, rounds: int) -> Latency:
    """Return what each block takes of a pass: between the beginnings of its branch and of the next one's.

    That stretch of the ``whole`` network less the same stretch of the ``bare`` one, which has none of the blocks: what
    is left there is the shortcut's, or comes after the addition. Medians over the rounds, both networks in turns. A
    block begins with its owner where it is the only one there, else with its first module. Where a beginning cannot be
    seen in the bare network, what is left from there on is shared out in proportion to what the stretches took.

    Raises ``BlocksError`` for blocks inside one another's branches, and for one whose beginning cannot be seen.
    """
    _check(blocks)
    watches = [_Watch(net, blocks, example) for net in (whole, bare)]
    stretches: list[list[list[float]]] = [[], []]
    with torch.no_grad():
        for number in range(_WARMUP + rounds):
            for watch, rows in zip(watches, stretches, strict=True):
                row = watch.run()
                if number >= _WARMUP:
                    rows.append(row)
    (full, full_error), (left, left_error) = (_summary(rows) for rows in stretches)
    if unseen := [block.name for place, block in enumerate(blocks) if watches[0].unseen[place]]:
        raise BlocksError(
            f"The time of {', '.join(unseen)} cannot be told: the beginning of the branch cannot be seen. Leave "
            "it out, or pass batches=()."
        )
    groups = _groups(watches[1].unseen)
    for group in groups:
        share = full[group] / full[group].sum().clamp(min=1e-12)
        left[group], left_error[group] = left[group].sum() * share, left_error[group].norm() * share
    ms = torch.cat([(full[:1] + left[1:].sum()), (full - left)[1:]])
    error = (full_error.square() + left_error.square()).sqrt()
    rest = torch.cat([full_error[:1], left_error[1:]]).norm()
    return Latency(ms, torch.cat([rest[None], error[1:]]))


class _Watch:
    """A network that says how long each stretch of a pass takes: before the first block, and of each block."""

    def __init__(self, net: nn.Module, blocks: Blocks, example: Example) -> None:
        self.net, self.example, self.blocks = net.eval(), example, blocks
        self.begun: dict[int, float] = {}
        self.calls: dict[str, int] = {}
        owners = [block.owner for block in blocks]
        places: dict[str, list[int]] = {}
        for place, block in enumerate(blocks):
            alone = owners.count(block.owner) == 1 and block.owner and block.calls[:1] in ((), (None,))
            if alone or block.modules:
                places.setdefault(block.owner if alone else block.modules[0], []).append(place)
        for name, several in places.items():
            net.get_submodule(name).register_forward_pre_hook(self._hook(name, several))

    @property
    def unseen(self) -> list[bool]:
        """Which beginnings the last pass did not show."""
        return [place not in self.begun for place in range(len(self.blocks))]

    def run(self) -> list[float]:
        """Run a pass; return the ms of each stretch, 0 for one whose beginning was not seen."""
        self.begun, self.calls = {}, {}
        start = _now()
        self.net(*self.example.args, **self.example.kwargs)
        marks = [(-1, start), *sorted(self.begun.items(), key=lambda item: item[1]), (len(self.blocks), _now())]
        row = [0.0] * (1 + len(self.blocks))
        for (place, since), (_, until) in pairwise(marks):
            row[1 + place] = 1e3 * (until - since)
        return row

    def _hook(self, name: str, places: Sequence[int]) -> Callable[..., None]:
        def begin(*_: object) -> None:
            call = self.calls[name] = self.calls.get(name, -1) + 1
            for place in places:
                numbers = self.blocks[place].calls[:1]
                if place not in self.begun and (numbers in ((), (None,)) or numbers == (call,)):
                    self.begun[place] = _now()

        return begin


def _now() -> float:
    cost.synchronize()
    return cost.clock()


def _summary(rows: list[list[float]]) -> tuple[Tensor, Tensor]:
    """Return the median of each stretch over the rounds, brought to add up to the median pass, and its standard error.

    A round on a busy machine is slow as a whole, and says little of how stretches compare: it is brought to the pace
    of the others first. Medians alone add up to less than a pass: in every pass some stretch or other is held up.
    """
    times = torch.tensor(rows, dtype=torch.float64)
    usual = times.median(dim=0).values
    pace = (times / torch.where(usual > 0, usual, torch.nan)).nanmedian(dim=1).values
    times = times / torch.where(pace > 0, pace, 1.0)[:, None]
    quartiles = [statistics.quantiles(column, n=4, method="inclusive") for column in times.T.tolist()]
    low, median, high = torch.tensor(quartiles, dtype=torch.float64).T
    total = median.sum()
    scale = statistics.median(times.sum(dim=1).tolist()) / total if total > 0 else 1.0
    return median * scale, scale * (high - low) / _NORMAL * (torch.pi / 2 / len(rows)) ** 0.5


def _groups(unseen: list[bool]) -> list[list[int]]:
    """Return the stretches that the bare network does not tell apart, each with the last one that it does."""
    groups = [[0]]
    for place, hidden in enumerate(unseen, start=1):
        if hidden:
            groups[-1].append(place)
        else:
            groups.append([place])
    return [group for group in groups if len(group) > 1]


def inside(one: ResidualBlock, other: ResidualBlock) -> bool:
    """Whether a block lies in the branch of another."""
    return any(a.startswith(f"{b}.") for a in one.modules for b in other.modules)


def _check(blocks: Blocks) -> None:
    check_all(
        (
            f"{one.name!r} lies in the branch of {other.name!r}"
            for one in blocks
            for other in blocks
            if inside(one, other)
        ),
        "What blocks inside one another cost does not add up. Choose the inner or the outer ones",
        BlocksError,
    )
