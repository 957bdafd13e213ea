"""Feature reuse on a spiral: what the units of 32 residual blocks respond to, and which blocks say the same again.

An experiment of our own. It is inspired by a second-hand, unverified description of Park, arXiv 2411.09475 (2024): a
two-class spiral, up to 32 layers, maps of single units, similar features in non-consecutive layers. It reproduces
nothing: neither the paper's settings nor its numbers were available to us.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import resect
from resect.train.method import Method

METHODS: dict[str, Callable[..., Method] | None] = {
    "plain": None,
    # Not scaled, as in ResidualDroppath's drop steps: the two differ in the dropped-only steps alone.
    "stochastic depth": partial(resect.StochasticDepth, drop_prob=0.5, scaling="none"),
    "ResidualDroppath": partial(resect.ResidualDroppath, drop_prob=0.5, scaling="none"),
}
"""The three ways to train; blocks close with a probability that rises linearly over depth to 0.5."""

UNTRAINED = "untrained"


@dataclass(frozen=True)
class Setting:
    """The net and its training; ``points`` to train on, and as many again, times two, to test on."""

    blocks: int = 32
    width: int = 8
    steps: int = 500
    points: int = 512
    lr: float = 0.03


def spiral(points: int, seed: int, *, turns: float = 1.75, noise: float = 0.02) -> tuple[Tensor, Tensor]:
    """Return points (N, 2) on two arms of a spiral, with normal noise on both coordinates, and their classes (N,)."""
    draw = torch.Generator().manual_seed(seed)
    radius = torch.rand(points, generator=draw)
    label = torch.arange(points) % 2
    angle = 2 * math.pi * turns * radius + math.pi * label
    arm = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    return arm + noise * torch.randn(points, 2, generator=draw), label


class Block(nn.Module):
    """``x + tanh(linear(norm(x)))``: without the norm, nets of 32 blocks often do not learn the spiral."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, width), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream after this block."""
        return x + self.branch(x)


def build(setting: Setting, seed: int) -> nn.Sequential:
    """Return the untrained net: two coordinates in, one value per class out."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = [Block(setting.width) for _ in range(setting.blocks)]
        return nn.Sequential(nn.Linear(2, setting.width), *blocks, nn.Linear(setting.width, 2))


def train(make: Callable[..., Method] | None, setting: Setting, seed: int) -> nn.Sequential:
    """Return the net of ``seed`` in eval mode, trained on all points in each of ``setting.steps`` steps.

    ``make``: the method, or None. The running statistics of the norms are taken anew at the end, whatever the method:
    those of a net that drops branches describe its thinned forms.
    """
    x, y = spiral(setting.points, seed)
    model = build(setting, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=setting.lr, fused=True)
    blocks = resect.find_blocks(model, x)
    method = make(model, blocks, optimizer=optimizer, seed=seed) if make else None
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.lr, total_steps=setting.steps)
    with method or nullcontext():
        for _ in range(setting.steps):
            if method:
                method.begin_step()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    resect.recalibrate(model, [(x, y)])
    return model.eval()


def fresh_error(model: nn.Module, setting: Setting, seed: int) -> float:
    """Return the share of fresh points that the net gets wrong."""
    x, y = spiral(2 * setting.points, seed + 1_000_000)
    with torch.no_grad():
        return float((model(x).argmax(dim=1) != y).double().mean())


def train_all(setting: Setting, seed: int) -> dict[str, nn.Sequential]:
    """Return the nets of ``seed`` by name: before training, and trained with each of ``METHODS`` from there."""
    untrained = build(setting, seed)
    resect.recalibrate(untrained, [spiral(setting.points, seed)])
    return {UNTRAINED: untrained.eval()} | {name: train(make, setting, seed) for name, make in METHODS.items()}
