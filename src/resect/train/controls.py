"""The controls of ResidualDroppath, ready to compare with: same blocks, same drop probabilities, same steps.

What an iteration trained on dropped parts alone adds can only be said against nets trained with each of its
ingredients: none, dropping, more steps, other parts, no dropping at all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from resect.blocks.gate import Which, resolve
from resect.errors import InputError, check_all, unknown
from resect.train.method import Method
from resect.train.problems import number_problems
from resect.train.random_subset import RandomSubset
from resect.train.residual_droppath import ResidualDroppath
from resect.train.schedules import Rule, Schedule, drop_probs, rule_problems
from resect.train.stochastic_depth import StochasticDepth


def _subset(
    model: nn.Module, blocks: Which, *, drop_prob: float | Schedule, rule: Rule, **options: Any
) -> RandomSubset:
    """As many blocks learn as run in a drop step on average."""
    options.pop("own_drop", None)  # it leaves no branch out
    blocks = resolve(model, blocks)
    problems = [*number_problems("drop_prob", drop_prob), *rule_problems(rule, len(blocks))]
    check_all(problems, "RandomSubset as a control")
    if callable(drop_prob):
        raise InputError("The control 'random-subset' lets a fixed number of blocks learn: drop_prob must be a number.")
    kept = len(blocks) - sum(drop_probs(drop_prob, rule, len(blocks)))
    return RandomSubset(model, blocks, keep=round(kept), **options)


CONTROLS: dict[str, Callable[..., Method]] = {
    "droppath-only": lambda model, blocks, **options: StochasticDepth(model, blocks, scaling="none", **options),
    "full-steps": lambda model, blocks, **options: ResidualDroppath(model, blocks, update="all", **options),
    "fresh-mask": lambda model, blocks, **options: ResidualDroppath(model, blocks, mask="fresh", **options),
    "random-subset": _subset,
}
"""Control -> how it is made:

- ``droppath-only``: every step is a drop step.
- ``full-steps``: the dropped-only steps train all parameters.
- ``fresh-mask``: the dropped-only steps train blocks of a draw of their own.
- ``random-subset``: the full net runs in every step, and as many random blocks learn as a drop step runs on average.

The fifth control, ``plain``, is training without a method.
"""


def droppath_control(
    name: str,
    model: nn.Module,
    blocks: Which,
    *,
    drop_prob: float | Schedule = 0.5,
    rule: Rule = "linear",
    **options: Any,
) -> Method:
    """Return the control ``name`` of ``CONTROLS`` on the blocks; ``seed`` and ``optimizer`` as for any method.

    Raises ``InputError`` for an unknown name, with the nearest valid one.
    """
    if name not in CONTROLS:
        raise unknown("control", name, CONTROLS)
    return CONTROLS[name](model, blocks, drop_prob=drop_prob, rule=rule, **options)
