"""Blocks named by hand: what the search passes over, verified the same way; and what is said where it cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Net
from torch import nn

import resect
from resect.errors import BlocksError, InputError

pytestmark = pytest.mark.core


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.mix, self.down = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        y = torch.relu(self.up(x))
        y = y + torch.tanh(self.mix(y))
        return self.down(y)


class Outer(nn.Module):
    """A sum inside the branch of another: the search offers the outer one."""

    def __init__(self):
        super().__init__()
        self.mlp, self.head = Inner(), nn.Linear(4, 50)  # a branch with most of the weights would be no branch

    def forward(self, x):
        return self.head(x + self.mlp(x))

    def without_inner(self, x):
        return self.head(x + self.mlp.down(torch.relu(self.mlp.up(x))))


class Written(nn.Module):
    """A model whose forward is given by the test."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name in ("f", "g", "h"):
            setattr(self, name, modules.get(name) or nn.Linear(4, 4))
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, 4)


@torch.no_grad()
def test_a_block_inside_the_branch_of_another(x):
    net = Outer().eval()
    found = resect.find_blocks(net, x)
    assert len(found) == 1
    inner = resect.block(net, x, branch="mlp.mix")
    assert inner.names == ["mlp/mix"]
    assert (inner[0].modules, inner[0].shortcut, inner[0].scalable) == (("mlp.mix",), "identity", True)
    with resect.closed(net, inner):
        assert torch.equal(net(x), net.without_inner(x))
    small = resect.remove(net, inner, "mlp/mix")
    assert torch.equal(small(x), net.without_inner(x))
    both = found + inner
    assert both.names == ["mlp/mix", *found.names]
    assert [block.index for block in both] == [0, 1]
    assert (both + inner).names == both.names
    assert both.flops == found.flops
    with resect.gates(net, both) as g:
        g["mlp/mix"].close()
        assert torch.equal(net(x), net.without_inner(x))
        g[1].close()
        assert torch.equal(net(x), net.head(x))


@torch.no_grad()
def test_two_blocks_of_one_name_get_two_names_and_do_not_share_a_module(x):
    class Flat(Inner):
        def forward(self, x):
            return x + super().forward(x)

    net = nn.Sequential(Flat(), nn.Linear(4, 50)).eval()
    found, inner = resect.find_blocks(net, x), resect.block(net, x, branch="0.mix")
    assert (found.names, inner.names) == (["0/mix"], ["0/mix~1"])  # a name means one block of a model
    both = found + inner
    assert [(block.name, len(block.modules)) for block in both] == [("0/mix~1", 1), ("0/mix", 3)]
    with pytest.raises(resect.ResectError, match="one of the two at a time"), resect.gates(net, both):
        pass
    with resect.closed(net, inner):
        expected = net(x)
    for which in (inner, inner[0], [inner[0]], both[0], both.select(inner[0]), both.select("0/mix~1")):
        with resect.closed(net, which):
            assert torch.equal(net(x), expected)
        assert torch.equal(resect.remove(net, both, which)(x), expected)
    with resect.closed(net, found):
        assert not torch.equal(net(x), expected)
    with pytest.raises(InputError, match="is none of these 1"):
        found.select(inner[0])
    # Found on a copy that was not searched, it has the outer one's name, and still means the inner one.
    (alike,) = resect.block(copy.deepcopy(net), x, branch="0.mix")
    assert alike.name == "0/mix"
    assert both.select(alike).names == ["0/mix~1"]
    assert torch.equal(resect.remove(net, both, [alike])(x), expected)


@torch.no_grad()
def test_a_shortcut_that_is_deep_and_not_linear(x):
    net = Written(lambda m, x: m.h(torch.relu(m.f(x)) + torch.tanh(m.g(x)))).eval()
    assert not resect.find_blocks(net, x)
    blocks = resect.block(net, x, branch="g", shortcut="f")
    assert blocks[0].shortcut == "projection"
    with resect.closed(net, blocks):
        assert torch.equal(net(x), net.h(torch.relu(net.f(x))))
    other = resect.block(net, x, branch="f")
    with resect.closed(net, other):
        assert torch.equal(net(x), net.h(torch.tanh(net.g(x))))


def test_what_the_search_finds_is_the_same_by_hand(x):
    net = Net((False, True)).eval()
    x = torch.randn(2, 5)
    for block in resect.find_blocks(net, x):
        (mine,) = resect.block(net, x, branch=block.modules)
        assert (mine.name, mine.modules, mine.places, mine.parameters) == (
            block.name, block.modules, block.places, block.parameters,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("forward", "branch", "options", "told"),
    [
        (lambda m, x: x + m.f(x), "ff", {}, "Unknown module 'ff'"),
        (lambda m, x: x + m.f(x), "h", {}, "'h' was not called on this example"),
        (lambda m, x: x + m.f(x), [], {}, "branch is empty"),
        (lambda m, x: torch.cat([x, m.f(x)], -1), "f", {}, "'f' reaches no addition of two tensors"),
        (lambda m, x: torch.lerp(x, m.f(x), 0.5), "f", {}, "sums by cat, lerp or addcmul"),
        (lambda m, x: m.g(x) + m.f(x), ["f", "g"], {}, "Name modules of one branch"),
        (lambda m, x: (lambda y: torch.cat([x + y, y], -1))(m.f(x)), "f", {}, "is also used outside it"),
        (lambda m, x: m.h(x + m.f(x)), "f", {"shortcut": "h"}, "'h' does not meet the branch 'f'"),
        (lambda m, x: (lambda y: y + m.f(y))(x + m.f(x)), "f", {}, "'f' reach 2 additions"),
        (
            lambda m, x: (lambda y: y + m.f(y))(x + m.f(x)),
            "f",
            {"addition": 2},
            "addition=2: 'f' reach 2",
        ),
    ],
)
def test_what_cannot_be_named(x, forward, branch, options, told):
    with pytest.raises(InputError) as caught:
        resect.block(Written(forward).eval(), x, branch=branch, **options)
    assert told in str(caught.value)


@torch.no_grad()
def test_one_module_in_two_additions(x):
    net = Written(lambda m, x: (lambda y: y + m.f(y))(x + m.f(x))).eval()
    y = x + net.f(x)
    for addition, expected in ((0, x + net.f(x)), (1, y)):
        blocks = resect.block(net, x, branch="f", addition=addition)
        with resect.closed(net, blocks):
            assert torch.equal(net(x), expected)


def test_a_block_that_cannot_be_controlled_is_refused_with_its_reason(x):
    net = Written(lambda m, x: (lambda y: x + y if y.sum() > -99 else x)(m.f(x))).eval()
    with pytest.raises(BlocksError, match=r"The branch of 'f' cannot be controlled: .* decides by it"):
        resect.block(net, x, branch="f")


def test_a_branch_with_nothing_in_it_is_refused(x):
    with pytest.raises(BlocksError, match="nothing to leave out"):
        resect.block(Written(lambda m, x: x + m.f(x), f=nn.Tanh()).eval(), x, branch="f")


def test_on_meta_too(x):
    net = Outer().to("meta")
    assert resect.block(net, x, branch="mlp.mix")[0].verified == "structure"
