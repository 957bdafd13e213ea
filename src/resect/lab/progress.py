"""What a training tells while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from resect.lab.methods import Method


@dataclass(frozen=True)
class Progress:
    """After an optimizer step: steps done, steps in all; after an epoch also its row of the history."""

    step: int
    steps: int
    method: Method
    row: dict[str, Any] | None = None

    def open_blocks(self) -> str:
        """``43/54 blocks open`` in this step, or nothing without a method. Waits for the device: ask now and then."""
        count, blocks = getattr(self.method, "open_blocks", None), getattr(self.method, "blocks", ())
        return "" if count is None or not len(blocks) else f"{count}/{len(blocks)} blocks open"


Tell = Callable[[Progress], None]
