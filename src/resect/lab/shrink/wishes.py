"""What ``resect shrink`` is asked for, and all that can be wrong with it before anything is opened."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from resect.blocks.plan import Plan
from resect.errors import ResectError, check_all
from resect.lab.shrink.places import export_mistakes, written
from resect.shrink.costs import share_mistakes
from resect.shrink.rank import option_mistakes
from resect.shrink.ranking import CONTROLS


@dataclass(frozen=True)
class Wishes:
    """What ``resect shrink`` was asked for."""

    n: int | None = None
    names: tuple[str, ...] | None = None
    plan: Plan | None = None
    """What a file says."""
    fewer: dict[str, float] = field(default_factory=dict)
    at_most_worse: float | None = None
    keep: tuple[str, ...] = ()
    by: str = "lesion"
    search: str = "once"
    unit: str | None = None
    limit: int = 1000
    replace: bool = False
    compact: bool = False
    recover: int = 0
    """Epochs, after every round."""
    recover_by: str | None = None
    rounds: int = 1

    @property
    def ranked(self) -> bool:
        """Whether blocks are to be ranked."""
        return self.n is not None or bool(self.fewer) or self.at_most_worse is not None

    @property
    def needs_data(self) -> bool:
        """Whether the choice, or what comes after the cut, looks at data."""
        looks = self.ranked and (self.by not in CONTROLS or self.at_most_worse is not None)
        return looks or self.replace or self.recover > 0

    @property
    def way(self) -> str:
        """How what is left is healed."""
        return self.recover_by or "distil"

    @property
    def epochs(self) -> int:
        """How many epochs of recovery there are in all."""
        return self.recover * self.rounds


def read_wishes(
    *,
    fewer: str = "",
    target_latency: float | None = None,
    keep: str = "",
    names: str | None = None,
    plan: Path | None = None,
    out: Path | None = None,
    export: Path | None = None,
    report: Path | None = None,
    scratch: bool = False,
    dry: bool = False,
    resume: bool = False,
    **others: Any,
) -> Wishes:
    """Read ``latency=0.3,flops=0.2``, ``layer1.0,layer2.0``, the share of latency to be left, and the file of a plan.

    Raises ``InputError`` with everything that is wrong with them, with one another, and with the places to write to.
    """
    shares, wrong = _shares(fewer, target_latency)
    parts = None if names is None else _listed(names)
    wishes = Wishes(fewer=shares, keep=_listed(keep), names=parts, **others)
    wrong += [*_choice(wishes, plan is not None), *_recovery(wishes)]
    if resume and not wishes.recover:
        wrong.append("--resume goes on with a recovery that was stopped, and there is none: add --recover EPOCHS.")
    if scratch and report is None:
        wrong.append("--from-scratch is a row of the report: add --report FOLDER.")
    wrong += [] if dry else written(out, export, report, scratch=scratch, recover=wishes.recover > 0, resume=resume)
    wrong += export_mistakes(export)
    if plan is not None:
        try:
            wishes = replace(wishes, plan=Plan.load(plan / "plan.json" if plan.is_dir() else plan))
        except ResectError as error:
            wrong.append(str(error))
    check_all(wrong, "resect shrink")
    return wishes


def _listed(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (name.strip() for name in text.split(","))))


def _shares(fewer: str, target_latency: float | None) -> tuple[dict[str, float], list[str]]:
    shares: dict[str, float] = {}
    wrong = []
    for part in _listed(fewer):
        name, _, share = part.partition("=")
        try:
            shares[name.strip()] = float(share)
        except ValueError:
            wrong.append(f"--fewer {part!r} must look like latency=0.3, flops=0.3 or parameters=0.3")
    wrong += [f"--fewer: {mistake}" for mistake in share_mistakes(shares)]
    if target_latency is not None:
        if "latency" in shares:
            wrong.append("--target-latency and --fewer latency=… say the same: give one")
        if not 0 < target_latency < 1:
            wrong.append(
                f"--target-latency is the share of latency that is left, 0.7 for 30 % less, not {target_latency:g}"
            )
        shares["latency"] = 1 - target_latency
    return shares, wrong


def _choice(wishes: Wishes, planned: bool) -> Iterator[str]:
    worse = wishes.at_most_worse
    if worse is not None and not 0 <= worse < math.inf:
        yield f"--at-most-worse is points of error that it may cost, from 0 up, not {worse:g}"
    if wishes.names == ():
        yield "--names names no block: resect find MODEL shows what they are called"
    yield from option_mistakes(wishes.by, wishes.unit, wishes.search)
    if sum((wishes.ranked, wishes.names is not None, planned)) > 1:
        yield (
            "Give one of --names, --plan, and what is to be ranked for: --blocks, --fewer, --target-latency, "
            "--at-most-worse."
        )
    elif not wishes.ranked and (wishes.keep or wishes.by != "lesion" or wishes.search != "once" or wishes.unit):
        yield (
            "--keep, --by, --search and --unit are about ranking. Say how much shall go: --blocks N, "
            "--fewer flops=0.3, --target-latency 0.7 or --at-most-worse 0.5."
        )


def _recovery(wishes: Wishes) -> Iterator[str]:
    if wishes.recover_by is not None and not wishes.recover:
        yield f"--recover-by {wishes.recover_by} says how, and nothing how long: add --recover EPOCHS."
    if wishes.rounds == 1:
        return
    if not wishes.recover:
        yield "--rounds cuts a little, heals, and cuts again, and nothing heals: add --recover EPOCHS."
    if wishes.n is None or wishes.fewer or wishes.at_most_worse is not None:
        yield "--rounds shares out a number: it goes with --blocks N, without other wishes, names or a plan."
    elif wishes.rounds > wishes.n:
        yield f"--rounds {wishes.rounds} is more than --blocks {wishes.n}: every round cuts at least one."
    if wishes.replace:
        yield "--rounds and --replace do not go together: leave one of them out."
