"""The learning rate of ε-ResNet: it starts anew whenever more blocks have been muted.

Yu et al. 2018 and the authors' LearningRateSetter.py: a muted block withers by weight decay at a high learning rate
only, and the net that is left needs a schedule of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from resect.errors import InputError

SCHEDULE = {0: 1.0, 82: 0.1, 123: 0.01, 300: 0.002}
"""CIFAR, from the first epoch: factor on the optimizer's rate (0.1 there) after this many epochs."""
RESTART = {0: 1.0, 41: 0.1, 61: 0.01, 150: 0.002}
"""CIFAR, from a restart."""


class Counts(Protocol):
    """What is asked of the method."""

    @property
    def muted_average(self) -> float:
        """The running mean of the number of muted blocks."""


class AdaptiveLR(LRScheduler):
    """Start the schedule anew at the end of an epoch in which the mean count of muted blocks grew by ``growth``.

    Call ``step()`` at the end of every epoch. With growth at the end of epoch N (counted from 1) the rate is the
    optimizer's own again in epoch N + 1, a tenth of it after epoch N + 41, a hundredth after N + 61.

    Parameters
    ----------
    optimizer: its initial rate is the one that the factors multiply.
    method: an ``EpsilonGate``; its ``muted_average`` is compared from epoch end to epoch end.
    schedule: epochs since the start -> factor, until the first restart (published: ``SCHEDULE``).
    restart: epochs since the latest restart -> factor (published: ``RESTART``; SVHN 0, 10, 14, 25).
    growth: how many blocks more make a restart; the paper's is 1.

    Raises ``InputError`` if a schedule does not begin at epoch 0 or ``growth`` is not positive.

    >>> scheduler = resect.AdaptiveLR(optimizer, method)
    >>> for epoch in range(1000):
    ...     train_one_epoch(...)
    ...     scheduler.step()
    """

    def __init__(
        self,
        optimizer: Optimizer,
        method: Counts,
        *,
        schedule: Mapping[int, float] = SCHEDULE,
        restart: Mapping[int, float] = RESTART,
        growth: float = 1.0,
    ) -> None:
        if not hasattr(method, "muted_average"):
            raise InputError(f"AdaptiveLR(optimizer, method) follows an EpsilonGate, not a {type(method).__name__}.")
        for name, table in (("schedule", schedule), ("restart", restart)):
            if 0 not in table or min(table) < 0:
                raise InputError(f"{name} must give a factor from epoch 0 on, and has epochs {sorted(table)}.")
        if not growth > 0:
            raise InputError(f"growth must be above 0, not {growth!r}.")
        self.method = method
        self.schedule, self.restart, self.growth = dict(schedule), dict(restart), growth
        self.restarts: list[int] = []
        self._count = method.muted_average
        self._made = False
        super().__init__(optimizer)
        self._made = True

    def step(self, epoch: int | None = None) -> None:
        """End an epoch: look at the count, start anew if it grew, set the rate of the next epoch."""
        if self._made:  # the constructor of the base class takes a step of its own
            count = self.method.muted_average  # the same on all processes
            if count - self._count >= self.growth:
                self.restarts.append(self.last_epoch + 1)
            self._count = count
        super().step()

    def get_lr(self) -> list[Any]:
        """Return the rate of every parameter group for the epoch to come."""
        table, since = (self.restart, self.restarts[-1]) if self.restarts else (self.schedule, 0)
        factor = table[max(start for start in table if start <= self.last_epoch - since)]
        return [base * factor for base in self.base_lrs]

    def state_dict(self) -> dict[str, Any]:
        """Return epochs, restarts and the last count: plain numbers."""
        return {
            "last_epoch": self.last_epoch,
            "restarts": list(self.restarts),
            "count": self._count,
            "base_lrs": list(self.base_lrs),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; the optimizer's rates are those of its own state."""
        self.last_epoch, self.restarts = int(state["last_epoch"]), list(state["restarts"])
        self._count, self.base_lrs = float(state["count"]), list(state["base_lrs"])
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]
