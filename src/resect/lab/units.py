"""What single units respond to, over the plane."""

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
