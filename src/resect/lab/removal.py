"""Test error of a trained net against the number of its blocks that are removed, at random."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import resect
from resect.blocks.block import Blocks
from resect.lab.evaluate import evaluate
from resect.train.draws import draw_subset

COUNTS = (0, 1, 2, 4, 8, 12, 16, 20, 27)


def removal(
    model: nn.Module,
    blocks: Blocks,
    images: Tensor,
    labels: Tensor,
    *,
    gone: list[str] | None = None,
    draws: int = 5,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows ``removed``, ``draw``, ``error`` (fraction): the net without that many blocks, nothing retrained.

    ``gone``: blocks that go first, those an ε-gate has muted; fewer than these are not measured. Further ones
    are drawn among the rest, the same subsets for every net of as many blocks.
    """
    first = list(gone or ())
    rest = [name for name in blocks.names if name not in set(first)]
    rows = []
    for count in sorted({len(first), *(count for count in COUNTS if len(first) <= count <= len(blocks))}):
        more = count - len(first)
        for draw in range(draws if 0 < more < len(rest) else 1):
            stays = draw_subset(len(rest) - more, len(rest), seed, draw)
            closed = first + [name for name, stay in zip(rest, stays, strict=True) if not stay]
            with resect.closed(model, blocks.select(closed)):
                error = evaluate(model, images, labels) / 100
            rows.append({"removed": count, "draw": draw, "error": error})
    return rows
