"""Which kind of iteration a step of ResidualDroppath is, and whose draw it uses: pure functions of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Kind = Literal["plain", "drop", "dropped-only"]


class Phase(NamedTuple):
    """``kind`` of one step, and the step whose draw says which blocks are dropped."""

    kind: Kind
    draw_step: int


@dataclass(frozen=True)
class Alternation:
    """``warmup`` plain steps, then over and over ``drop_steps·period`` drop steps and ``period`` dropped-only steps.

    With ``period=1`` the kinds alternate ``drop_steps`` to 1; a period of an epoch's steps alternates by epochs.
    The j-th dropped-only step of a round uses the draw of the last drop step of the j-th group of ``drop_steps``.
    """

    warmup: int = 0
    drop_steps: int = 1
    period: int = 1

    @property
    def cycle(self) -> int:
        """Steps until the pattern repeats."""
        return (self.drop_steps + 1) * self.period

    def phase(self, step: int) -> Phase:
        """Return the phase of ``step`` (from 0)."""
        if step < self.warmup:
            return Phase("plain", step)
        place = (step - self.warmup) % self.cycle
        number = place - self.drop_steps * self.period  # of the dropped-only step in its round, if it is one
        if number < 0:
            return Phase("drop", step)
        return Phase("dropped-only", step - place + (number + 1) * self.drop_steps - 1)

    def repeats(self, step: int) -> int:
        """Return how many steps, from ``step`` on, belong to one drop step and its dropped-only step."""
        return 1 if step < self.warmup else self.cycle - (step - self.warmup) % self.cycle

    def halfway(self, step: int) -> bool:
        """Return whether ``step`` is among those of one drop step and its dropped-only step, but not the first."""
        return step >= self.warmup and self.repeats(step) < self.cycle
