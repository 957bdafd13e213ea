"""Lesion studies and path counts."""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict

import pytest
import torch
from nets import Net
from torch import nn

import resect
from resect.analyse.interval import interval
from resect.analyse.subsets import random_subsets
from resect.blocks.intercept import Intercepted
from resect.errors import InputError

pytestmark = pytest.mark.core


@pytest.fixture
def setup():
    torch.manual_seed(0)
    net, x, y = Net((False, False, True, False)), torch.randn(50, 5), torch.randint(0, 4, (50,))
    return net, resect.find_blocks(net, x), [(x[:32], y[:32]), (x[32:], y[32:])], (x, y)


def test_each_lesion_equals_the_hand_made_one(setup):
    net, blocks, data, (x, y) = setup
    study = resect.lesion_study(net, blocks, data, metric="cross_entropy")
    loss = nn.functional.cross_entropy
    assert study.baseline == pytest.approx(loss(net(x), y).item(), rel=1e-5)
    assert [lesion.closed for lesion in study.each] == [(name,) for name in blocks.names]
    for lesion in study.each:
        owner, branch = lesion.closed[0].split("/")
        last = getattr(net.get_submodule(owner), branch).down
        saved = last.weight.data.clone(), last.bias.data.clone()
        last.weight.data.zero_()
        last.bias.data.zero_()
        assert lesion.value == pytest.approx(loss(net(x), y).item(), rel=1e-5)
        last.weight.data, last.bias.data = saved


def test_random_lesions_draw_the_same_subsets_and_have_intervals(setup):
    net, blocks, data, _ = setup
    a = resect.lesion_study(net, blocks, data, each=False, random_counts=[1, 3], draws=5, seed=3)
    b = resect.lesion_study(net, blocks, data, each=False, random_counts=[1, 3], draws=5, seed=3)
    c = resect.lesion_study(net, blocks, data, each=False, random_counts=[1, 3], draws=5, seed=4)
    assert a == b
    assert [lesion.closed for lesion in a.random] != [lesion.closed for lesion in c.random]
    assert [len(lesion.closed) for lesion in a.random] == [1] * 5 + [3] * 5
    for row in a.by_count():
        assert row["low"] <= row["mean"] <= row["high"]
    assert len(a.rows()) == 10


def test_the_model_is_left_exactly_as_it_was(setup):
    net, blocks, data, _ = setup
    net.train()
    net.layers[0].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}

    def breaks(output, batch):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        resect.lesion_study(net, blocks, data, metric=breaks)
    resect.lesion_study(net, blocks, data)
    assert net.training
    assert not net.layers[0].training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(isinstance(module, Intercepted) for module in net.modules())


def test_bad_input(setup):
    net, blocks, data, _ = setup
    with pytest.raises(InputError, match=r"Unknown metric 'top2'\. Did you mean"):
        resect.lesion_study(net, blocks, data, metric="top2")
    with pytest.raises(InputError, match="runs dry"):
        resect.lesion_study(net, blocks, iter(data), random_counts=[2], draws=300)
    with pytest.raises(InputError, match="no samples"):
        resect.lesion_study(net, blocks, [])
    with pytest.raises(InputError, match="Cannot close 9 blocks"):
        resect.lesion_study(net, blocks, data, random_counts=[9])
    with pytest.raises(InputError, match="NaN"):
        resect.lesion_study(net, blocks, [(torch.full((2, 5), math.nan), torch.zeros(2, dtype=torch.long))],
                            metric="cross_entropy")  # fmt: skip
    with pytest.raises(InputError, match="needs targets"):
        resect.lesion_study(net, blocks, [torch.randn(2, 5)])


def test_ranking_puts_the_least_missed_first(setup):
    net, blocks, data, _ = setup
    study = resect.lesion_study(net, blocks, data, metric="cross_entropy")
    ranking = resect.rank(net, blocks, data, unit="block", metric="cross_entropy")
    assert ranking.scores == study.scores
    perplexed = resect.lesion_study(net, blocks, data, metric="perplexity")
    assert resect.rank(net, blocks, data, unit="block", metric="perplexity").scores == perplexed.scores
    assert perplexed.baseline == pytest.approx(math.exp(study.baseline))
    assert ranking.order == sorted(study.scores, key=study.scores.get)
    plan = ranking.choose(n=2)
    assert set(plan.names) == set(ranking.order[:2])
    for wrong in (0, 6, 1.5, True):
        with pytest.raises(InputError, match="whole number from 1 to 5"):
            ranking.choose(n=wrong)


def test_the_interval_is_students():
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.303 / math.sqrt(3), 2 + 4.303 / math.sqrt(3)))
    assert interval([1.0]) == (-math.inf, math.inf)


@pytest.mark.parametrize(("freedom", "t"), [(30, 2.0423), (31, 2.0395), (40, 2.0211), (120, 1.9799), (1000, 1.9623)])
def test_the_interval_of_many_is_students_too(freedom, t):
    values = [float(number % 2) for number in range(freedom + 1)]
    low, high = interval(values)
    assert (high - low) / 2 == pytest.approx(t * statistics.stdev(values) / math.sqrt(freedom + 1), rel=2e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_counts": [1], "draws": 2.5}, "draws must be a whole number of at least 1, not 2.5"),
        ({"random_counts": [1], "draws": "3"}, "draws must be a whole number of at least 1, not '3'"),
        ({"greedy": 2.7}, "greedy must be a number of blocks from 0 to 5, but is 2.7"),
    ],
)
def test_numbers_that_are_not_whole_are_refused(setup, options, message):
    net, blocks, data, _ = setup
    with pytest.raises(InputError, match=message):
        resect.lesion_study(net, blocks, data, **options)


class Scores(OrderedDict):
    """An output as transformers has it: by name, by attribute, by place."""

    __getattr__ = OrderedDict.__getitem__


@pytest.mark.parametrize(
    ("wrap", "read"),
    [
        (lambda scores: Scores(logits=scores), lambda output: output["logits"]),
        (lambda scores: Scores(logits=scores), lambda output: output.logits),
        (lambda scores: (scores, "more"), lambda output: output[0]),
    ],
)
def test_a_metric_reads_an_ensemble_as_it_reads_the_model(setup, wrap, read):
    net, blocks, data, _ = setup
    metric = lambda output, batch: nn.functional.cross_entropy(read(output), batch[1], reduction="none")  # noqa: E731
    forward = lambda model, batch: wrap(model(batch[0]))  # noqa: E731
    study = resect.lesion_study(net, blocks, data, metric=metric, forward=forward, paths=1, draws=2)
    plain = resect.lesion_study(net, blocks, data, metric="cross_entropy", paths=1, draws=2)
    values = [lesion.value for lesion in plain.of("ensembles")]
    assert values
    assert [lesion.value for lesion in study.of("ensembles")] == pytest.approx(values)


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.float32])
def test_labels_of_any_type_are_classes(setup, kind):
    net, blocks, data, _ = setup
    other = [(x, y.to(kind)) for x, y in data]
    for metric in ("top1", "cross_entropy"):
        wanted = resect.lesion_study(net, blocks, data, metric=metric).baseline
        assert resect.lesion_study(net, blocks, other, metric=metric).baseline == wanted
    if kind is torch.float32:
        with pytest.raises(InputError, match="no whole numbers"):
            resect.lesion_study(net, blocks, [(x, y + 0.5) for x, y in other])
        return
    assert resect.block_response(net, blocks, other).rows() == resect.block_response(net, blocks, data).rows()


def test_parts_of_batches_and_lengths_are_checked(setup):
    net, blocks, data, _ = setup
    loss = nn.functional.cross_entropy
    for chunk in (0, -1, 2.5):
        with pytest.raises(InputError, match="chunk must be a whole number of at least 1"):
            resect.block_gradients(net, blocks, data[0], loss, chunk=chunk)
    found = resect.path_gradients(net, blocks, data[0], loss, samples=4)
    for part in (95, 0, float("nan")):
        with pytest.raises(InputError, match="part must be a share above 0 and at most 1"):
            found.effective(part=part)


def test_subsets_do_not_depend_on_anything_but_names_counts_and_seed():
    blocks = _blocks([1] * 9)
    assert list(random_subsets(blocks, [2], 3, 0)) == list(random_subsets(blocks, [2, 5], 3, 0))[:3]


def _blocks(branches):
    """Blocks of a net that never existed, ``branches[i]`` of them on sum i."""
    common = {
        "owner": "", "stage": 1, "shortcut": "identity", "part": "mlp", "modules": ("m",),
        "calls": (None,), "templates": ("absent",),
        "raw_parameters": (), "entries": (), "pending": (0,), "end": 0, "end_leaf": None, "exact": True,
        "owner_call": None, "counted_in": None, "places": (), "clone": False, "unwrap": False, "zeros": False,
        "spreads": False, "shape": (), "parameters": 0, "flops": 0,
    }  # fmt: skip
    names = [(place, f"b{place}.{branch}") for place, count in enumerate(branches) for branch in range(count)]
    return resect.Blocks(
        resect.ResidualBlock(name=name, index=index, sum=place, **common) for index, (place, name) in enumerate(names)
    )
