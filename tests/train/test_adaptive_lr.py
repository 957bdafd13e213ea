"""The adaptive learning rate against the published schedule, epoch by epoch."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import resect
from resect.errors import InputError

pytestmark = pytest.mark.core


class Counts:
    muted_average = 0.0


def run(epochs, growth_at, rate=0.1, **options):
    """The rate of every epoch, from epoch 1, when the count grows by ``growth_at[N]`` in epoch N."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=rate)
    counts = Counts()
    counts.muted_average = 0.0
    scheduler = resect.AdaptiveLR(optimizer, counts, **options)
    rates = {}
    for epoch in range(1, epochs + 1):
        rates[epoch] = optimizer.param_groups[0]["lr"]
        counts.muted_average += growth_at.get(epoch, 0.0)
        optimizer.step()
        scheduler.step()
    return rates, scheduler


def test_without_growth_it_is_the_published_schedule():
    rates, scheduler = run(320, {5: 0.9, 6: 0.99})
    assert not scheduler.restarts
    changes = {epoch: rates[epoch] for epoch in rates if rates[epoch] != rates.get(epoch - 1)}
    assert changes == pytest.approx({1: 0.1, 83: 0.01, 124: 0.001, 301: 0.0002})


def test_growth_in_epoch_n_starts_anew_in_the_next():
    """README of the authors' code: lost at N, 0.1 at N+1, 0.01 at N+41, 0.001 at N+61."""
    rates, scheduler = run(300, {100: 1.0})
    assert scheduler.restarts == [100]
    changes = {epoch: rates[epoch] for epoch in rates if rates[epoch] != rates.get(epoch - 1)}
    # "after epoch N + 41": the rate of the epoch that follows, as in the published table.
    assert changes == pytest.approx({1: 0.1, 83: 0.01, 101: 0.1, 142: 0.01, 162: 0.001, 251: 0.0002})
    _, scheduler = run(100, {3: 1.5, 40: 2.0, 41: -5.0, 42: 1.0})
    assert scheduler.restarts == [3, 40, 42]


def test_a_resume_goes_on_exactly():
    whole, _ = run(200, {30: 1.0, 90: 1.0})
    optimizer, counts = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), Counts()
    scheduler = resect.AdaptiveLR(optimizer, counts)
    rates = {}
    for epoch in range(1, 201):
        rates[epoch] = optimizer.param_groups[0]["lr"]
        counts.muted_average += {30: 1.0, 90: 1.0}.get(epoch, 0.0)
        optimizer.step()
        scheduler.step()
        state = json.loads(json.dumps(scheduler.state_dict()))
        weights = optimizer.state_dict()
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = resect.AdaptiveLR(optimizer, counts)
        optimizer.load_state_dict(weights)
        scheduler.load_state_dict(state)
    assert rates == whole


def test_it_follows_a_real_gate():
    from chains import chain

    net, x, blocks = chain()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = resect.EpsilonGate(net, blocks, epsilon=resect.schedules.StartAt(1e9, 3), optimizer=optimizer)
    scheduler = resect.AdaptiveLR(optimizer, method)
    with method:
        for _ in range(8):
            method.begin_step()
            net(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert scheduler.restarts[0] == 4, "the first step with the gate"


def test_misuse():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(InputError, match="restart must give a factor from epoch 0 on"):
        resect.AdaptiveLR(optimizer, Counts(), restart={1: 1.0})
    with pytest.raises(InputError, match="growth must be above 0"):
        resect.AdaptiveLR(optimizer, Counts(), growth=0)
