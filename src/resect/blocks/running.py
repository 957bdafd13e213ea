"""Run a model with blocks closed, one subset after another on one batch; it is left exactly as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.example import Forward, forward_batch
from resect.blocks.gate import Gates, gates
from resect.blocks.modes import kept_modes
from resect.errors import BlocksError

Subset = Sequence[str]
"""Names of the blocks that are closed together; none: the whole model."""


def canonical(blocks: Blocks, subset: Subset) -> tuple[str, ...]:
    """Return a subset by canonical names in the blocks' order, each once."""
    chosen = {blocks[name].name for name in subset}
    return tuple(name for name in blocks.names if name in chosen)


def in_order(blocks: Blocks, subsets: Iterable[Subset]) -> list[tuple[str, ...]]:
    """Return canonical subsets in the order in which neighbours differ as late in the model as can be."""
    place = {name: number for number, name in enumerate(blocks.names)}
    named = (canonical(blocks, subset) for subset in subsets)
    return sorted(named, key=lambda subset: [-place[name] for name in subset])


class Run:
    """A model with open gates on its blocks, in eval mode, without gradients: what `running` gives."""

    def __init__(self, model: nn.Module, handle: Gates, forward: Forward) -> None:
        self.model, self.blocks, self.forward = model, handle.blocks, forward
        self._gates = handle

    def each(self, batch: Any, subsets: Iterable[Subset]) -> Iterator[Any]:
        """Yield the output of the model for one batch with each subset of blocks closed, in the given order.

        What it yields is to be read, never written.
        """
        for subset in subsets:
            yield self._one(batch, subset)

    def _one(self, batch: Any, subset: Subset) -> Any:
        for name in subset:
            self._gates[name].close()
        try:
            return self.forward(self.model, batch)
        finally:
            for name in subset:
                self._gates[name].open()


@contextmanager
def running(model: nn.Module, blocks: Blocks, forward: Forward = forward_batch) -> Iterator[Run]:
    """Make a model ready to run with subsets of its blocks closed, for the length of a ``with`` statement.

    >>> with running(model, blocks) as run:
    ...     whole, lesioned = run.each(batch, [(), ("layer3.4/conv1",)])

    On leaving, also by an exception, the model is exactly what it was. Raises ``BlocksError`` for no blocks.
    """
    if not blocks:
        raise BlocksError("There is nothing to close: the selection of residual blocks is empty.")
    with kept_modes(model), torch.no_grad(), gates(model, blocks) as handle:
        model.eval()
        yield Run(model, handle, forward)
