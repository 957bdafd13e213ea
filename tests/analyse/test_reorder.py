"""Swapping layers against building the model anew with exchanged weights."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nets import Block, Net
from torch import nn

import resect
from resect.analyse.reorder import kendall_tau, number_of_orders, random_order, random_orders, reordered
from resect.analyse.swappable import swappable
from resect.errors import BlocksError, InputError

pytestmark = pytest.mark.core


class Conv(nn.Module):
    """A residual block of two convolutions; ``stride`` 2 projects the shortcut."""

    def __init__(self, into: int, out: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.a = nn.Conv2d(into, out, 3, stride, dilation, dilation)
        self.b = nn.Conv2d(out, out, 3, padding=1)
        self.side = nn.Conv2d(into, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return self.side(x) + self.b(self.a(x).relu())


class Stages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.one = nn.Sequential(Conv(4, 4), Conv(4, 4), Conv(4, 4))
        self.two = nn.Sequential(Conv(4, 6, 2), Conv(6, 6), Conv(6, 6, dilation=2), Conv(6, 6), Conv(6, 6, dilation=2))

    def forward(self, x):
        return self.two(self.one(self.stem(x))).mean((2, 3))


class Numbered(nn.Module):
    """Layers that know their number, which matters to what they compute only where ``scale``."""

    def __init__(self, scale: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(5) for _ in range(3))
        for number, layer in enumerate(self.layers):
            layer.a.place = number
        if scale:
            for layer in self.layers:
                layer.a.register_forward_hook(lambda module, _, output: output / (module.place + 1))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def exchanged(model: nn.Module, layers: list[str], order: list[int]) -> nn.Module:
    """A copy that has the weights of layer ``order[i]`` at layer i: the slow way."""
    weights = model.state_dict()
    moved = {
        f"{layers[place]}.{key}": value
        for place, now in enumerate(order)
        for key, value in model.get_submodule(layers[now]).state_dict().items()
    }
    slow = copy.deepcopy(model)
    slow.load_state_dict(weights | moved)
    return slow


@pytest.fixture(scope="module")
def stages():
    torch.manual_seed(0)
    net, x = Stages().eval(), torch.randn(2, 3, 8, 8)
    return net, resect.find_blocks(net, x), x


def test_layers_change_places_exactly_where_their_weights_can(stages):
    net, blocks, x = stages
    layers, groups = swappable(net, blocks)
    assert layers == [f"one.{i}" for i in range(3)] + [f"two.{i}" for i in range(5)]
    same = {frozenset(pair) for group in groups for pair in itertools.combinations(group, 2)}
    for i, j in itertools.combinations(range(len(layers)), 2):
        order = list(range(len(layers)))
        order[i], order[j] = j, i
        try:
            slow = exchanged(net, layers, order)(x)
            with reordered(net, layers, order):
                fits = torch.equal(slow, net(x)) and "two.0" not in (layers[i], layers[j])
        except RuntimeError:
            fits = False
        assert fits == (frozenset((layers[i], layers[j])) in same), (layers[i], layers[j])


def test_swaps_are_measured_as_by_a_model_built_that_way(stages):
    net, blocks, x = stages
    y = torch.tensor([0, 3])
    before = list(net.named_modules())
    study = resect.lesion_study(
        net, blocks, [(x, y)], metric="cross_entropy", each=False, swaps=[0, 3], draws=4, seed=5
    )
    layers, groups = swappable(net, blocks)
    assert list(net.named_modules()) == before
    for lesion in study.of("swaps"):
        order = list(random_orders(layers, groups, lesion.k, 4, f"5/swap/{lesion.k}")[0][lesion.draw])
        slow = nn.functional.cross_entropy(exchanged(net, layers, order)(x), y)
        assert lesion.value == pytest.approx(slow.item(), rel=1e-5)
        assert lesion.tau == kendall_tau(order)
    assert [(lesion.k, lesion.tau, lesion.every) for lesion in study.of("swaps")[:1]] == [(0, 1.0, True)]
    assert len({lesion.label for lesion in study.of("swaps")}) == len(study.of("swaps")) == 5


@given(st.permutations(range(7)))
def test_kendalls_tau_is_its_definition(order):
    def sign(number):
        return (number > 0) - (number < 0)

    pairs = list(itertools.combinations(range(7), 2))
    assert kendall_tau(order) == pytest.approx(sum(sign(order[j] - order[i]) for i, j in pairs) / len(pairs))


def test_every_pair_that_fits_is_swapped_equally_often():
    layers, groups = list("abcde"), [["a", "b", "c"], ["d", "e"]]
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(2000):
        order = tuple(random_order(layers, groups, 1, random.Random(seed)))
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 4
    assert min(seen.values()) > 420


@pytest.mark.parametrize("swaps", [0, 1, 2, 3, 4])
def test_orders_are_distinct_never_the_original_and_all_where_there_are_few(swaps):
    layers, groups = list("abcde"), [["a", "b", "c"], ["d", "e"]]
    pairs = [(0, 1), (0, 2), (1, 2), (3, 4)]
    slow = set()
    for chosen in itertools.product(pairs, repeat=swaps):
        order = list(range(5))
        for i, j in chosen:
            order[i], order[j] = order[j], order[i]
        slow.add(tuple(order))
    slow -= {tuple(range(5))} if swaps else set()
    assert number_of_orders([3, 2], swaps) == len(slow)
    found, every = random_orders(layers, groups, swaps, 99, "0")
    assert every
    assert len(found) == len(slow)
    assert set(found) == slow
    some, every = random_orders(layers, groups, swaps, len(slow) - 1, "0")
    assert not every
    assert some == found[:-1]


def test_swaps_that_can_only_undo_each_other_are_refused():
    assert random_orders(["a", "b"], [["a", "b"]], 3, 9, "0") == ([(1, 0)], True)
    with pytest.raises(InputError, match="After 2 swaps everything stands where it stood"):
        random_orders(["a", "b"], [["a", "b"]], 2, 9, "0")


def test_a_number_that_matters_keeps_a_layer_where_it_is():
    x = torch.randn(4, 5)
    torch.manual_seed(0)
    free, bound = Numbered(False).eval(), Numbered(True).eval()
    assert swappable(free, resect.find_blocks(free, x))[1] == [["layers.0", "layers.1", "layers.2"]]
    assert [layer.a.place for layer in free.layers] == [0, 1, 2]
    with pytest.raises(BlocksError, match=r"it knows its own number \('a.place'\)"):
        swappable(bound, resect.find_blocks(bound, x))
    assert [layer.a.place for layer in bound.layers] == [0, 1, 2]


def test_shared_and_tied_layers_are_refused_with_the_reason():
    x = torch.randn(4, 5)
    net = Net((False, False, False)).eval()
    net.layers[2] = net.layers[1]
    with pytest.raises(BlocksError, match="it is shared: it stands in 2 and runs in 2 places"):
        swappable(net, resect.find_blocks(net, x))
    tied = Net((False, False)).eval()
    tied.layers[1].a.up.weight = tied.layers[0].a.up.weight
    with pytest.raises(BlocksError, match="it shares parameters with other modules"):
        swappable(tied, resect.find_blocks(tied, x))


def test_downsampling_layers_stay_where_they_are():
    class Bent(Conv):
        def __init__(self):
            super().__init__(4, 4)
            self.side = nn.Conv2d(4, 4, 1)

    net, x = nn.Sequential(Bent(), Bent(), Conv(4, 4), Conv(4, 4), nn.Flatten()).eval(), torch.randn(2, 4, 6, 6)
    assert swappable(net, resect.find_blocks(net, x))[1] == [["2", "3"]]


def test_everything_stands_where_it_stood_after_an_exception(stages):
    net, blocks, x = stages
    before = list(net.named_modules())

    def breaks(output, batch):
        if output.sum() != whole:
            raise RuntimeError("mine")
        return output[:, 0]

    whole = net(x).sum()
    with pytest.raises(RuntimeError, match="mine"):
        resect.lesion_study(net, blocks, [(x, x)], metric=breaks, each=False, swaps=[3])
    assert list(net.named_modules()) == before
    assert not net.one[0]._forward_pre_hooks


def test_a_model_that_holds_its_layers_twice_is_caught():
    class Twice(Net):
        def __init__(self):
            super().__init__()
            object.__setattr__(self, "hidden", list(self.layers))

        def forward(self, x):
            x = self.stem(x)
            for layer in self.hidden:
                x = layer(x)
            return self.head(x)

    net, x = Twice().eval(), torch.randn(4, 5)
    with pytest.raises(InputError, match="did not run in the order they were put in"):
        resect.lesion_study(net, resect.find_blocks(net, x), [(x, torch.zeros(4).long())], each=False, swaps=[1])
