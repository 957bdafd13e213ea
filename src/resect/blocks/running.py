"""Run a model with blocks closed, one subset after another on one batch; it is left exactly as it was."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from resect.blocks.block import Blocks
from resect.blocks.example import Forward, first_samples, forward_batch
from resect.blocks.gate import Gates, gates
from resect.blocks.modes import kept_buffers, kept_modes
from resect.blocks.replay import Replay
from resect.blocks.still import state_of, why_moved, why_not_still
from resect.blocks.template import tensors_in
from resect.blocks.writes import NotTheSame
from resect.errors import BlocksError, quoted

Subset = Sequence[str]
"""Names of the blocks that are closed together; none: the whole model."""

_TRIED = 2  # samples on which replaying is compared with full runs


def canonical(blocks: Blocks, subset: Subset) -> tuple[str, ...]:
    """Return a subset by canonical names in the blocks' order, each once."""
    chosen = {blocks[name].name for name in subset}
    return tuple(name for name in blocks.names if name in chosen)


def in_order(blocks: Blocks, subsets: Iterable[Subset]) -> list[tuple[str, ...]]:
    """Return canonical subsets in the order in which neighbours differ as late in the model as can be."""
    place = {name: number for number, name in enumerate(blocks.names)}
    named = (canonical(blocks, subset) for subset in subsets)
    return sorted(named, key=lambda subset: [-place[name] for name in subset])


@dataclass
class Proof:
    """What is known of leaving out what the run before has computed."""

    in_full: str = ""
    """Why it is not done, and every network is run from the input on; "" where it is done."""
    kinds: set[str] = field(default_factory=set)
    """The blocks at which two runs may part: there, both ways of running came to the same, to the bit."""


class Run:
    """A model with open gates on its blocks, in eval mode, without gradients: what `running` gives."""

    def __init__(self, model: nn.Module, handle: Gates, forward: Forward, proof: Proof) -> None:
        self.model, self.blocks, self.forward, self.proof = model, handle.blocks, forward, proof
        self._gates = handle

    def each(self, batch: Any, subsets: Iterable[Subset]) -> Iterator[Any]:
        """Yield the output of the model for one batch with each subset of blocks closed, in the given order.

        Each is run from where it differs from the one before: see `in_order`. The first time, on two samples of the
        batch, that is compared with full runs to the bit; where it differs, or a run leaves something changed behind,
        every network is run in full and a warning says why. What it yields is to be read, never written.
        """
        sets = [frozenset(self.blocks[name].name for name in subset) for subset in subsets]
        if not self.proof.in_full and len(sets) > 2:
            self._prove(batch, sets)
        return self._replayed(batch, sets)

    def _full(self, batch: Any, closed: frozenset[str]) -> Any:
        with self._without(closed):
            return self.forward(self.model, batch)

    def _replayed(self, batch: Any, sets: list[frozenset[str]]) -> Iterator[Any]:
        replay = Replay(self.model)
        for closed, after in zip(sets, [*sets[1:], None], strict=True):
            if self.proof.in_full or len(sets) < 3:
                yield self._full(batch, closed)
                continue
            try:
                with self._without(closed):
                    output = replay.run(
                        partial(self.forward, self.model, batch), closed, None if after is None else closed ^ after
                    )
            except NotTheSame as error:
                self._say(str(error))
                output = self._full(batch, closed)
            yield output

    @contextmanager
    def _without(self, closed: frozenset[str]) -> Iterator[None]:
        for name in closed:
            self._gates[name].close()
        try:
            yield
        finally:
            for name in closed:
                self._gates[name].open()

    def _prove(self, batch: Any, sets: list[frozenset[str]]) -> None:
        """Find out whether it is right for this model to leave out what neighbours of these subsets share."""
        chosen, kinds = self._of_new_kinds(sets)
        if not kinds:
            return
        why = why_not_still(self.model, list(self._gates))
        if not why:
            with kept_buffers(self.model), torch.random.fork_rng():
                try:
                    why = self._why_wrong(first_samples(batch, _TRIED), chosen)
                except Exception:  # few samples will not do: an error of the model's own comes again
                    why = self._why_wrong(batch, chosen)
        self.proof.kinds |= kinds
        if why and not self.proof.in_full:
            self._say(why)

    def _of_new_kinds(self, sets: list[frozenset[str]]) -> tuple[list[frozenset[str]], set[str]]:
        """Return part of the subsets, with neighbours that part at every block which is new, and those blocks."""
        order = {name: place for place, name in enumerate(self.blocks.names)}
        chosen, kinds = sets[:1], set[str]()
        for before, closed in itertools.pairwise(sets):
            kind = min(before ^ closed, key=order.__getitem__, default=None)
            if kind is not None and kind not in self.proof.kinds | kinds:
                kinds.add(kind)
                chosen += [closed] if chosen[-1] == before else [before, closed]
        return chosen, kinds

    def _why_wrong(self, batch: Any, sets: list[frozenset[str]]) -> str:
        """Say why leaving out what they share is wrong for these subsets; "" where it is right to the bit."""
        if not self.proof.kinds:
            self.forward(self.model, batch)  # what is made once and kept is made now
            before = state_of(self.model)
            self.forward(self.model, batch)
            if why := why_moved(before, state_of(self.model)):
                return why
        for closed, output in zip(sets, self._replayed(batch, sets), strict=True):
            if not self.proof.in_full and not _identical(output, self._full(batch, closed)):
                return f"what was left out with {quoted(sorted(closed)) or 'no block'} closed made a difference"
        return ""

    def _say(self, why: str) -> None:
        self.proof.in_full = why
        warnings.warn(
            f"Every altered network is run in full, from the input on: {why}. The results are the same, slower.",
            stacklevel=2,
        )


def _identical(one: Any, other: Any) -> bool:
    pairs = list(zip(tensors_in(one), tensors_in(other), strict=False))
    return len(tensors_in(one)) == len(tensors_in(other)) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(_bits(a), _bits(b)) for a, b in pairs
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def running(
    model: nn.Module, blocks: Blocks, forward: Forward = forward_batch, proof: Proof | None = None
) -> Iterator[Run]:
    """Make a model ready to run with subsets of its blocks closed, for the length of a ``with`` statement.

    ``proof`` carries what was found out about the model from one statement to the next.

    >>> with running(model, blocks) as run:
    ...     whole, lesioned = run.each(batch, [(), ("layer3.4/conv1",)])

    On leaving, also by an exception, the model is exactly what it was. Raises ``BlocksError`` for no blocks.
    """
    if not blocks:
        raise BlocksError("There is nothing to close: the selection of residual blocks is empty.")
    with kept_modes(model), kept_buffers(model), torch.no_grad(), gates(model, blocks) as handle:
        model.eval()
        yield Run(model, handle, forward, Proof() if proof is None else proof)
