"""What several blocks share stands still only where none of them uses it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import resect
from resect.errors import AttachError
from resect.train.freeze import Parts

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore:.*residual blocks. below 6")]


class SharedNorm(nn.Module):
    """Branches of their own behind one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.maps = nn.LayerNorm(4), nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

    def forward(self, x):
        for each in self.maps:
            x = x + each(self.norm(x))
        return x


class SharedBranch(nn.Module):
    """One branch at six depths."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(6):
            x = x + torch.tanh(self.map(x))
        return x


class Tied(nn.Module):
    """Two branches with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x):
        x = x + self.a(x).tanh()
        return self.head(x + self.b(x).tanh())


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.map(x).tanh()


class Nested(nn.Module):
    """A block in the branch of another."""

    def __init__(self) -> None:
        super().__init__()
        self.branch = nn.Sequential(nn.Linear(4, 4), Inner(), nn.Linear(4, 4))

    def forward(self, x):
        return x + self.branch(x)


def found(build):
    torch.manual_seed(0)
    net, x = build(), torch.randn(5, 4)
    return net, x, resect.find_blocks(net, x)


def step(net, x, method, optimizer):
    """Take a step; return the names of what moved."""
    before = {name: value.detach().clone() for name, value in net.named_parameters()}
    method.begin_step()
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    return {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", ["StochasticDepth", "ResidualDroppath", "RandomSubset"])
def test_what_an_open_block_uses_learns(name):
    net, x, blocks = found(SharedNorm)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    options = {"keep": 3} if name == "RandomSubset" else {"drop_prob": 0.5, "rule": "uniform"}
    with getattr(resect, name)(net, blocks, optimizer=optimizer, **options) as method:
        moved = [step(net, x, method, optimizer) for _ in range(6)]
    assert all({"norm.weight", "norm.bias"} <= each for each in moved)
    assert any(len(each) < 10 for each in moved)  # branches stood still meanwhile


def test_what_no_open_block_uses_stands_still():
    net, x, blocks = found(SharedNorm)
    extra = nn.Parameter(torch.ones(4))
    net.extra, forward = extra, net.forward
    net.forward = lambda x: forward(x) * extra
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    with resect.StochasticDepth(net, blocks, drop_prob=0.0, optimizer=optimizer) as method:
        assert "norm.weight" in step(net, x, method, optimizer)
    with resect.StochasticDepth(net, blocks, drop_prob=1.0, rule="uniform", optimizer=optimizer) as method:
        assert step(net, x, method, optimizer) == {"extra"}  # not by momentum either


@pytest.mark.parametrize("name", ["StochasticDepth", "ResidualDroppath", "RandomSubset"])
def test_a_branch_at_several_depths_learns_while_one_of_them_is_open(name):
    net, x, blocks = found(SharedBranch)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    options = {"keep": 3} if name == "RandomSubset" else {"drop_prob": 0.3, "rule": "uniform"}
    with getattr(resect, name)(net, blocks, optimizer=optimizer, **options) as method:
        assert all(step(net, x, method, optimizer) == {"map.weight", "map.bias"} for _ in range(6))


def test_a_closed_call_gives_the_shared_branch_the_gradient_of_the_others():
    net, x, blocks = found(SharedBranch)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    start = copy.deepcopy(net)
    rule = [0.0, 1.0, 0.0, 1.0, 1.0, 0.0]
    with resect.StochasticDepth(net, blocks, drop_prob=1.0, rule=rule, scaling="none", optimizer=optimizer) as method:
        step(net, x, method, optimizer)
    twin = copy.deepcopy(start)
    y = x
    for _ in range(3):
        y = y + torch.tanh(twin.map(y))
    y.square().mean().backward()
    assert torch.allclose(net.map.weight, start.map.weight - twin.map.weight.grad, atol=1e-6)


def test_a_tied_weight_stands_still_with_all_its_branches():
    net, _, blocks = found(Tied)
    parts = Parts(net, blocks)
    assert {id(p) for p in parts.parameters.only({0})} == {id(net.a.bias)}
    assert {id(p) for p in parts.parameters.only({0, 1})} == {id(net.a.weight), id(net.a.bias), id(net.b.bias)}
    assert {id(p) for p in parts.parameters.rest} == {id(net.head.weight), id(net.head.bias)}
    alone = Parts(net, blocks.select([0]))
    assert id(net.a.weight) in {id(p) for p in alone.parameters.rest}


def test_a_block_in_the_branch_of_a_closed_one_stands_still_and_closed_takes_nothing_from_around():
    net, x, blocks = found(Nested)
    blocks = blocks + resect.block(net, x, branch="branch")
    inner, outer = (
        {name: p for name, p in net.named_parameters() if (".1." in name) == deep} for deep in (True, False)
    )
    assert len(blocks) == 2
    place = {block.name: at for at, block in enumerate(blocks)}
    deep = next(block.name for block in blocks if block.owner == "branch.1")
    around = next(name for name in place if name != deep)
    parts = Parts(net, blocks)
    ids = lambda several: {id(p) for p in several}  # noqa: E731
    assert ids(parts.parameters.only({place[deep]})) == ids(inner.values())
    assert ids(parts.parameters.only({place[around]})) == ids([*inner.values(), *outer.values()])
    assert ids(Parts(net, blocks.select([around])).parameters.only({0})) == ids([*inner.values(), *outer.values()])
    assert ids(Parts(net, blocks.select([deep])).parameters.only({0})) == ids(inner.values())


def test_samples_of_a_shared_branch_cannot_be_split():
    net, _, blocks = found(SharedBranch)
    with pytest.raises(AttachError, match="share"):
        resect.ResidualDroppath(net, blocks, per="sample").attach()
    assert not any(module._forward_hooks for module in net.modules())
