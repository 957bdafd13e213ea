"""Run a model forward with something at every branch end, and hold what is needed to go backward from there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_map_only

from resect.analyse.loss import Batch, LossFn, loss_of
from resect.analyse.paths import Chain, chain_from, chain_of, names_in
from resect.analyse.place import Place, join_seen, looking
from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.gate import Gates, Which, gates, resolve
from resect.blocks.inflight import AbsentError
from resect.blocks.modes import kept_buffers, kept_modes
from resect.errors import BlocksError, InputError, check_all, quoted

Act = Callable[[Gates], None]
"""What is put at the branch ends for one forward pass."""


@dataclass(frozen=True)
class Case:
    """A model, the blocks that lie ahead of a place, and the loss: everything but the batch."""

    model: nn.Module
    blocks: Blocks
    chain: Chain
    loss_fn: LossFn | None
    place: Place

    @classmethod
    def of(cls, model: nn.Module, blocks: Which, loss_fn: LossFn | None, at: str, batch: Batch) -> Case:
        """Check the blocks and the place; call it inside ``differentiable``."""
        blocks = resolve(model, blocks)
        if not blocks:
            raise BlocksError("Path gradients need at least one residual block, and the selection is empty.")
        check_all(
            (f"{block.name!r}: {block.reason}" for block in blocks if not block.scalable),
            "Path gradients need to act on every branch end, and cannot here (leave the block out of the selection)",
        )
        chain = chain_of(blocks)
        place = Place(at, None)
        if at != "input":
            name = chain[0].branches[0].name if at == "first" else _block_named(blocks, at).name
            chain = chain_from(chain, name) or chain
            block = blocks[name]
            fork = next(fork for fork in chain if name in [branch.name for branch in fork.branches])
            place = Place(block.name, block, tuple(branch.name for branch in fork.branches), not block.modules)
        case = cls(model, blocks.select(names_in(chain)), chain, loss_fn, place)
        return replace(case, place=_seen_place(case, batch.part(0, 1)))


@dataclass(frozen=True)
class Run:
    """One forward pass whose graph is still there."""

    loss: Tensor
    where: GradientEdge
    shape: tuple[int, ...]
    output: Any

    def back(
        self, outputs: Sequence[Any], seeds: Sequence[Tensor | None], inputs: Sequence[Any] = ()
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients at the place, then at ``inputs``, of ``outputs`` seeded so; None where none arrives."""
        return torch.autograd.grad(
            tuple(outputs), (self.where, *inputs), tuple(seeds), retain_graph=True, allow_unused=True
        )

    def full(self) -> Tensor:
        """Return the gradient of the loss at the place; raises ``InputError`` where the loss does not depend on it."""
        gradient = self.back([self.loss], [None])[0]
        if gradient is None:
            raise InputError("The loss does not depend on the place where its gradient is asked for: check loss_fn.")
        return gradient


@contextmanager
def running(case: Case, batch: Batch, act: Act) -> Iterator[Run]:
    """Run the model on a batch for the length of a ``with``, which is also how long it may be gone backward through."""
    example = batch.example.to(None)
    leaves = list({id(leaf): leaf for leaf in example.tensors()}.values())
    for leaf in leaves:
        if leaf.is_floating_point():
            leaf.requires_grad_()
    # Clones, since the model may write into what it gets; one for each tensor, also where it is given twice.
    given = {id(leaf): leaf.clone() if leaf.is_floating_point() else leaf for leaf in leaves}
    args, kwargs = tree_map_only(Tensor, lambda leaf: given[id(leaf)], (example.args, dict(example.kwargs)))
    with gates(case.model, case.blocks) as handle:
        act(handle)
        with looking(case.model, case.place, leaves, handle) as seen:
            output = case.model(*args, **kwargs)
        loss = loss_of(output, batch.target, case.loss_fn)
        if not loss.requires_grad:
            raise InputError("The loss does not depend on the model: no gradient flows from it.")
        if seen.edge is None:
            what = "input" if case.place.block is None else f"block {case.place.at!r}"
            raise InputError(f"No gradient can be taken at the {what}: no floating-point value was seen there.")
        yield Run(loss, seen.edge, seen.shape, output)


def check_ran(names: Sequence[str], ran: Collection[str]) -> None:
    """Raise if one of these blocks did not run."""
    missing = [name for name in names if name not in ran]
    if missing:
        raise InputError(
            f"{quoted(missing)} did not run on this batch, and so lies on no path: leave it out of the selection."
        )


def open_gates(_: Gates) -> None:
    """Leave every branch as it is."""


@contextmanager
def differentiable(model: nn.Module) -> Iterator[None]:
    """Eval mode with gradients, all restored afterwards, buffers too."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    # Frozen weights would cut the graph between the loss and the place asked for.
    for parameter in wanted:
        if parameter.is_floating_point():
            parameter.requires_grad_()
    try:
        with kept_modes(model), kept_buffers(model), torch.enable_grad():
            model.eval()
            yield
    finally:
        for parameter, needs in wanted.items():
            parameter.requires_grad_(needs)


def _noted(sides: list[Tensor], branch: Tensor) -> Tensor:
    sides.append(branch)
    return branch


def _block_named(blocks: Blocks, at: str) -> ResidualBlock:
    try:
        return blocks[at]
    except InputError as error:
        raise InputError(f"{error} at= also takes 'first' and 'input'.") from None


def _seen_place(case: Case, one: Batch) -> Place:
    """Return the place as it is to be seen: as what the block's first module gets, else as what the addition adds to.

    Both the shortcut and every branch of the sum must begin there: that is tried, on one sample.
    """
    ways = [case.place] if case.place.addition or case.place.block is None else [
        case.place, replace(case.place, addition=True)
    ]  # fmt: skip
    for place in ways:
        sides: list[Tensor] = []

        def act(handle: Gates, sides: list[Tensor] = sides) -> None:
            for name in case.place.fork:
                handle[name].apply(partial(_noted, sides))
                join_seen(handle[name], sides.append)

        # AbsentError: what the addition adds to cannot be told there, between several branches and operations on them.
        with suppress(AbsentError), running(replace(case, place=place), one, act) as run:
            if all(s.requires_grad and run.back([s], [torch.ones_like(s)])[0] is not None for s in sides):
                return replace(place, alone=run.shape)
    raise InputError(
        f"What enters block {case.place.at!r} cannot be seen: its shortcut and its branch do not begin at one value "
        "that a module gets or the addition adds. Use at='input', or another block."
    )
