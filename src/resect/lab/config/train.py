"""The table `train`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from resect.lab.config.base import Config


class TrainConfig(Config):
    """The training. ``shift`` in pixels; ``batch_size`` over all processes together.

    ``decay``: what weight decay acts on; "weights" leaves BatchNorm and biases out, as the ε-ResNet paper does.
    ``precision``: "bf16" runs forward passes under autocast; weights, updates and the loss stay float32.
    """

    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=128, ge=1)
    lr: float = Field(default=0.1, gt=0)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=1e-3, ge=0)
    decay: Literal["weights", "all"] = "weights"
    schedule: Literal["one-cycle", "cosine", "step", "constant"] = "one-cycle"
    shift: int = Field(default=0, ge=0)
    flip: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    channels_last: bool = False
    tensorboard: bool = False
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _nesterov(self) -> TrainConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum above 0")
        return self
