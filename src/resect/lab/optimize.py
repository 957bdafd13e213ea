"""How the weights move: the optimizer and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from resect.lab.config.train import TrainConfig


def learning_rate(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of optimizer step ``step`` (from 0) of ``steps`` in the whole training.

    - one-cycle: from lr/25 up to lr over the first 30 %, down to lr/250,000 at the last step, both along half
      a cosine (the defaults of ``torch.optim.lr_scheduler.OneCycleLR``; momentum is not cycled).
    - cosine: from lr, at the end of the warm-up, down towards 0.
    - step: lr, times ``factor`` after each of ``milestones``; the defaults are those of Huang 2016.

    During ``warmup`` epochs the rate rises from near 0 to lr, by the same amount every step.
    """
    warmup = config.warmup / config.epochs * steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "one-cycle":
        peak, last = 0.3 * steps - 1, steps - 1
        if step <= peak:
            return _half_cosine(config.lr / 25, config.lr, step / peak)
        return _half_cosine(config.lr, config.lr / 25 / 1e4, (step - peak) / (last - peak))
    if config.schedule == "cosine":
        return _half_cosine(config.lr, 0.0, (step - warmup) / (steps - warmup))
    if config.schedule == "step":
        return config.lr * config.factor ** sum(step / steps >= milestone for milestone in config.milestones)
    return config.lr


def _half_cosine(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * done)) / 2


def param_groups(parameters: Iterable[nn.Parameter], config: TrainConfig) -> list[dict[str, Any]]:
    """Groups for an optimizer. ``config.decay`` "weights": matrices and filters decay, BatchNorm and biases do not."""
    decaying: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in parameters:
        if parameter.requires_grad:
            (decaying if config.decay == "all" or parameter.ndim > 1 else others).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """SGD or AdamW for the weights of ``model``."""
    groups = param_groups(model.parameters(), config)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov)
