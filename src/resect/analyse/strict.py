"""Strict identity: how near each branch is to adding nothing, and how often the published gate would close it.

Yu et al. 2018 (ε-ResNet): a branch all of whose responses are at most ε contributes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from resect.blocks.gate import check_number
from resect.errors import InputError

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


def distribution(maxima: Mapping[str, Tensor], epsilon: float | None = None) -> list[dict[str, Any]]:
    """Return a row per block and quantile of its samples' max|f|; ``maxima``: per block (N,).

    ``distance``: from there to ``epsilon``, negative below it: where it is so at quantile 1, the block is exactly its
    shortcut on every sample of the data.
    """
    if epsilon is not None:
        check_number("epsilon", epsilon, 0)
    rows = []
    for index, (name, values) in enumerate(maxima.items()):
        found = torch.quantile(values.double(), torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        for quantile, value in zip(QUANTILES, found, strict=True):
            row = {"index": index, "name": name, "quantile": quantile, "response": value}
            rows.append(row if epsilon is None else row | {"epsilon": epsilon, "distance": value - epsilon})
    return rows


def closed_share(maxima: Mapping[str, Tensor], epsilon: float, batch_sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Return a row per block and batch size: the share of batches on which the gate at ``epsilon`` closes it.

    The gate looks at the largest response in the whole batch, which is the largest of its samples': nothing is run
    again. Batches are ``size`` consecutive samples in the order of the data, the last one what is left.
    """
    check_number("epsilon", epsilon, 0)
    wrong = [size for size in batch_sizes if isinstance(size, bool) or not isinstance(size, int) or size < 1]
    if wrong:
        raise InputError(f"Batch sizes must be whole numbers of at least 1, not {wrong[0]!r}.")
    rows = []
    for index, (name, values) in enumerate(maxima.items()):
        for size in batch_sizes:
            largest = nn.functional.pad(values, (0, -len(values) % size), value=0.0).view(-1, size).amax(dim=1)
            # ε = 0 is no gate at all, and the gate itself compares in the precision of the responses.
            closed = (largest <= torch.tensor(epsilon, dtype=largest.dtype)) & (epsilon > 0)
            rows.append(
                {"index": index, "name": name, "epsilon": epsilon, "batch": size, "batches": len(largest),
                 "closed": float(closed.double().mean())}
            )  # fmt: skip
    return rows
