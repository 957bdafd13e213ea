"""Values that change over training: pure functions of the optimizer step, and of the block's place.

A schedule is any ``step -> float``, step counted from 0. The ones here are plain frozen data, so that a
method that has one can be copied, pickled and printed. ``drop_prob=`` and ``epsilon=`` take a number or a schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from resect.errors import InputError, unknown

Schedule: TypeAlias = Callable[[int], float]
Rule: TypeAlias = "Literal['uniform', 'linear', 'linear-from-zero'] | Sequence[float]"
RULES = ("uniform", "linear", "linear-from-zero")


@dataclass(frozen=True)
class Constant:
    """``value`` at every step."""

    value: float

    def __call__(self, step: int) -> float:
        """Return the value."""
        return self.value


@dataclass(frozen=True)
class StartAt:
    """0 before ``step``, ``value`` from it on: the ε schedule of the authors' later code (commit 685b978)."""

    value: float
    step: int

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        return self.value if step >= self.step else 0.0


@dataclass(frozen=True)
class Ramp:
    """From ``start`` to ``end`` in a straight line over the first ``steps`` steps, ``end`` from then on."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        return self.start + (self.end - self.start) * min(1.0, step / max(1, self.steps))


@dataclass(frozen=True)
class Progressive:
    """``limit · (1 − exp(−speed · step))``: progressive layer dropping (Zhang & He 2020, section 4.2).

    There the keep rate is ``θ(t) = (1 − θ̄)·exp(−γ·t) + θ̄`` with ``θ̄ = 0.5, γ = 0.001``; this is ``1 − θ(t)``
    with ``limit = 1 − θ̄`` and ``speed = γ``.
    """

    limit: float = 0.5
    speed: float = 0.001

    def __call__(self, step: int) -> float:
        """Return the value at ``step``."""
        return self.limit * (1.0 - math.exp(-self.speed * step))


def as_schedule(value: float | Schedule) -> Schedule:
    """Return ``value`` as a schedule: itself, or the constant."""
    return value if callable(value) else Constant(value)


def drop_probs(drop_prob: float, rule: Rule, count: int) -> list[float]:
    """Return the probability that each of ``count`` blocks is closed, first block first.

    - ``uniform``: ``drop_prob`` for all (LayerDrop).
    - ``linear``: ``p_l = (l/L)·drop_prob``, l = 1 … L (Huang 2016, eq. 4); the last block's is ``drop_prob``.
    - ``linear-from-zero``: ``p_l = (l/(L−1))·drop_prob``, l = 0 … L−1, the first block never drops (timm).
    - a sequence of ``count`` shares between 0 and 1, multiplied by ``drop_prob``.
    """
    if not isinstance(rule, str):
        return [drop_prob * float(share) for share in rule]
    if rule == "uniform":
        return [drop_prob] * count
    if rule == "linear":
        return [drop_prob * (place + 1) / count for place in range(count)]
    if rule == "linear-from-zero":
        return [drop_prob * place / max(1, count - 1) for place in range(count)]
    raise unknown("rule", rule, RULES)


def rule_problems(rule: Rule, count: int) -> list[str]:
    """Say what is wrong with a rule for ``count`` blocks, in sentences; nothing if it is fine."""
    if isinstance(rule, str):
        return [] if rule in RULES else [str(unknown("rule", rule, RULES))]
    if not isinstance(rule, Sequence) or len(rule) != count:
        size = len(rule) if isinstance(rule, Sequence) else rule
        return [f"rule must be one of {', '.join(RULES)} or {count} shares, one per block, not {size!r}"]
    return [
        f"rule[{place}] must be a share between 0 and 1, not {share!r}"
        for place, share in enumerate(rule)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1
    ]


def probability(name: str, schedule: Schedule, step: int) -> float:
    """Return the value of a schedule of probabilities; raises ``InputError`` outside [0, 1]."""
    value = schedule(step)
    if not 0 <= value <= 1:
        raise InputError(f"{name} must lie between 0 and 1, but its schedule gives {value!r} at step {step}.")
    return value
