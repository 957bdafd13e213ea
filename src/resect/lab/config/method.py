"""The table `method`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from resect.lab.config.base import Config


class MethodConfig(Config):
    """A training method on the residual blocks: all of them, or those with an identity shortcut."""

    name: Literal["epsilon-gate"] = "epsilon-gate"
    epsilon: float = Field(default=3.0, ge=0)
    skip_muted_after: int | None = Field(default=None, ge=1)
    settle_after: int | None = Field(default=None, ge=1)
    blocks: Literal["all", "identity"] = "all"
