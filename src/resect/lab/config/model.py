"""The table `model`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from resect.lab.config.base import Config


class ModelConfig(Config):
    """A name for `registry.build`, and its options. Channels and classes follow the data unless given.

    ``start``: the folder of a run of this model, or of a cut one, whose weights and shape training begins with.
    """

    name: str
    options: dict[str, Any] = Field(default={})
    start: str | None = None
