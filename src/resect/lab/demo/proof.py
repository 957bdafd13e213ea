"""Compare the cut net with the gated net it came from, on every test batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import resect
from resect.blocks.block import Blocks
from resect.blocks.plan import Plan
from resect.blocks.response import watch
from resect.errors import ProofError


def compare_with_gated(
    gated: nn.Module,
    cut: nn.Module,
    blocks: Blocks,
    plan: Plan,
    epsilon: float,
    images: Tensor,
    batch_sizes: Sequence[int],
) -> list[dict[str, Any]]:
    """Return per batch size how often the gate held, and whether the cut net was then equal to the bit.

    The gate decides batch by batch. It *holds* on a batch if every block of the plan is muted and every
    other block open; there, cut and gated net must agree to the bit, or ``ProofError`` is raised. Where a
    block of the plan opens, or another one is muted as well (small batches reach smaller maxima), they may
    differ: those batches are counted.
    """
    gone = set(plan.names)
    rows = []
    for size in batch_sizes:
        row = {"batch size": size, "batches": 0, "gate held": 0, "equal to the bit": 0, "a cut block opened": 0,
               "a kept block muted": 0}  # fmt: skip
        for batch in images.split(size):
            expected, muted = _gated_forward(gated, blocks, epsilon, batch)
            with torch.no_grad():
                output = cut(batch)
            opened, extra = bool(gone - muted), bool(muted - gone)
            equal = torch.equal(expected, output)
            row["batches"] += 1
            row["a cut block opened"] += opened
            row["a kept block muted"] += extra
            if opened or extra:
                continue
            if not equal:
                raise ProofError(
                    f"The cut net differs from the gated one by up to {float((expected - output).abs().max()):.3g} on "
                    f"a batch of {size} where the gate holds."
                )
            row["gate held"] += 1
            row["equal to the bit"] += 1
        rows.append(row)
    return rows


def _gated_forward(model: nn.Module, blocks: Blocks, epsilon: float, batch: Tensor) -> tuple[Tensor, set[str]]:
    """Run the gated net; return its output and the names of the blocks muted on this batch."""
    with torch.no_grad(), resect.gates(model, blocks) as gates:
        # The watching gates are attached first, so that they see the branch before the ε-gate acts on it.
        largest = watch(gates)
        with resect.EpsilonGate(model, blocks, epsilon=epsilon, muted_at_start="allow"):
            output = model(batch)
    return output, {name for name, value in largest.items() if value <= epsilon}
