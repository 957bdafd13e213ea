"""The exact gradient by path length: the graph is cut at every branch end, and gone through once per length.

Forward, each branch's value goes on as it is, but as a leaf: the graph ends there. Backward from the loss then reaches
the place asked for along shortcuts alone, which is the gradient of all paths of length 0; what arrives at the leaves
has all but passed one branch. Handed on to the branches it is the seed of the next backward pass, which gives length 1,
and so on: pass k holds the gradient of *all* paths that pass exactly k branches. Each pass runs only what lies below
the branches at which something arrived, so that n + 1 of them cost about half of n + 1 whole ones; weights get no
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from resect.analyse.backward import Case, Run, check_ran, open_gates, running
from resect.analyse.loss import Batch
from resect.blocks.gate import Gates


@dataclass
class Cuts:
    """The graph's cuts, in order of execution: at each a branch's value, and the leaf that stands for it further on."""

    branches: list[Tensor] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def attach(self, handle: Gates) -> None:
        """Cut at every branch end."""
        for gate in handle:
            gate.apply(_Cut(self, gate.block.name))


class _Cut:
    """Hand a branch's value on as a leaf, and note both."""

    def __init__(self, cuts: Cuts, name: str) -> None:
        self.cuts = cuts
        self.name = name

    def __call__(self, branch: Tensor) -> Tensor:
        leaf = branch.detach().requires_grad_()
        if torch._C._current_graph_task_id() == -1:  # checkpointing recomputes what was noted already
            self.cuts.branches.append(branch)
            self.cuts.leaves.append(leaf)
            self.cuts.names.append(self.name)
        return leaf.clone()  # the model may add in place into what it gets


def slots(run: Run, cuts: Cuts) -> Iterator[Tensor]:
    """Yield the summed gradient of all paths of length 0, 1, 2, … at the place, while there are any."""
    outputs: list[Tensor] = [run.loss]
    seeds: list[Tensor | None] = [None]
    while outputs:
        here, *arrived = run.back(outputs, seeds, cuts.leaves)
        yield torch.zeros(run.shape, dtype=run.loss.dtype, device=run.loss.device) if here is None else here
        outputs, seeds = _shift(cuts, arrived)


def _shift(cuts: Cuts, arrived: list[Tensor | None]) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return where the next pass begins, and with what: what arrived behind each branch, at the branch."""
    met = [
        (branch, gradient)
        for branch, gradient in zip(cuts.branches, arrived, strict=True)
        if gradient is not None and branch.requires_grad
    ]
    return [branch for branch, _ in met], [gradient for _, gradient in met]


def count_paths(run: Run, cuts: Cuts) -> list[int]:
    """Return the number of paths of each length that the graph holds, from the place to the loss.

    A path is a chain of branches, each of which reads, along shortcuts alone, what the one before gave. For blocks one
    after another, beside and inside each other this is what ``path_lengths`` says; here the graph itself says it.
    """
    place = 1 << len(cuts.leaves)
    reached = _reached(run, cuts, place)
    by_branch: list[list[int]] = []

    def paths_to(bits: int) -> list[int]:
        total = [int(bool(bits & place))]
        for number, below in enumerate(by_branch):
            if bits >> number & 1:
                total = [a + b for a, b in zip_longest(total, [0, *below], fillvalue=0)]
        return total

    for branch in cuts.branches:  # a branch reads only what was computed before it
        by_branch.append(paths_to(reached[branch.grad_fn]))
    return paths_to(reached[run.loss.grad_fn])


def _reached(run: Run, cuts: Cuts, place: int) -> dict[object, int]:
    """Return, per node of the graph, which leaves (as bits) and whether the place lie below it."""
    numbers = {id(leaf): number for number, leaf in enumerate(cuts.leaves)}
    node, output = run.where.node, run.where.output_nr
    bits: dict[object, int] = {None: 0}
    waiting: list[Any] = [run.loss.grad_fn, *(branch.grad_fn for branch in cuts.branches)]
    while waiting:
        top = waiting[-1]
        if top in bits:
            waiting.pop()
            continue
        below = [entry for entry in top.next_functions if entry[0] is not None]
        unknown = [entry[0] for entry in below if entry[0] not in bits]
        if unknown:
            waiting += unknown
            continue
        waiting.pop()
        number = numbers.get(id(getattr(top, "variable", None)))
        own = 0 if number is None else 1 << number
        for entry in below:
            own |= place if (entry[0] == node and entry[1] == output) else bits[entry[0]]
        bits[top] = own
    return bits


def by_length(case: Case, batch: Batch, longest: int, more: bool, done: Callable[[], None]) -> Tensor:
    """Return per sample the norm of the summed gradient of all paths of length 0 … ``longest``: (longest + 1, B).

    With ``more`` there is one row more, for all longer paths together: the full gradient without those. ``done`` is
    called after every length.
    """
    rest = full_gradient(case, batch) if more else None
    cuts = Cuts()
    with running(case, batch, cuts.attach) as run:
        check_ran(case.blocks.names, cuts.names)
        found: list[Tensor] = []
        for _, gradient in zip(range(longest + 1), slots(run, cuts), strict=False):
            found.append(case.place.norms(gradient, batch.size))
            rest = None if rest is None else rest - gradient
            done()
    found += [torch.zeros_like(found[0])] * (longest + 1 - len(found))
    if rest is not None:
        found.append(case.place.norms(rest, batch.size))
    return torch.stack(found)


def full_gradient(case: Case, batch: Batch) -> Tensor:
    """Return the gradient at the place along all paths; raises ``InputError`` where there is none."""
    with running(case, batch, open_gates) as run:
        return run.full()


def paths_of(case: Case, batch: Batch) -> list[int]:
    """Return the number of paths by length, from the graph of one sample."""
    cuts = Cuts()
    with running(case, batch.part(0, 1), cuts.attach) as run:
        check_ran(case.blocks.names, cuts.names)
        return count_paths(run, cuts)
