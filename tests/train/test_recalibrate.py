"""Recalibration against averages computed by hand; the controls of ResidualDroppath."""

import copy

import pytest
import torch
from chains import batches, chain
from torch import nn

import resect
from resect.errors import InputError

pytestmark = pytest.mark.core


def test_statistics_become_the_plain_average_over_the_batches():
    net, _, _ = chain()
    data = batches(5)
    for x, _ in data:
        net(x)  # the usual moving average
    weights = copy.deepcopy(dict(net.named_parameters()))
    net.eval()
    assert resect.recalibrate(net, data) == 5
    means, variances = [], []
    for x, _ in data:
        stem = net.stem[0](x)
        means.append(stem.mean(0))
        variances.append(stem.var(0))
    norm = net.stem[1]
    assert torch.allclose(norm.running_mean, torch.stack(means).mean(0), atol=1e-6)
    assert torch.allclose(norm.running_var, torch.stack(variances).mean(0), atol=1e-6)
    assert not net.training
    assert norm.momentum == 0.1
    assert all(torch.equal(parameter, weights[name]) for name, parameter in net.named_parameters())


def test_without_data_or_after_a_failure_nothing_has_changed():
    net, _, _ = chain()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(InputError, match="at least one batch"):
        resect.recalibrate(net, [])
    with pytest.raises(RuntimeError):
        resect.recalibrate(net, [batches(1)[0], torch.zeros(2, 99)])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert net.stem[1].momentum == 0.1


@pytest.mark.parametrize("name", resect.CONTROLS)
def test_every_control_trains_what_it_says(name):
    net, _, blocks = chain()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = resect.droppath_control(name, net, blocks, drop_prob=0.5, seed=1, optimizer=optimizer)
    learned, computed = [], []
    with method:
        for x, _ in batches(8):
            method.begin_step()
            net(x).square().sum().backward()
            optimizer.step()
            computed.append(method.open_blocks)
            learned.append({int(key.split(".")[1]) for key, p in net.named_parameters()
                            if p.grad is not None and key.startswith("layers")})  # fmt: skip
            optimizer.zero_grad()
    full = set(range(7))
    if name == "droppath-only":
        assert [len(some) for some in learned] == computed
        assert min(computed) < 7
    if name == "full-steps":
        assert learned[1::2] == [full] * 4
        assert min(computed[::2]) < 7
    if name == "fresh-mask":
        assert any(some & other for some, other in zip(learned[::2], learned[1::2], strict=True) if other != full)
    if name == "random-subset":
        assert computed == [7] * 8
        assert {len(some) for some in learned} == {5}, "7 - 0.5 * (1 + ... + 7) / 7 = 5 blocks run on average"


def test_unknown_controls_are_named():
    net, _, blocks = chain()
    with pytest.raises(InputError, match=r"Unknown control 'fresh'. Did you mean 'fresh-mask'"):
        resect.droppath_control("fresh", net, blocks)


class Frozen(nn.BatchNorm1d):
    """Stays in eval mode, as detection backbones freeze their norms."""

    def train(self, mode=True):
        return super().train(False)


def test_norms_that_stay_in_eval_mode_work_with_what_they_have():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), Frozen(4), nn.Linear(4, 4), nn.BatchNorm1d(4)).train()
    net[1].running_mean.fill_(2.0)
    before = copy.deepcopy(net[1].state_dict())
    x = torch.randn(32, 3)
    resect.recalibrate(net, [(x, None)])
    assert all(torch.equal(value, before[name]) for name, value in net[1].state_dict().items())
    assert torch.allclose(net[3].running_mean, net[:3](x).mean(0), atol=1e-5)
