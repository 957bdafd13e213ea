"""What several processes that train together must agree on."""

from __future__ import annotations

import torch
from torch import Tensor


def several_ranks() -> bool:
    """Whether other processes train with this one."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def rank_of_ranks() -> tuple[int, int]:
    """Return this process's rank and how many there are."""
    if not several_ranks():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def mean_over_ranks(value: Tensor) -> Tensor:
    """Replace ``value`` by its mean over all processes, in place; every process must call this."""
    if several_ranks():
        torch.distributed.all_reduce(value)
        value /= torch.distributed.get_world_size()
    return value


def least_over_ranks(value: Tensor) -> Tensor:
    """Replace ``value`` by its least over all processes, in place; every process must call this."""
    if several_ranks():
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MIN)
    return value
