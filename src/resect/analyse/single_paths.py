"""Gradients of single random paths: the paper's own measurement."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from resect.analyse.backward import Case, Run, running
from resect.analyse.loss import Batch
from resect.analyse.paths import PathChooser, counts
from resect.blocks.gate import Gates
from resect.blocks.inflight import AbsentError
from resect.errors import InputError


def sample_path_gradients(
    case: Case, batch: Batch, chunk: int, lengths: int, draws: int, seed: int, done: Callable[[], None], mean: bool
) -> list[list[float]]:
    """Return per length, of the first ``lengths``, the gradient norms of single random paths.

    A single path's gradient (section 5): through the branch of the blocks on the path and not through their shortcut,
    through the shortcut of all others and not through their branch. Values stay the same, so that each part of the
    batch runs forward once; every backward pass then follows one path per sample, and ``done`` is called. The loss is a
    sum over samples, or with ``mean`` becomes one.
    """
    chooser, draw = PathChooser(case.chain), random.Random(seed)
    norms: list[list[float]] = [[] for _ in range(lengths)]
    queues = dealt([length for length in range(lengths) if chooser.counts[length]], draws, batch.size, draw)
    for start, part in zip(range(0, batch.size, chunk), batch.parts(chunk), strict=True):
        routes = Routes()
        with running(case, part, routes.attach) as run:
            for wanted in itertools.zip_longest(*queues[start : start + part.size]):
                paths = [set() if length is None else chooser.draw(length, draw) for length in wanted]
                for length, norm in zip(wanted, routes.norms(run, case, paths), strict=True):
                    if length is not None:
                        norms[length].append(norm * (part.size if mean else 1))
                done()
    return norms


def dealt(lengths: Sequence[int], draws: int, samples: int, draw: random.Random) -> list[list[int]]:
    """Return per sample the lengths of the paths to draw for it: each length meets all samples equally often.

    Where the samples are more than the draws, or do not divide them, which ones it meets once more is drawn; none gets
    more than one path more than another, so that few backward passes have samples to spare.
    """
    queues: list[list[int]] = [[] for _ in range(samples)]
    for length in lengths:
        for _ in range(draws // samples):
            for queue in queues:
                queue.append(length)
    order = draw.sample(range(samples), samples)
    left = [length for length in lengths for _ in range(draws % samples)]
    for place, length in enumerate(left):  # a length's own are neighbours in the order, and so all different
        queues[order[place % samples]].append(length)
    return queues


def passes(batch: Batch, chunk: int, lengths: int, draws: int) -> int:
    """Return how many backward passes ``draws`` paths of each of ``lengths`` lengths take, or a few more."""
    return -(-batch.size // chunk) * -(-lengths * draws // batch.size)


class Routes:
    """One path per sample, set anew before every backward pass."""

    def __init__(self) -> None:
        self.on_path: dict[str, Tensor] = {}

    def attach(self, handle: Gates) -> None:
        """Let every addition send gradients along the paths."""
        for gate in handle:
            gate.join_by(_Route(self, gate.block.name))

    def norms(self, run: Run, case: Case, paths: list[set[str]]) -> list[float]:
        """Return the gradient norms of the paths, one per sample."""
        for name in case.blocks.names:
            self.on_path[name] = torch.tensor([name in path for path in paths], device=run.loss.device)
        return case.place.norms(run.full(), len(paths)).tolist()


@dataclass
class _Route:
    """``shortcut + branch`` whose gradient goes to the branch for samples on the path, else to the shortcut."""

    routes: Routes
    name: str

    def __call__(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        return _Choose.apply(shortcut, branch, self.routes, self.name)


class _Choose(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, branch: Tensor, routes: Routes, name: str) -> Tensor:
        ctx.routes, ctx.name, ctx.shapes = routes, name, (shortcut.shape, branch.shape)
        return shortcut + branch

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        on_path = ctx.routes.on_path[ctx.name]
        mask = on_path.view(-1, *(1,) * (gradient.dim() - 1)) if len(on_path) > 1 else on_path
        zero = torch.zeros((), dtype=gradient.dtype, device=gradient.device)
        left, right = torch.where(mask, zero, gradient), torch.where(mask, gradient, zero)
        return left.sum_to_size(ctx.shapes[0]), right.sum_to_size(ctx.shapes[1]), None, None


def check_samples(case: Case, batch: Batch, paths: list[int]) -> None:
    """Raise unless each sample of a batch can follow a path of its own.

    The paths must be those of a chain, or a choice at every addition is none; a sample's output must be what it is for
    the sample alone, and samples the first dimension of every addition.
    """
    instead = "Leave out the sampled quantity (samples=0): the exact one holds here too."
    if paths != counts(case.chain):
        raise InputError(
            "Single paths cannot be drawn: these blocks do not follow one another (a branch reads more than one "
            f"stream), so that a choice at every addition is not one path. {instead}"
        )
    shapes: list[dict[str, tuple[int, ...]]] = []
    outputs: list[list[Tensor]] = []
    for part in (batch.part(0, 1), batch.part(0, 8)):
        met: dict[str, tuple[int, ...]] = {}

        def act(handle: Gates, met: dict[str, tuple[int, ...]] = met) -> None:
            for gate in handle:
                gate.join_by(_Met(met, gate.block.name))

        with _joined(instead), running(case, part, act) as run:
            tensors = [leaf.detach() for leaf in tree_leaves(run.output) if isinstance(leaf, Tensor)]
        outputs.append([tensor for tensor in tensors if tensor.dim()])
        shapes.append(met)
        if batch.size == 1:
            return
    size = min(8, batch.size)
    for name, alone in shapes[0].items():
        if (alone[:1], shapes[1][name][:1]) != ((1,), (size,)):
            raise InputError(
                f"Single paths cannot be drawn for several samples at once: what {name!r} adds has the shape {alone} "
                f"for one sample and {shapes[1][name]} for {size}. Pass a batch of one sample. {instead}"
            )
    pairs = [(one[0], all_[0]) for one, all_ in zip(*outputs, strict=False) if (len(one), len(all_)) == (1, size)]
    if not pairs or not all(_alike(one, other) for one, other in pairs):
        raise InputError(
            "Single paths cannot be drawn for several samples at once: the model couples samples (the output for the "
            f"first one changes with the others). Pass a batch of one sample. {instead}"
        )


@contextmanager
def _joined(instead: str) -> Iterator[None]:
    """Say what to do where an addition cannot be acted on."""
    try:
        yield
    except AbsentError as error:
        raise InputError(f"Single paths cannot be drawn: {error}. {instead}") from error


def _alike(one: Tensor, other: Tensor) -> bool:
    # Batches of other sizes are rounded differently; what samples do to each other is more than that.
    within = max(1e-4, torch.finfo(one.dtype).eps ** 0.5) if one.is_floating_point() else 0.0
    one, other = one.double(), other.double()
    return one.shape == other.shape and bool((one - other).abs().max() <= within * one.abs().max())


@dataclass
class _Met:
    """``shortcut + branch``, whose shape is noted."""

    shapes: dict[str, tuple[int, ...]]
    name: str

    def __call__(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        total = shortcut + branch
        self.shapes[self.name] = tuple(total.shape)
        return total
