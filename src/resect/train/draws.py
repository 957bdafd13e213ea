"""Random draws as pure functions of (seed, step): the same on every rank, after a resume, on another machine."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF  # the low 32 bits


def generator(purpose: str, seed: int, step: int) -> torch.Generator:
    """Return a CPU generator that depends on its arguments alone; distinct purposes give unrelated draws."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{step}".encode()).digest()
    # CPU generators use the low 32 bits of a seed.
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def draw_closed(probs: list[float], seed: int, step: int) -> list[bool]:
    """Draw which blocks are closed at ``step``: block l with probability ``probs[l]``, independently."""
    uniform = torch.rand(len(probs), dtype=torch.float64, generator=generator("closed", seed, step))
    return (uniform < torch.tensor(probs, dtype=torch.float64)).tolist()


def draw_keys(probs: list[float], seed: int, step: int) -> Tensor:
    """Draw what `is_dropped` needs of a step: int64 (blocks, 2), a key and the probability in 2⁻³² per block."""
    keys = torch.randint(_LOW + 1, (len(probs),), dtype=torch.int64, generator=generator("dropped", seed, step))
    limits = (torch.tensor(probs, dtype=torch.float64) * (_LOW + 1)).round().to(torch.int64)
    return torch.stack([keys, limits], dim=1)


def is_dropped(key: Tensor, rows: Tensor) -> Tensor:
    """Return which samples drop a branch, bool like ``rows``.

    ``key``: int64 (2,), the block's row of `draw_keys`. ``rows``: int64, numbers of samples in the batch of all
    processes together. A sample's draw is a hash of its number: no state, no generator, and the same bits
    on every device, in any order, whoever else is in the batch, and inside a compiled graph.
    """
    return _mix(_mix(rows) ^ key[0]) < key[1]


def _mix(value: Tensor) -> Tensor:
    """Return a permutation of the 32-bit numbers that looks random (int64 throughout, so that nothing overflows).

    The constants were found by search: hash-prospector's list of two-round functions with the least bias.
    """
    value = ((value ^ (value >> 16)) * 0x21F0AAAD) & _LOW
    value = ((value ^ (value >> 15)) * 0x735A2D97) & _LOW
    return value ^ (value >> 15)


def draw_subset(keep: int, count: int, seed: int, step: int) -> list[bool]:
    """Draw which ``keep`` of ``count`` blocks stay: every subset of that size is as likely. True = stays."""
    order = torch.randperm(count, generator=generator("subset", seed, step))
    stays = torch.zeros(count, dtype=torch.bool)
    stays[order[:keep]] = True
    return stays.tolist()
