"""Which tensors that a branch meets on its way have the batch in front: learnt, not guessed by their size."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves

from resect.blocks.inflight import InFlight
from resect.blocks.rows import Rows

Place = tuple[Any, ...]
"""Where a tensor from outside meets a branch: which module or operation, which argument, and how many dimensions."""


class Axes:
    """Which tensors from outside a branch have the batch as their first dimension, by where they meet it.

    Learnt on whole batches of two sizes: a first dimension that follows the size is the batch, or several rows for each
    sample (windows, heads); one that equals it by accident does not follow.
    """

    def __init__(self) -> None:
        self.learning: int | None = None
        """The number of samples of the batch that is being learnt from."""
        self._seen: dict[Place, dict[int, set[int]]] = {}
        self._batch: dict[Place, int] = {}
        self._own: dict[Place, set[int]] = {}

    def settle(self) -> str:
        """Conclude from what was seen; say what stays in doubt, "" if nothing does."""
        self.learning, doubt = None, ""
        for place, seen in self._seen.items():
            if len(seen) < 2:  # met at one size only
                continue
            each = {length / samples for samples, found in seen.items() for length in found}
            if len(each) == 1 and (rows := each.pop()) == int(rows):
                self._batch[place] = int(rows)
            elif any(samples not in found for samples, found in seen.items()):
                self._own[place] = set().union(*seen.values())
            else:
                doubt = f"tensors with and without a batch axis enter {place[0]!r} at one place"
        return doubt

    def samples(self, place: Place, tensor: Tensor) -> int | None:
        """Return the number of samples of the batch that a tensor shows; None if it shows none."""
        if self.learning is not None:
            self._note(place, tensor)
            return self.learning if len(tensor) == self.learning else None
        return len(tensor) // self._batch[place] if place in self._batch else None

    def _note(self, place: Place, tensor: Tensor) -> None:
        assert self.learning is not None
        self._seen.setdefault(place, {}).setdefault(self.learning, set()).add(len(tensor))

    def known(self, place: Place) -> bool:
        """Whether what stands at a place is settled."""
        return self.learning is not None or place in self._batch or place in self._own

    def each(self, place: Place, tensor: Tensor, rows: Rows) -> int | None:
        """Return how many rows of a tensor belong to each sample, 0 if it is not to be cut; None: it cannot be told."""
        if not tensor.ndim:
            return 0
        if self.learning is not None:
            self._note(place, tensor)
            return 0
        each = self._batch.get(place, 1)
        if len(tensor) != each * rows.samples:  # a batch axis of one, or made by the branch from its own values
            return 0
        if place in self._batch:
            return each
        return 0 if len(tensor) in self._own.get(place, ()) else None


def arguments(where: Place, args: Any, kwargs: Any) -> list[tuple[Place, Any]]:
    """Return every leaf of a call's arguments with its place."""
    found: list[tuple[Place, Any]] = []
    for name, value in (*enumerate(args), *kwargs.items()):
        for number, leaf in enumerate([value] if is_leaf(value) else tree_leaves(value)):
            found.append(((*where, name, number, leaf.ndim if isinstance(leaf, Tensor) else None), leaf))
    return found


def is_leaf(argument: Any) -> bool:
    """Whether an argument is, at a glance, no container."""
    return argument is None or isinstance(argument, (Tensor, InFlight, bool, int, float, str))
