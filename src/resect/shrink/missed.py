"""The metric of a model without some blocks, each set measured once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.example import Forward
from resect.blocks.measure import Progress, measured
from resect.blocks.metrics import Metric
from resect.blocks.running import Proof, canonical

Set = tuple[str, ...]


@dataclass
class Missed:
    """Measures, remembers, and tells how far it is out of ``total`` (0: not known)."""

    model: nn.Module
    blocks: Blocks
    data: Iterable[Any]
    metric: str | Metric
    forward: Forward
    progress: Progress | None
    total: int = 0
    known: dict[Set, float] = field(default_factory=dict)
    proof: Proof = field(default_factory=Proof)

    def named(self, names: Iterable[str]) -> Set:
        """Return a set of blocks as it is remembered: in the blocks' order."""
        return canonical(self.blocks, tuple(names))

    def values(self, sets: Sequence[Set]) -> list[float]:
        """Return the metric with each set closed."""
        wanted = [self.named(names) for names in sets]
        new = [names for names in dict.fromkeys(wanted) if names not in self.known]
        if new:
            done = max(0, len(self.known) - 1)
            tell = (lambda more, _: self.progress(done + more, self.total)) if self.progress else None  # type: ignore[misc]
            found = measured(self.model, self.blocks, self.data, new, self.metric, self.forward, tell, proof=self.proof)
            self.known |= dict(found)
        return [self.known[names] for names in wanted]

    def rises(self, gone: Set, sets: Sequence[Set]) -> list[float]:
        """Return how much the metric rises with each set closed on top of ``gone``."""
        values = self.values([(*gone, *names) for names in sets])
        before = self.known[self.named(gone)]
        return [value - before for value in values]
