"""Numbers of paths, effective lengths and draws against plain enumeration."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from path_nets import Deep

import resect
from resect.analyse.paths import Branch, Fork, PathChooser, chain_from, chain_of, counts, names_in
from resect.errors import InputError

pytestmark = pytest.mark.core


def every_path(chain):
    """All paths, each as the set of its branches."""
    per_fork = []
    for fork in chain:
        ways = [frozenset()] if fork.shortcut else []
        for branch in fork.branches:
            ways += [path | {branch.name} for path in every_path(branch.inside)]
        per_fork.append(ways)
    return [frozenset().union(*choice) for choice in itertools.product(*per_fork)]


def named(shape, names):
    """A chain from nested lists: a chain is a list of forks, a fork a list of what is inside each branch."""
    return tuple(Fork(tuple(Branch(next(names), named(inside, names)) for inside in fork)) for fork in shape)


def chain(shape):
    return named(shape, (f"b{number}" for number in itertools.count()))


inside = st.just([]) | st.lists(st.lists(st.just([]), min_size=1, max_size=2), max_size=2)
shapes = st.lists(st.lists(inside, min_size=1, max_size=2), min_size=1, max_size=3)


@given(shapes)
def test_counts_of_parallel_and_nested_blocks_equal_enumeration(shape):
    built = chain(shape)
    lengths = Counter(len(path) for path in every_path(built))
    assert counts(built) == [lengths[k] for k in range(max(lengths) + 1)]
    for name in names_in(built):
        ahead = chain_from(built, name)
        lengths = Counter(len(path) for path in every_path(ahead))
        assert counts(ahead) == [lengths[k] for k in range(max(lengths) + 1)]


def test_what_lies_ahead_of_a_nested_block():
    built = chain([[[]], [[[[]], [[]]], []], [[]]])  # b0; b1 with b2 and b3 inside, beside b4; b5
    assert names_in(chain_from(built, "b3")) == ["b3", "b1", "b5"]
    assert {tuple(sorted(path)) for path in every_path(chain_from(built, "b3"))} == {
        ("b1",), ("b1", "b3"), ("b1", "b5"), ("b1", "b3", "b5")
    }  # fmt: skip
    assert chain_from(built, "b9") is None


def test_paths_of_a_length_are_drawn_evenly():
    built = chain([[[[[]]], []], [[]]])
    chooser, draw = PathChooser(built), random.Random(0)
    for length, number in enumerate(chooser.counts):
        seen = Counter(frozenset(chooser.draw(length, draw)) for _ in range(1000 * number))
        assert set(seen) == {path for path in every_path(built) if len(path) == length}
        assert all(850 < times < 1150 for times in seen.values())


def test_nesting_is_read_off_the_blocks():
    torch.manual_seed(0)
    net, x = Deep(), torch.randn(3, 5)
    blocks = net.blocks(x)
    arranged = [[(b.name, names_in(b.inside)) for b in fork.branches] for fork in chain_of(blocks)]
    plain, outer, last = arranged
    assert len(plain) == 2
    assert [len(inside) for _, inside in outer] == [3]
    assert len(last) == 1
    brute = Counter(len(path) for path in net.paths())
    assert resect.path_lengths(blocks) == [brute[k] for k in range(max(brute) + 1)]


def test_blocks_that_share_modules_are_not_inside_one_another():
    class Shared(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.f = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Tanh(), torch.nn.Linear(5, 5))

        def forward(self, x):
            for _ in range(3):
                x = x + self.f(x)
            return x

    blocks = resect.find_blocks(Shared(), torch.randn(2, 5))
    assert len(blocks) == 3
    assert resect.path_lengths(blocks) == [1, 3, 3, 1]


def test_paths_and_effective_lengths_of_54_blocks_are_the_papers():
    paths = counts(chain([[[]]] * 54))
    assert paths == [math.comb(54, k) for k in range(55)]
    assert sum(paths[19:36]) / 2**54 == pytest.approx(0.9802, abs=5e-5)
    found = resect.effective_lengths([0.9 if 5 <= k <= 17 else 0.001 for k in range(55)], paths)
    assert (found.low, found.high) == (5, 17)
    assert found.paths == Fraction(sum(paths[5:18]), 2**54)
    assert f"{100 * float(found.paths):.4f}" == "0.4537"
    assert str(found).startswith("Paths of 5 to 17 branches hold ")
    assert "they are 0.4537 % of all paths" in str(found)
    most = resect.effective_lengths(paths, paths)
    assert (most.low, most.high) == (20, 34)
    assert most.held == pytest.approx(0.9598, abs=1e-4)  # exact value of P(20..34)
    assert float(most.paths) == pytest.approx(most.held)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9).filter(any), st.floats(0.05, 1))
def test_effective_lengths_equal_trying_every_run(values, part):
    found = resect.effective_lengths(values, [1] * len(values), part)
    enough = [
        (high - low, -sum(values[low : high + 1]))
        for low in range(len(values)) for high in range(low, len(values))
        if sum(values[low : high + 1]) >= part * sum(values) - 1e-9
    ]  # fmt: skip
    assert (found.high - found.low, -sum(values[found.low : found.high + 1])) == min(enough)
    assert found.paths == Fraction(found.high - found.low + 1, len(values))


@pytest.mark.parametrize(("values", "message"), [([0, 0], "all are 0"), ([1, -1], "length 1 has -1")])
def test_effective_lengths_of_nothing(values, message):
    with pytest.raises(InputError, match=message):
        resect.effective_lengths(values, [1, 1])
