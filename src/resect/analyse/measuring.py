"""What the studies of one call share: the model and its data, and what was measured already."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from resect.analyse.subsets import Subset
from resect.blocks.block import Blocks
from resect.blocks.example import Forward
from resect.blocks.measure import Evaluate, Progress, measured
from resect.blocks.metrics import Metric
from resect.blocks.running import Proof


@dataclass
class Measuring:
    """Measures, and tells how far it is out of ``total``."""

    model: nn.Module
    blocks: Blocks
    data: Iterable[Any]
    metric: str | Metric
    forward: Forward
    evaluate: Evaluate | None
    store: str | Path | None
    progress: Progress | None
    total: int
    done: int = 0
    known: dict[tuple[str, ...], float] = field(default_factory=dict)
    proof: Proof = field(default_factory=Proof)

    def closed(self, wanted: Sequence[Subset]) -> list[float]:
        """Return the metric with each subset closed; what was measured before is not measured again."""
        new = [at for at in dict.fromkeys(subset.closed for subset in wanted) if at not in self.known]
        if new or () not in self.known:
            self.known |= self._measured(new, self.store, lambda done, _: self._tell(done))
        self.step(len(wanted))
        return [self.known[subset.closed] for subset in wanted]

    def baseline(self) -> float:
        """Return the metric of the whole model."""
        if () not in self.known:
            self.closed([])
        return self.known[()]

    def as_it_is(self) -> float:
        """Return the metric of the model as it stands now, with every block open."""
        value = self._measured([], None, None)[()]
        self.step()
        return value

    def step(self, number: int = 1) -> None:
        """So many measurements more are done."""
        self.done += number
        self._tell(0)

    def _measured(self, subsets: Any, store: str | Path | None, progress: Progress | None) -> dict[Any, float]:
        found = measured(
            self.model, self.blocks, self.data, subsets, self.metric, self.forward, progress,
            evaluate=self.evaluate, store=store, proof=self.proof,
        )  # fmt: skip
        return dict(found)

    def _tell(self, more: int) -> None:
        if self.progress and self.done + more:
            self.progress(self.done + more, self.total)
