"""Learning rates multiplied for one optimizer step."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer


class Rates:
    """Multiplies an optimizer's learning rates by ``factor`` until ``restore()``."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self._before: list[tuple[dict[str, Any], Any]] = []

    def scale(self, optimizer: Optimizer) -> None:
        """Multiply the rate of every parameter group."""
        if self.factor != 1:
            self._before += [(group, group["lr"]) for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * self.factor

    def restore(self) -> None:
        """Give all rates back."""
        for group, rate in self._before:
            group["lr"] = rate
        self._before = []
