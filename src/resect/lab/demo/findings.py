"""What the demo's steps share: the trained nets, what was found out about them, where progress goes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from resect.blocks.block import Blocks
from resect.blocks.plan import Plan
from resect.lab.data import ImageData
from resect.lab.recipe import Recipe


class Display(Protocol):
    """Where progress goes."""

    def stage(self, text: str) -> None:
        """Say what happens now."""

    def steps(self, name: str, done: int, total: int) -> None:
        """Say how far a named piece of work is."""


@dataclass
class Findings:
    """What the demo found out: rows per figure, tables, numbers."""

    figures: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


@dataclass
class Nets:
    """The trained nets of the demo and the data they are tested on."""

    recipe: Recipe
    data: ImageData
    images: Tensor
    labels: Tensor
    example: Tensor
    folders: dict[str, Path]
    plain: nn.Module
    gated: nn.Module
    blocks: Blocks
    plan: Plan
