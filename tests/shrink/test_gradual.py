"""Cut a little, heal, and again."""

from __future__ import annotations

import pytest
import torch
from chains import batches, chain
from torch import nn

import resect
from resect.errors import InputError

pytestmark = pytest.mark.core


def test_rounds_choose_anew_from_what_was_healed():
    net, x, blocks = chain()
    net.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    data, said = batches(3), []

    def choose(small: nn.Module, left: resect.Blocks, count: int) -> list[str]:
        healed = small.head.bias[0] - net.head.bias[0]
        assert healed.item() == pytest.approx(len(said), abs=1e-5)  # each sees what the last healing made
        said.append((len(left), count))
        return resect.rank(small, left, data, metric="cross_entropy").choose(count)

    def heal(small: nn.Module, teacher: nn.Module) -> None:
        assert teacher is net
        assert small is not net
        with torch.no_grad():
            small.head.bias[0] += 1

    small = resect.shrink_gradually(net, blocks, 5, choose=choose, heal=heal, rounds=3)
    assert said == [(7, 1), (6, 2), (4, 2)]
    assert len(small.resect_plan.names) == 5
    assert len(resect.find_blocks(small, x)) == 2
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_only_blocks_that_were_given_may_go_in_later_rounds_too():
    net, _, blocks = chain()
    given, seen = blocks.select(blocks.names[2:6]), []

    def choose(small: nn.Module, left: resect.Blocks, count: int) -> list[str]:
        seen.append(left.names)
        return left.names[:count]

    resect.shrink_gradually(net.eval(), given, 3, choose=choose, heal=lambda small, model: None)
    assert seen == [given.names, given.names[1:], given.names[2:]]


def test_layers_are_counted_as_one_and_deleted_with_the_last_cut():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            x = x + self.a(x)
            return x + self.b(x)

    torch.manual_seed(0)
    net, x = nn.Sequential(*(Layer() for _ in range(5))).eval(), torch.randn(2, 4)
    blocks, depths = resect.find_blocks(net, x), []

    def choose(small: nn.Module, left: resect.Blocks, count: int) -> list[str]:
        assert len(small) == 5  # names hold
        return [name for layer in list(left.layers().values())[-1 - count : -1] for name in layer.names]

    def heal(small: nn.Module, _: nn.Module) -> None:
        depths.append(len(small))

    small = resect.shrink_gradually(net, blocks, 3, choose=choose, heal=heal, rounds=2, unit="layer", compact=True)
    assert depths == [5, 2]
    assert torch.equal(small(x), net[4](net[0](x)))
    with pytest.raises(InputError, match="n must be from 1 to 5, the number of layers"):
        resect.shrink_gradually(net, blocks, 6, choose=choose, heal=heal, unit="layer")
    with pytest.raises(InputError, match=r"asked for 1 layers and gave '0/a', '1/a'"):
        resect.shrink_gradually(net, blocks, 1, choose=lambda *_: ["0/a", "1/a"], heal=heal, unit="layer")


def test_wrong_numbers_and_choices_are_told():
    net, _, blocks = chain()
    for n, rounds in [(0, None), (8, None), (3, 4), (2.0, 1)]:
        with pytest.raises(InputError, match="n must be from 1 to 7"):
            resect.shrink_gradually(net, blocks, n, choose=lambda *_: [], heal=lambda *_: None, rounds=rounds)
    with pytest.raises(InputError, match="asked for 2 blocks and gave 1"):
        resect.shrink_gradually(net, blocks, 2, choose=lambda *_: ["layers.1"], heal=lambda *_: None, rounds=1)


def test_batch_statistics_are_renewed_without_labels_after_a_cut_or_a_replacement():
    net, _, _ = chain()
    for x, _ in batches(5):
        net(x)
    net.eval()
    data = [x for x, _ in batches(4)]
    blocks = resect.find_blocks(net, data[0])
    for small in (
        resect.remove(net, blocks, ["layers.2", "layers.3"]),
        resect.remove(net, blocks, ["layers.2", "layers.3"], compact=True),
        resect.replace(net, blocks, ["layers.2"], data),
    ):
        assert resect.recalibrate(small, data) == 4
        last, means = small.layers[-1].norm, []
        found = last.running_mean.clone()
        hook = last.register_forward_pre_hook(lambda _, args, means=means: means.append(args[0].mean(0)))
        with torch.no_grad():
            for x in data:
                small.train()(x)
        hook.remove()
        assert torch.allclose(found, torch.stack(means).mean(0), atol=1e-6)
        assert not torch.allclose(found, net.layers[-1].norm.running_mean, atol=1e-3)
