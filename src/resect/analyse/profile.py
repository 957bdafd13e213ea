"""What ``block_response`` found, as tensors and as rows for files, tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from resect.analyse.streams import Pool
from resect.analyse.strict import closed_share, distribution
from resect.blocks.block import Blocks

PROFILE = ("branch", "shortcut", "ratio", "cosine", "angle", "descent")


@dataclass(frozen=True)
class BlockResponse:
    """What ``block_response`` found. n blocks; n + 1 depths: before the first block, and after each sum."""

    blocks: Blocks
    samples: int
    mean: dict[str, Tensor]
    """Per quantity of PROFILE the mean over samples, (n,), float64; NaN where it is not defined for any sample:

    ``branch``, ``shortcut``: L2 norm. ``ratio``: of the two norms. ``cosine``, ``angle`` (degrees): between them.
    ``descent``: cosine of the branch with the negative gradient of the loss at the sum it goes into.
    """
    deviation: dict[str, Tensor]
    """Their standard deviations over the samples, (n,)."""
    largest: dict[str, Tensor]
    """Per block max|f| of each sample in the order of the data, (samples,)."""
    depths: tuple[str, ...]
    """What stands before each depth: ``""``, then the last block of each sum."""
    distance: Tensor
    """Angular distance between depths, (depths, depths), 0 … 1 (1: opposite); NaN between those of other shapes."""
    cka: Tensor
    """Linear CKA between depths, (depths, depths): 1 if alike but for rotation and scale. An estimate, which may leave
    0 … 1 by a little; NaN of fewer than four samples."""
    similarity: Tensor
    """How well the units of one block's branch are found again in another's, (n, n), 0 … 1."""
    probes: Tensor
    """Share of held-out samples whose label a linear probe reads off each depth, (depths,); empty without probes."""
    guessing: float
    """The same share for the most frequent class, NaN without probes."""
    pool: Pool
    """How a stream becomes one vector per sample: mean over places, or the last token."""
    left_out: dict[str, str]
    """Blocks, and quantities, that were not looked at, and why."""

    def rows(self) -> list[dict[str, Any]]:
        """Return a row per block: what it is, and PROFILE with standard deviations; None where not defined."""
        return [
            {"index": place, "name": block.name, "part": block.part, "shortcut": block.shortcut, "stage": block.stage}
            | {f"{name}_{what}": _number(table[name][place])
               for name in PROFILE for what, table in (("mean", self.mean), ("deviation", self.deviation))}
            for place, block in enumerate(self.blocks)
        ]  # fmt: skip

    def depth_rows(self) -> list[dict[str, Any]]:
        """Return a row per pair of depths: angular distance and CKA, None where not defined."""
        return [
            {"depth": i, "other": j, "after": self.depths[i] or None, "distance": _number(self.distance[i, j]),
             "cka": _number(self.cka[i, j])}
            for i in range(len(self.depths)) for j in range(len(self.depths))
        ]  # fmt: skip

    def unit_rows(self) -> list[dict[str, Any]]:
        """Return a row per pair of blocks, counted from 1: how well the units of one are found again in the other."""
        return [
            {"block": i, "other": j, "similarity": value}
            for i, line in enumerate(self.similarity.tolist(), start=1)
            for j, value in enumerate(line, start=1)
        ]

    def probe_rows(self) -> list[dict[str, Any]]:
        """Return a row per depth: accuracy of the probe, and of guessing; none without probes."""
        return [
            {"depth": depth, "after": self.depths[depth] or None, "accuracy": value, "guessing": self.guessing}
            for depth, value in enumerate(self.probes.tolist())
        ]

    def strict_rows(self, epsilon: float | None = None) -> list[dict[str, Any]]:
        """Return a row per block and quantile of its samples' max|f|, with the distance to ``epsilon``.

        Negative at quantile 1: on this data the block is exactly its shortcut once gated (Yu et al. 2018).
        """
        return distribution(self.largest, epsilon)

    def closed_rows(self, epsilon: float, batch_sizes: Sequence[int] = (1, 16, 64, 256)) -> list[dict[str, Any]]:
        """Return a row per block and batch size: the share of batches on which ``EpsilonGate`` would mute it alone.

        Batches are consecutive samples in the order of the data, the last one what is left; nothing is run again, so
        each block's gate is judged on the stream of the whole net, no other branch muted.
        """
        return closed_share(self.largest, epsilon, batch_sizes)

    def __str__(self) -> str:
        lines = [f"{self.samples} samples; {'block':<30} branch/shortcut  angle  cosine with −gradient"]
        for row in self.rows():
            values = (row["ratio_mean"], row["angle_mean"], row["descent_mean"])
            shown = ["—" if value is None else f"{value:.3g}" for value in values]
            lines.append(f"  {row['name']:<40} {shown[0]:>12} {shown[1]:>7}° {shown[2]:>8}")
        return "\n".join([*lines, *(f"  left out: {name}: {reason}" for name, reason in self.left_out.items())])


def _number(value: Tensor) -> float | None:
    """A number, or None where it is not defined."""
    number = float(value)
    return number if number == number else None
