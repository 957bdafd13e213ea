"""``optimizer.step(closure)``: the gradients come to be while the optimizer steps (Lightning trains this way)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.optim import LBFGS, Optimizer

from resect.errors import AttachError


class Closure:
    """A closure, and then a look at its gradients before the optimizer uses them.

    Right where the optimizer runs the closure once, before it moves a weight, as all of ``torch.optim`` do except
    LBFGS. Any other raises ``AttachError``: LBFGS at once, one that moves weights first when it calls.
    """

    def __init__(self, closure: Callable[[], Any], optimizer: Optimizer, look: Callable[[], None], name: str) -> None:
        self.closure, self.optimizer, self.look, self.name = closure, optimizer, look, name
        self.called = False
        self._before = self._versions()
        if isinstance(optimizer, LBFGS):
            raise self._refused("calls its closure several times in one step")

    def __call__(self) -> Any:
        """Compute the gradients, then look at them."""
        if self.called or self._versions() != self._before:
            raise self._refused("moved weights in this step before it called its closure")
        self.called = True
        result = self.closure()
        self.look()
        return result

    def check_called(self) -> None:
        """Raise ``AttachError`` if the optimizer has stepped without calling."""
        if not self.called:
            raise self._refused("stepped without calling its closure")

    def _versions(self) -> list[int]:
        return [parameter._version for group in self.optimizer.param_groups for parameter in group["params"]]

    def _refused(self, what: str) -> AttachError:
        return AttachError(
            f"{type(self.optimizer).__name__} {what}, so {self.name} cannot look at the gradients in between. Use an "
            "optimizer that calls it once and first (all others of torch.optim), or call backward() yourself and "
            "optimizer.step() without a closure."
        )
