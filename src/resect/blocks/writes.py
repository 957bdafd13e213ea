"""Which tensors of a run were written to after they were made, and when: there its record does not hold."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from resect.blocks.template import tensors_in


class NotTheSame(BaseException):
    """A run did otherwise than the one before, or cannot be followed; no Exception, so that no model catches it."""


class Writes:
    """The versions of all tensors that the recorded events of a run took and gave."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int, int]] = {}
        """Per id: a tensor, its version as far as it was followed, and the event that made it (-1: none)."""
        self._between: list[tuple[int, float]] = []
        """Pairs (made, written): a run must not begin to compute between the two."""

    def look(self, value: Any, made: int = -1, now: float = math.inf) -> None:
        """Take down the tensors in a value, new ones as ``made`` by an event; others may be written up to ``now``."""
        for tensor in tensors_in(value):
            version = _version(tensor)
            known = self._known.get(id(tensor))
            if known is None:
                self._known[id(tensor)] = (tensor, version, made)
            elif known[1] != version:
                self._between.append((known[2], now))
                self._known[id(tensor)] = (tensor, version, known[2])

    def never_repeat(self, event: int) -> None:
        """No run is to get past this event without computing it."""
        self._between.append((event, math.inf))

    def none_before(self, limit: int) -> int:
        """Return the last event, at most ``limit``, at which every tensor made before is as it was then."""
        for tensor, version, made in self._known.values():
            if _version(tensor) != version:
                self._between.append((made, math.inf))
        while between := [made for made, written in self._between if made < limit < written]:
            limit = max(0, min(between))
        return limit

    def forget_from(self, limit: int) -> None:
        """Forget what events from this one on have done; at 0 everything."""
        self._between = [pair for pair in self._between if limit and pair[0] < limit]
        self._known = {key: known for key, known in self._known.items() if limit and known[2] < limit}


def _version(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunction():
        if tensor.is_inference():
            raise NotTheSame("it runs in inference mode, in which writes to tensors are not counted")
        return tensor._version
