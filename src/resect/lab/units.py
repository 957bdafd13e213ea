"""What single units respond to, over the plane, and how alike the units of two blocks are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import resect
from resect.blocks.response import watch

REACH = 1.1
"""Maps show the square from −REACH to REACH; the spiral's arms end at 1, before the noise."""


def grid(size: int) -> Tensor:
    """Return the plane as points (size², 2), row by row from the top left."""
    side = torch.linspace(-REACH, REACH, size)
    y, x = torch.meshgrid(-side, side, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1)


def unit_maps(model: nn.Module, points: Tensor) -> Tensor:
    """Return what every unit of every branch end responds on the points: (blocks, units, points)."""
    blocks = resect.find_blocks(model, points)
    with torch.no_grad(), resect.gates(model, blocks) as watched:
        seen = watch(watched, lambda branch: branch.clone())
        model(points)
    return torch.stack([seen[block.name].T for block in blocks])


def similarity(maps: Tensor, others: Tensor | None = None) -> Tensor:
    """Return how well the units of block i are found again in block j: (blocks, blocks), from 0 to 1.

    Entry (i, j): the mean over the units of block i of the largest absolute correlation of their map with the map of
    any unit of block j. A unit that responds the same everywhere has correlation 0. ``others``: the maps of block j
    are those of another net, which can have reused nothing from this one.
    """
    ours, theirs = _standard(maps), _standard(maps if others is None else others)
    correlation = torch.einsum("iup,jvp->ijuv", ours, theirs).abs()
    return correlation.amax(dim=3).mean(dim=2).clamp(max=1.0)


def _standard(maps: Tensor) -> Tensor:
    centred = maps.double() - maps.double().mean(dim=2, keepdim=True)
    size = centred.norm(dim=2, keepdim=True)
    # Rounding makes a constant map wobble a little: that is no feature.
    still = size <= 1e-6 * maps.double().norm(dim=2, keepdim=True)
    return torch.where(still, 0.0, centred / size.clamp(min=torch.finfo(torch.float64).tiny))


def summary(matrix: Tensor) -> dict[str, float]:
    """Return the mean similarity of ``adjacent`` blocks and of ``others``, and where a block's likest one stands.

    ``elsewhere``: the share of blocks whose most similar block is not a neighbour.
    """
    place = torch.arange(len(matrix))
    distance = (place[:, None] - place).abs()
    likest = matrix.masked_fill(distance == 0, -1.0).argmax(dim=1)
    return {
        "adjacent": float(matrix[distance == 1].mean()),
        "others": float(matrix[distance > 1].mean()),
        "elsewhere": float(((likest - place).abs() > 1).double().mean()),
    }
