"""What blocks cost: counted as removing counts, and timed with a clock that only blocks move."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from nets import Net
from torch import nn

import resect
from resect.blocks import cost
from resect.blocks.block import Blocks
from resect.errors import BlocksError, InputError
from resect.shrink.timed import _check, _summary

pytestmark = pytest.mark.core


class Clock:
    now = 0.0


class Slow(nn.Linear):
    """A layer that takes so many milliseconds a sample."""

    def __init__(self, ms):
        super().__init__(4, 4)
        self.ms = ms

    def forward(self, x):
        Clock.now += 1e-3 * self.ms * len(x)
        return super().forward(x)


class Block(nn.Module):
    def __init__(self, ms, after, shortcut=0.0):
        super().__init__()
        self.branch = nn.Sequential(Slow(ms), nn.GELU(), Slow(0))
        self.shortcut = Slow(shortcut) if shortcut else nn.Identity()
        self.after = Slow(after)

    def forward(self, x):
        return self.after(self.branch(x) + self.shortcut(x))


class InPlace(Block):
    def forward(self, x):
        y = self.branch(x)
        y += self.shortcut(x)  # the sum is written into the branch's own value
        return self.after(y)


def slow_net():
    return nn.Sequential(Slow(5), Block(7, 1), InPlace(11, 2, shortcut=3), Block(13, 0), Slow(17)).eval()


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(cost, "clock", lambda: Clock.now)


def test_a_block_has_the_time_of_its_branch_alone(clock):
    net = slow_net()
    blocks = resect.find_blocks(net, torch.randn(2, 4))
    costs = resect.block_costs(net, blocks, batches=(1, 3), rounds=2)
    for batch in (1, 3):
        assert costs.latency((), batch)[0] == pytest.approx(59 * batch)
        assert costs.latencies[batch].ms.tolist() == pytest.approx([28 * batch, 7 * batch, 11 * batch, 13 * batch])
    for names in ([], blocks.names[:1], blocks.names[1:], blocks.names):
        small = resect.remove(net, blocks, names) if names else net
        before = Clock.now
        small(torch.randn(1, 4))
        ms, error = costs.latency(names)
        assert ms == pytest.approx(1e3 * (Clock.now - before))
        assert error == pytest.approx(0)
        assert costs.saved("latency", names) == pytest.approx(1 - ms / 59)
    assert "ms at batch 3" in str(costs)


def test_counts_are_those_of_the_removed_model():
    torch.manual_seed(0)
    net, x = Net((False, True, False)).eval(), torch.randn(4, 5)
    blocks = resect.find_blocks(net, x)
    costs = resect.block_costs(net, blocks, batches=())
    for names in (blocks.names[:1], blocks.names[1:3], blocks.names):
        small = resect.remove(net, blocks, names)
        flops = 1 - cost.count_flops(small, x) / cost.count_flops(net, x)
        parameters = 1 - sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in net.parameters())
        assert costs.saved("flops", names) == pytest.approx(flops)
        assert costs.saved("parameters", names) == pytest.approx(parameters)
        assert costs.gain(names) == pytest.approx(flops)


def test_the_model_is_left_alone():
    net = slow_net().train()
    blocks = resect.find_blocks(net, torch.randn(2, 4))
    resect.block_costs(net, blocks, batches=(1,), rounds=2)
    assert all(module.training for module in net.modules())
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert not any("Removed" in type(module).__name__ for module in net.modules())


def test_a_buffer_that_a_pass_changes_is_put_back():
    class Counting(Block):
        def __init__(self):
            super().__init__(1, 1)
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x):
            self.passes += 1
            return super().forward(x)

    net = nn.Sequential(Counting(), Counting()).eval()
    blocks = resect.find_blocks(net, torch.randn(2, 4))
    before = float(net[0].passes)
    resect.block_costs(net, blocks, batches=(1,), rounds=2)
    assert float(net[0].passes) == before


def test_what_cannot_be_weighed_is_refused():
    net = slow_net()
    blocks = resect.find_blocks(net, torch.randn(2, 4))
    for options, message in (
        ({"batches": (0,)}, "a batch size must be a whole number of at least 1, not 0"),
        ({"batches": (True,)}, "a batch size must be a whole number of at least 1, not True"),
        ({"batches": 32}, "batches are several batch sizes"),
        ({"rounds": 1}, "rounds must be a whole number of at least 2, not 1"),
    ):
        with pytest.raises(InputError, match=message):
            resect.block_costs(net, blocks, **options)
    with pytest.raises(BlocksError, match="nothing to weigh"):
        resect.block_costs(net, blocks[:0])
    costs = resect.block_costs(net, blocks, batches=(1,), rounds=2)
    with pytest.raises(InputError, match="batch size 32; measured: 1"):
        costs.latency((), 32)
    with pytest.raises(InputError, match="Did you mean 'flops'"):
        costs.saved("flop", blocks.names)
    with pytest.raises(InputError, match="Did you mean '1/branch"):
        costs.saved("flops", ["1/brnch"])
    for batches in ([(torch.randn(2, 4), 0)], [{"x": torch.randn(2, 4)}] * 3):
        with pytest.raises(InputError, match=f"one example, not batches, and this is a list of {len(batches)}"):
            resect.block_costs(net, blocks, batches)


def test_a_block_goes_by_its_owner_where_it_is_alone_there():
    net = Net((False, True, False)).eval()
    blocks = resect.find_blocks(net, torch.randn(4, 5))
    costs = resect.block_costs(net, blocks, batches=())
    shared = {block.owner for block in blocks if sum(other.owner == block.owner for other in blocks) > 1}
    alone = [block for block in blocks if block.owner not in shared and block.owner != block.name]
    assert alone
    assert shared
    for block in alone:
        assert costs.saved("flops", [block.owner]) == costs.saved("flops", [block.name, block.owner]) > 0
    with pytest.raises(InputError, match=r"holds 2 residual blocks\. Name one of them"):
        costs.saved("flops", shared)


def test_blocks_inside_one_another_do_not_add_up():
    net = slow_net()
    outer, *others = resect.find_blocks(net, torch.randn(2, 4))
    inner = dataclasses.replace(outer, name="inner", modules=tuple(f"{name}.0" for name in outer.modules))
    with pytest.raises(BlocksError, match=r"inner or the outer ones: 'inner' lies in the branch of '1/branch"):
        _check(Blocks([outer, *others, inner]))


def test_a_block_inside_another_s_branch_counts_once():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.Linear(6, 6), Net((False,)).layers[0], nn.Linear(6, 6))
            self.norm = nn.LayerNorm(6)

        def forward(self, x):
            return self.norm(x + self.branch(x))

    net, x = nn.Sequential(nn.Linear(5, 6), Around(), Around()).eval(), torch.randn(1, 5)
    blocks = resect.find_blocks(net, x) + resect.block(net, x, branch="1.branch.1.a")
    costs = resect.block_costs(net, blocks, x, batches=())
    for gone in (["1.branch.1/a"], ["1/branch"], ["1.branch.1/a", "1/branch"], blocks.names):
        small = resect.remove(net, blocks, gone)
        left = {"parameters": sum(p.numel() for p in small.parameters()), "flops": cost.count_flops(small, x)}
        for quantity, value in left.items():
            assert costs.saved(quantity, gone) == pytest.approx(1 - value / costs.whole[quantity])


def test_what_stretches_take_adds_up_to_a_pass():
    rows = [[1.0, 1.0, 9.0], [1.0, 9.0, 1.0], [9.0, 1.0, 1.0]]  # in every pass one is held up, and each mostly is not
    took, _ = _summary(rows)
    assert took.tolist() == pytest.approx([11 / 3] * 3)
