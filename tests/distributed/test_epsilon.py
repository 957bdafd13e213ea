"""The ε-gate of several processes: one decision for all, or each its own, and the same counts everywhere."""

from __future__ import annotations

import pytest
import small
import torch
import torch.distributed as dist
from torch import nn

import resect
from resect.blocks.response import largest_response, relative_response
from resect.errors import InputError

pytestmark = pytest.mark.core
NEVER = {"muted_at_start": "allow"}


def counted(options, steps=6):
    """Train on batches whose parts differ in size; return everything that is counted, and the collectives of a step."""
    net, blocks = small.chain()
    gate = resect.EpsilonGate(net, blocks, **{"epsilon": 0.9} | NEVER | options)
    optimizer = small.OPTIMIZERS["sgd"]([*net.parameters(), *gate.parameters()])
    scheduler = resect.AdaptiveLR(
        optimizer, gate, schedule={0: 1.0, 4: 0.1}, restart={0: 1.0, 2: 0.1}, growth=0.3
    )  # fmt: skip
    run, closed, rates, decisions = small.wrapped(net), [], [], []
    with gate:
        for step in range(steps):
            gate.begin_step()
            closed.append([one.is_closed for one in gate._gates])
            x, y = small.mine(small.batch(step))
            loss = nn.functional.cross_entropy(run((1 + dist.get_rank()) * x), y) + gate.extra_loss(y)
            loss.backward()
            decisions.append(gate.count._muted.tolist())
            nn.utils.clip_grad_norm_([*net.parameters(), *gate.parameters()], 0.3)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            rates.append(optimizer.param_groups[0]["lr"])
        plan = gate.finalize(min(2, steps))
    found = {
        "closed": closed, "rates": rates, "plan": plan.names, "steps": gate.muted_steps(),
        "responses": gate.responses(), "metrics": gate.metrics(), "evidence": plan.evidence["largest_while_muted"],
    }  # fmt: skip
    return found, decisions, small.weights(net, gate)


@pytest.mark.parametrize("units", ["absolute", "stream"])
@pytest.mark.parametrize("sync", ["ranks", "none"])
def test_counts_plans_rates_and_weights_are_the_same_everywhere(sync, units, several):
    options = {"sync": sync, "units": units, "side": 0.1, "skip_muted_after": 2, "recheck_every": 4}
    options["epsilon"] = {"absolute": 1.1, "stream": 0.6}[units]
    found = several(counted, options)
    for counts, _, weights in found[1:]:
        assert counts == found[0][0]
        assert all(torch.equal(value, weights[name]) for name, value in found[0][2].items())
    counts = found[0][0]
    assert any(any(step) for step in counts["closed"])
    assert 0 < len(counts["plan"]) < 7
    apart = any(decisions != found[0][1] for _, decisions, _ in found)
    assert apart == (sync == "none"), "each for itself they decide otherwise, together they do not"


def test_a_block_counts_as_muted_where_it_is_on_all_processes(two):
    (counts, decisions, _), (_, other, _) = two(counted, {"sync": "none", "epsilon": 1.1}, 4)
    running = [0] * 7
    for mine, theirs in zip(decisions, other, strict=True):
        running = [run + 1 if a and b else 0 for run, a, b in zip(running, mine, theirs, strict=True)]
    assert decisions != other
    assert list(counts["steps"].values()) == running


def evaluated(sync):
    """Evaluate on process 0 alone, through the wrapper and through finalize, with the gate attached; then train on."""
    net, blocks = small.chain()
    gate = resect.EpsilonGate(net, blocks, epsilon=0.9, sync=sync, **NEVER)
    run = small.wrapped(net)
    with gate:
        small.train(net, run, gate, steps=2)
        if dist.get_rank() == 0:
            net.eval()
            for step in range(3):
                net(small.batch(step)[0])
            gate.finalize(1, data=[small.batch(9)])
            net.train()
        small.train(net, run, gate, steps=2)
    if dist.get_rank() == 0:
        gate.finalize(1, data=[small.batch(9)])
    return small.weights(net)


@pytest.mark.parametrize("sync", ["ranks", "none"])
def test_one_process_may_evaluate_by_itself(sync, two):
    one, other = two(evaluated, sync)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def nan_on_one():
    net, blocks = small.chain()
    with resect.EpsilonGate(net, blocks, epsilon=100.0, **NEVER) as gate:
        gate.begin_step()
        x, _ = small.batch(0)
        net(x * (float("nan") if dist.get_rank() else 1.0))
        return gate.metrics()["muted"], gate.responses()[blocks.names[0]]


def test_a_diverged_branch_on_one_process_stays_visible_on_all(three):
    assert all(muted == 0 and response != response for muted, response in three(nan_on_one))


def test_measures_of_the_parts_are_those_of_the_whole():
    branch, shortcut = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    from resect.blocks.response import in_units_of_stream, sizes

    rows = torch.stack([sizes(branch[r::3], shortcut[r::3]) for r in range(3)])
    expected = branch.abs().max() / shortcut.square().mean().sqrt()
    assert torch.allclose(in_units_of_stream(rows), expected)
    assert torch.allclose(relative_response(branch, shortcut), expected)
    assert largest_response(branch) == branch.abs().max()


def test_a_wrong_sync_is_refused():
    net, blocks = small.chain()
    with pytest.raises(InputError, match="sync"):
        resect.EpsilonGate(net, blocks, sync="all")
