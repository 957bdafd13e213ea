"""The table `data`."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from resect.lab.config.base import Config


class DataConfig(Config):
    """A name for `data.load`, and its options."""

    name: str = "digits"
    options: dict[str, Any] = Field(default={})
