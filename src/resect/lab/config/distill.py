"""The table `distill`: a trained net as the teacher, and `resect.Distillation`'s options."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from resect.lab.config.base import Config


class DistillConfig(Config):
    """``teacher``: the folder of a finished run, or of a cut model. The rest is as in `resect.Distillation`."""

    teacher: str
    logits: float = Field(default=1.0, ge=0)
    temperature: float = Field(default=4.0, gt=0)
    features: list[str] = Field(default=[])
    weight: float = Field(default=1.0, ge=0)

    def options(self) -> dict[str, Any]:
        """The options for `resect.Distillation`."""
        return self.model_dump(exclude={"teacher"})
