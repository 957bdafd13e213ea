"""A score per block, an order, and from it a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.example import Forward, forward_batch
from resect.blocks.gate import Which, resolve
from resect.blocks.measure import Progress, measure_closed
from resect.blocks.metrics import Metric
from resect.blocks.plan import Plan
from resect.errors import InputError, unknown


@dataclass(frozen=True)
class Ranking:
    """Blocks with a score each; the lowest go first."""

    blocks: Blocks
    by: str
    scores: Mapping[str, float]

    @property
    def order(self) -> list[str]:
        """Return the names, the least missed first; ties go to the later block."""
        return sorted(self.scores, key=lambda name: (self.scores[name], -self.blocks[name].index))

    def choose(self, n: int) -> Plan:
        """Return the plan to remove the ``n`` least missed blocks."""
        if isinstance(n, bool) or not isinstance(n, int) or not 0 < n <= len(self.scores):
            raise InputError(
                f"choose(n={n!r}): n must be a whole number from 1 to {len(self.scores)}, the blocks ranked."
            )
        chosen = self.blocks.select(self.order[:n])
        return Plan(tuple(chosen), by=self.by, scores=dict(self.scores), model=self.blocks.model)


def rank(
    model: nn.Module,
    blocks: Which,
    data: Iterable[Any],
    *,
    by: Literal["lesion"] = "lesion",
    metric: str | Metric = "top1",
    forward: Forward = forward_batch,
    progress: Progress | None = None,
) -> Ranking:
    """Score every block by how much the model misses it.

    Parameters
    ----------
    model, blocks: left exactly as they are.
    data: batches, gone through once per block and once for the whole model.
    by: ``"lesion"``: how much the metric rises when the block alone is closed.
    metric, forward, progress: as in ``lesion_study``.

    >>> plan = resect.rank(model, blocks, data).choose(n=4)
    """
    if by != "lesion":
        raise unknown("score", by, ("lesion",))
    blocks = resolve(model, blocks)
    whole, values = measure_closed(model, blocks, data, [(name,) for name in blocks.names], metric, forward, progress)
    return Ranking(blocks, by, {name: value - whole for name, value in zip(blocks.names, values, strict=True)})
