"""Random draws as pure functions of (seed, step): the same on every rank, after a resume, on another machine."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def generator(purpose: str, seed: int, step: int) -> torch.Generator:
    """Return a CPU generator that depends on its arguments alone; distinct purposes give unrelated draws."""
    digest = hashlib.sha256(f"{purpose}/{seed}/{step}".encode()).digest()
    # CPU generators use the low 32 bits of a seed.
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def draw_closed(probs: list[float], seed: int, step: int) -> list[bool]:
    """Draw which blocks are closed at ``step``: block l with probability ``probs[l]``, independently."""
    uniform = torch.rand(len(probs), dtype=torch.float64, generator=generator("closed", seed, step))
    return (uniform < torch.tensor(probs, dtype=torch.float64)).tolist()


def draw_dropped(probs: list[float], samples: int, seed: int, step: int) -> Tensor:
    """Draw, per block and sample, whether the branch is dropped: bool (blocks, samples), on the CPU."""
    shape = (len(probs), samples)
    uniform = torch.rand(shape, dtype=torch.float64, generator=generator("dropped", seed, step))
    return uniform < torch.tensor(probs, dtype=torch.float64)[:, None]


def draw_subset(keep: int, count: int, seed: int, step: int) -> list[bool]:
    """Draw which ``keep`` of ``count`` blocks stay: every subset of that size is as likely. True = stays."""
    order = torch.randperm(count, generator=generator("subset", seed, step))
    stays = torch.zeros(count, dtype=torch.bool)
    stays[order[:keep]] = True
    return stays.tolist()
