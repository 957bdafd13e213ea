"""A plan that promises time is cut and timed, and more goes where it falls short."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import resect
from resect.errors import InputError
from resect.lab.shrink.candidate import measured, meeting, saved


class Ladder:
    """Plans of 1 to 8 blocks, of which each is said to save a tenth."""

    def choose(self, *, fewer, costs, n=None):
        share = (fewer or {}).get("latency", 0.1)
        count = next((k for k in range(1, 9) if k / 10 >= share - 1e-9), None)
        if count is None:
            raise InputError("out of reach")
        blocks = tuple(SimpleNamespace(name=f"block {place}") for place in range(count))
        return resect.Plan(blocks, "size", {}, {"saved": {"latency": count / 10}})


def timed(share_of_each):
    seen = []

    def measure(names):
        seen.append(len(names))
        row = {"whole": (10.0, 0.1), "cut": (10.0 * (1 - share_of_each * len(names)), 0.1)}
        return {"1": row, "32": {"whole": (10.0, 0.1), "cut": (0.0, 0.1)}}

    return measure, seen


def test_what_falls_short_when_timed_loses_more():
    (measure, seen), said = timed(0.08), []
    plan = meeting(Ladder(), {"latency": 0.3}, measure, said.append, costs=None, n=None)
    assert seen == [3, 4]  # 24 % at batch 1, then 32 %
    assert saved(plan.evidence["measured_ms"]) == pytest.approx(0.32)
    assert len(said) == 1
    assert "30.0% less latency was predicted; cut and timed it is 24.0%" in said[0]


def test_a_plan_that_keeps_its_promise_is_timed_once():
    (measure, seen), said = timed(0.1), []
    assert len(meeting(Ladder(), {"latency": 0.3}, measure, said.append, costs=None).blocks) == 3
    assert (seen, said) == ([3], [])


def test_nothing_is_timed_where_no_latency_was_wished_for():
    measure, seen = timed(0.1)
    meeting(Ladder(), {"flops": 0.3}, measure, print, costs=None)
    assert seen == []


def test_what_cannot_be_reached_when_timed_says_what_can():
    measure, seen = timed(0.08)
    with pytest.raises(InputError, match=r"no plan saves 70\.0% .* the last one saved 64\.0%.*--target-latency 0\.36"):
        meeting(Ladder(), {"latency": 0.7}, measure, [].append, costs=None)
    assert seen == [7, 8]
    measure, seen = timed(0.0)
    with pytest.raises(InputError, match=r"Cut and timed, .* --target-latency 1\.00"):
        meeting(Ladder(), {"latency": 0.1}, measure, [].append, costs=None)
    with pytest.raises(InputError, match=r"^out of reach$"):
        meeting(Ladder(), {"latency": 0.95}, measure, [].append, costs=None)


@pytest.mark.parametrize("training", [True, False])
def test_timing_leaves_the_model_as_it_was(training):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.f(x)

    model, x = nn.Sequential(Block(), Block()).train(training), torch.randn(2, 4)
    blocks = resect.find_blocks(model, x)
    before = [parameter.clone() for parameter in model.parameters()]
    found = measured(model, blocks, blocks.names[:1], x, (1, 3), 2)
    assert list(found) == ["1", "3"]
    assert all(ms > 0 for row in found.values() for ms, _ in row.values())
    assert model.training is training
    assert [type(module) for module in model] == [Block, Block]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
