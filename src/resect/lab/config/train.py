"""The table `train`."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from resect.lab.config.base import Config, Seed

Switch = Literal[True, False, "auto"]


class TrainConfig(Config):
    """The training. ``shift`` in pixels; ``batch_size`` per optimizer step, over all processes together.

    ``warmup``: epochs in which the rate rises in a straight line; parts of an epoch count.
    ``schedule``: "adaptive" is ε-ResNet's, which starts anew whenever more blocks are muted (`resect.AdaptiveLR`).
    ``milestones``: parts of the training after which the step schedule multiplies the rate by ``factor``.
    ``decay``: what weight decay acts on; "weights" leaves BatchNorm and biases out, as the ε-ResNet paper does.
    ``clip``: largest norm of the gradient of all weights together, a side head's too; longer ones are shortened to it.
    ``accumulate``: micro-batches that each batch is split into, for a model that is too large for the whole.
    ``precision``: "bf16" runs forward passes under autocast; weights, updates and the loss stay float32.
    ``precision``, ``channels_last``, ``compile``: "auto" takes what is fastest on this machine (see `pace`).
    ``checkpoint_minutes``: the longest time between two checkpoints, unless writing them takes 5 % of the time.
    """

    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=0.1, gt=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=1e-3, ge=0)
    decay: Literal["weights", "all"] = "weights"
    schedule: Literal["one-cycle", "cosine", "step", "constant", "adaptive"] = "one-cycle"
    warmup: float = Field(default=0.0, ge=0)
    milestones: list[float] = Field(default=[0.5, 0.75])
    factor: float = Field(default=0.1, gt=0, lt=1)
    clip: float | None = Field(default=None, gt=0)
    accumulate: int = Field(default=1, ge=1)
    shift: int = Field(default=0, ge=0)
    flip: bool = False
    precision: Literal["fp32", "bf16", "auto"] = "auto"
    channels_last: Switch = "auto"
    compile: Switch = "auto"
    tensorboard: bool = True
    checkpoint_minutes: float = Field(default=5.0, ge=0)
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits_together(self) -> TrainConfig:
        problems = []
        if self.nesterov and self.momentum == 0:
            problems.append("nesterov needs momentum above 0")
        if self.warmup and self.schedule in ("one-cycle", "adaptive"):
            problems.append(f"{self.schedule} has a warm-up of its own: leave out warmup, or choose another schedule")
        if self.warmup >= self.epochs:
            problems.append(f"warmup of {self.warmup:g} epochs leaves nothing of {self.epochs}: make it shorter")
        if not all(a < b for a, b in pairwise([0.0, *self.milestones, 1.0])):
            problems.append("milestones must rise between 0 and 1, for instance [0.5, 0.75]")
        if self.accumulate > self.batch_size:
            problems.append(f"batch_size {self.batch_size} cannot be split into {self.accumulate} micro-batches")
        if problems:
            raise ValueError("; ".join(problems))
        return self
