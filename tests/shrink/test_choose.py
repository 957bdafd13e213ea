"""Choosing from a ladder, against looking at every rung."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net

import resect
from resect.blocks.plan import Plan
from resect.errors import InputError
from resect.shrink.costs import BlockCosts
from resect.shrink.ranking import Ranking, Rung
from resect.shrink.search import worth
from resect.shrink.timed import Latency

pytestmark = pytest.mark.core

NET = Net((False,) * 5).eval()
BLOCKS = resect.find_blocks(NET, torch.randn(2, 5))
NAMES = BLOCKS.names
shares = st.lists(st.floats(0.01, 0.15), min_size=5, max_size=5)


def costs_of(flops, *latencies):
    each = {
        "flops": dict(zip(NAMES, [round(1e6 * f) for f in flops], strict=True)),
        "parameters": dict.fromkeys(NAMES, 10),
    }
    timed = {
        batch: Latency(torch.tensor([1 - sum(ms), *ms], dtype=torch.float64), torch.zeros(6, dtype=torch.float64))
        for batch, ms in enumerate(latencies, start=1)
    }
    return BlockCosts(tuple(NAMES), {"flops": 10**6, "parameters": 100}, each, timed)


def ladder_of(sets, values=None):
    rungs = tuple(Rung(tuple(s), None if values is None else values[n]) for n, s in enumerate(sets))
    scores = dict(zip(NAMES, range(5), strict=True))
    return Ranking(BLOCKS, "lesion", scores, {n: (n,) for n in NAMES}, rungs, "greedy", "block", "top1", 0.0)


@settings(max_examples=60, deadline=None)
@given(
    order=st.permutations(NAMES),
    values=st.lists(st.floats(-1, 5), min_size=5, max_size=5),
    flops=shares,
    first=shares,
    second=shares,
    want=st.dictionaries(st.sampled_from(["flops", "latency", "parameters"]), st.floats(0.05, 0.6)),
    worse=st.none() | st.floats(0, 4),
    kept=st.sets(st.sampled_from(NAMES), max_size=1),
)
def test_the_shortest_rung_that_meets_every_wish(order, values, flops, first, second, want, worse, kept):
    ranking = ladder_of([order[: n + 1] for n in range(5)], values)
    costs = costs_of(flops, first, second)
    if not want and worse is None:
        return
    if kept and worse is not None:
        kept = set()  # what was not measured is another test's
    met = []
    for n in range(1, 6):
        gone = [name for name in order[:n] if name not in kept]
        if not gone:
            continue
        parts = {
            "flops": sum(round(1e6 * f) for name, f in zip(NAMES, flops, strict=True) if name in gone) / 1e6,
            "parameters": len(gone) / 10,
            "latency": min(sum(m for name, m in zip(NAMES, ms, strict=True) if name in gone) for ms in (first, second)),
        }
        light = all(parts[quantity] >= share - 1e-9 for quantity, share in want.items())
        if light and (worse is None or values[n - 1] <= worse + 1e-9):
            met.append(gone)
    options = {"fewer": want or None, "at_most_worse": worse, "keep": kept, "costs": costs}
    if not met:
        with pytest.raises(InputError, match=r"Out of reach.*nearest"):
            ranking.choose(**options)
        return
    plan = ranking.choose(**options)
    assert set(plan.names) == set(met[0] if want else met[-1])
    assert Plan.from_json(plan.to_json()) == plan


@settings(max_examples=40, deadline=None)
@given(scores=st.lists(st.floats(-2, 5), min_size=5, max_size=5), first=shares, share=st.floats(0.05, 0.3))
def test_units_scored_once_go_by_what_is_missed_per_share_saved(scores, first, share):
    ranking = ladder_of([NAMES[: n + 1] for n in range(5)])
    ranking = dataclasses.replace(ranking, search="once", scores=dict(zip(NAMES, scores, strict=True)))
    costs = costs_of([0.1] * 5, first)
    key = {name: (worth(s, costs.gain([name])), -n) for n, (name, s) in enumerate(zip(NAMES, scores, strict=True))}
    order, gone = sorted(NAMES, key=key.get), []
    while order and sum(m for name, m in zip(NAMES, first, strict=True) if name in gone) < share - 1e-9:
        gone.append(order.pop(0))
    if sum(m for name, m in zip(NAMES, first, strict=True) if name in gone) < share - 1e-9:
        return
    try:
        plan = ranking.choose(fewer={"latency": share}, costs=costs)
    except InputError:
        raise AssertionError("within reach") from None
    assert set(plan.names) == set(gone)


def test_the_nearest_that_can_be_reached_is_offered():
    ranking = ladder_of([NAMES[: n + 1] for n in range(5)], [0.1, 0.2, 0.9, 2.0, 3.0])
    costs = costs_of([0.1] * 5, [0.15] * 5)
    with pytest.raises(InputError, match=r"90% less latency.*the most that can go: n=5 with 75.0% less latency"):
        ranking.choose(fewer={"latency": 0.9}, costs=costs)
    with pytest.raises(
        InputError, match=r"at most 0.5 worse: n=2 with 20.0% less flops, \+0.2 top1; of those light.*n=4"
    ):
        ranking.choose(fewer={"flops": 0.4}, at_most_worse=0.5, costs=costs)
    assert ranking.choose(at_most_worse=1).evidence["value"] == 0.9
    assert len(ranking.choose(n=2, at_most_worse=0.5).blocks) == 2
    with pytest.raises(InputError, match="Out of reach"):
        ranking.choose(n=4, at_most_worse=0.5)


def test_wishes_that_make_no_sense_are_refused():
    ranking = ladder_of([NAMES[: n + 1] for n in range(5)])
    costs = costs_of([0.1] * 5, [0.1] * 5)
    for options, message in (
        ({}, "needs n=, fewer= or at_most_worse="),
        ({"n": 0}, "whole number from 1 to 5"),
        ({"n": True}, "whole number from 1 to 5"),
        ({"fewer": {"latency": 30}}, "above 0 and below 1"),
        ({"fewer": {"latncy": 0.3, "flops": 0}}, "(?s)did you mean 'latency'.*flops: 0 must"),
        ({"fewer": {"speed": 0.5}}, "'speed' is none of"),
        ({"fewer": 0.3}, "must name shares"),
        ({"at_most_worse": -1}, "from 0 up"),
        ({"at_most_worse": 1}, "not every set on this ladder was measured"),
        ({"n": 1, "keep": ["layers.9"]}, "Did you mean"),
        ({"n": 1, "keep": NAMES}, "Nothing is left to go"),
    ):
        with pytest.raises(InputError, match=message):
            ranking.choose(**{"costs": costs} | options)
    with pytest.raises(InputError, match="pass costs="):
        ranking.choose(fewer={"flops": 0.1})
    with pytest.raises(InputError, match="hold no latency"):
        ranking.choose(fewer={"latency": 0.1}, costs=costs_of([0.1] * 5))
    alien = dataclasses.replace(costs, names=tuple(f"other.{n}" for n in range(5)))
    with pytest.raises(InputError, match="block in these costs"):
        ranking.choose(fewer={"latency": 0.1}, costs=alien)


def test_what_chose_the_first_blocks_is_not_said_of_the_next():
    x = torch.randn(2, 5)
    first = ladder_of([NAMES[: n + 1] for n in range(5)], [0.0] * 5).choose(n=1, costs=costs_of([0.1] * 5, [0.1] * 5))
    once = resect.remove(NET, BLOCKS, first, compact=True)
    assert {"saved", "latency_ms", "value", "units"} < once.resect_plan.evidence.keys()
    left = resect.find_blocks(once, x)
    twice = resect.remove(once, left, left.names[:1])
    assert twice.resect_plan.evidence.keys() == {"compact"}
    assert twice.resect_plan.names == NAMES[:2]


def test_keep_leaves_the_others_in_their_order():
    ranking = ladder_of([NAMES[: n + 1] for n in range(5)], [1.0] * 5)
    assert ranking.choose(n=2, keep=NAMES[0]).names == NAMES[1:3]
    jumping = ladder_of([NAMES[:1], NAMES[1:3], NAMES[2:5]])
    assert jumping.choose(n=2, keep=["layers.0"]).names == NAMES[1:3]
    with pytest.raises(InputError, match=r"no set of 1 blocks.*nearest has 2"):
        jumping.choose(n=1, keep="layers.0")
