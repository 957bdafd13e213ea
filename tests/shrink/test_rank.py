"""Scores and searches, each against a slow reference on nets of a few blocks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from nets import Net
from torch import nn

import resect
from resect.blocks.example import Example, forward_batch
from resect.errors import BlocksError, InputError
from resect.shrink import search
from resect.shrink.missed import Missed
from resect.shrink.recoverability import recoverability
from resect.shrink.streams import stream_scores

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def setup():
    torch.manual_seed(0)
    net = Net((False, True, False, False)).eval()  # five blocks, two of them branches of one sum
    for parameter in net.parameters():
        parameter.data.mul_(2)
    data = [(torch.randn(size, 5), torch.randint(4, (size,))) for size in (8, 3)]
    return net, resect.find_blocks(net, data[0][0]), data


def error_of(net, data):
    losses = [nn.functional.cross_entropy(net(x), y, reduction="none") for x, y in data]
    return float(torch.cat(losses).detach().double().mean())


def error_without(net, blocks, data, names):
    return error_of(resect.remove(net, blocks, list(names)), data)


def test_greedy_is_exhaustive_greedy_by_really_removing(setup):
    net, blocks, data = setup
    ranking = resect.rank(net, blocks, data, unit="block", search="greedy", metric="cross_entropy")
    assert ranking.baseline == pytest.approx(error_of(net, data))
    gone = []
    for rung in ranking.ladder:
        errors = {
            name: error_without(net, blocks, data, [*gone, name]) for name in reversed(blocks.names) if name not in gone
        }
        gone.append(min(errors, key=errors.get))
        assert list(rung.units) == gone
        assert rung.value == pytest.approx(errors[gone[-1]])


def test_once_follows_the_scores_and_measure_measures_each_rung(setup):
    net, blocks, data = setup
    ranking = resect.rank(net, blocks, data, unit="block", metric="cross_entropy")
    whole = error_of(net, data)
    for name, score in ranking.scores.items():
        assert score == pytest.approx(error_without(net, blocks, data, [name]) - whole, abs=1e-9)
    assert [rung.units for rung in ranking.ladder] == [tuple(ranking.order[: n + 1]) for n in range(5)]
    assert ranking.ladder[2].value is None
    known = ranking.measure(net, data, metric="cross_entropy")
    for rung in known.ladder:
        assert rung.value == pytest.approx(error_without(net, blocks, data, rung.units))


def test_runs_are_the_best_of_all_runs(setup):
    net, blocks, data = setup
    ranking = resect.rank(net, blocks, data, unit="block", search="runs", metric="cross_entropy")
    for length, rung in enumerate(ranking.ladder, start=1):
        every = {
            tuple(blocks.names[at : at + length]): error_without(net, blocks, data, blocks.names[at : at + length])
            for at in range(6 - length)
        }
        assert rung.units == min(every, key=every.get)
        assert rung.value == pytest.approx(every[rung.units])


@pytest.mark.parametrize("seed", range(20))
def test_beam_never_ends_above_greedy_and_a_wide_one_is_exhaustive(seed):
    generator = torch.Generator().manual_seed(seed)
    sets = [frozenset(c) for size in range(6) for c in itertools.combinations(range(5), size)]
    values = dict(zip(sets, torch.rand(len(sets), generator=generator).tolist(), strict=True))

    def value(places):
        return [values[frozenset(at)] for at in places]

    def rises(gone, places):
        return [values[frozenset((*gone, *at))] - values[frozenset(gone)] for at in places]

    steps = list(search.greedy(5, 5, rises, lambda _: 1.0))
    beams = {width: list(search.beam(5, 5, value, width)) for width in (1, 3, 10)}
    for size in range(5):
        steep, narrow, usual, wide = (value([found[size]])[0] for found in (steps, *beams.values()))
        assert wide <= usual <= steep
        assert narrow <= steep
        assert wide == min(values[at] for at in sets if len(at) == size + 1)


def test_beam_is_measured_on_the_model(setup):
    net, blocks, data = setup
    ranking = resect.rank(net, blocks, data, unit="block", search="beam", metric="cross_entropy", depth=2)
    pairs = {pair: error_without(net, blocks, data, pair) for pair in itertools.combinations(blocks.names, 2)}
    assert ranking.ladder[1].value >= min(pairs.values()) - 1e-9
    assert ranking.ladder[1].value == pytest.approx(pairs[ranking.ladder[1].units])
    assert len(ranking.ladder) == 2


def streams_of(net, x):
    """The stream before each layer, and after the last."""
    found = [net.stem(x)]
    for layer in net.layers:
        found.append(layer(found[-1]))
    return found


def test_influence_angle_and_size_against_a_loop(setup):
    net, blocks, data = setup
    sums = {"influence": [0.0] * 4, "angle": [0.0] * 4, "size": [0.0] * 4}
    for x, _ in data:
        with torch.no_grad():
            streams = streams_of(net, x)
        for place, (a, b) in enumerate(itertools.pairwise(streams)):
            for one, other in zip(a, b, strict=True):
                cosine = float(one @ other / (one.norm() * other.norm()))
                sums["influence"][place] += 1 - cosine
                sums["angle"][place] += math.acos(cosine) / math.pi
                sums["size"][place] += float((other - one).norm() / one.norm())
    for by, expected in sums.items():
        ranking = resect.rank(net, blocks, [x for x, _ in data], by=by)  # layers, without labels
        assert ranking.unit == "layer"
        assert list(ranking.scores) == ["layers.0", "layers.1", "layers.2", "layers.3"]
        assert list(ranking.scores.values()) == pytest.approx([total / 11 for total in expected], rel=1e-5)


def test_angle_over_runs_and_again_after_each_cut(setup):
    net, blocks, data = setup
    ranking = resect.rank(net, blocks, data, by="angle", search="runs")
    with torch.no_grad():
        streams = streams_of(net, torch.cat([x for x, _ in data]))
    for length, rung in enumerate(ranking.ladder, start=1):
        found = {
            at: nn.functional.cosine_similarity(streams[at], streams[at + length]).acos().mean().item()
            for at in range(5 - length)
        }
        start = min(found, key=found.get)
        assert rung.units == tuple(f"layers.{n}" for n in range(start, start + length))
    greedy = resect.rank(net, blocks, data, by="influence", search="greedy", depth=2)
    first, second = greedy.ladder[1].units
    with resect.closed(net, greedy.names([first])):
        rest = blocks.select([name for name in blocks.names if name not in greedy.names([first])])
        again = resect.rank(net, rest, data, by="influence")
    assert again.order[0] == second


def test_taylor_is_the_slope_of_the_loss_by_a_factor_on_the_branch(setup):
    net, blocks, data = setup
    ranking = resect.rank(net, blocks, data, by="taylor", unit="block")
    assert all(parameter.grad is None for parameter in net.parameters())
    step, names = 1e-3, blocks.names
    for name in names:
        total = 0.0
        for x, y in data:
            losses = []
            for factor in (1 + step, 1 - step):
                with resect.gates(net.double(), blocks) as g, torch.no_grad():
                    g[name].scale(factor)
                    losses.append(nn.functional.cross_entropy(net(x.double()), y, reduction="none"))
                net.float()
            total += float(((losses[0] - losses[1]) / (2 * step)).abs().sum())
        assert ranking.scores[name] == pytest.approx(total / 11, rel=1e-3)


def test_tokens_padding_and_the_last_place():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 6)
            self.layers = Net((False, False)).layers
            self.head = nn.Linear(6, 10)

        def forward(self, input_ids, attention_mask=None, labels=None):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = layer(x)
            return self.head(x)

    torch.manual_seed(1)
    net = Tokens().eval()
    ids = torch.randint(10, (2, 5))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    blocks = resect.find_blocks(net, Example((), {"input_ids": ids}))
    with torch.no_grad():
        before = net.embed(ids)
        after = net.layers[0](before)
    cosine = nn.functional.cosine_similarity(before, after, dim=-1)
    data = [{"input_ids": ids, "attention_mask": mask}]
    influence = resect.rank(net, blocks, data, by="influence").scores["layers.0/a"]
    assert influence == pytest.approx(float(1 - cosine[mask.bool()].mean()), rel=1e-5)
    angle = resect.rank(net, blocks, data, by="angle").scores["layers.0/a"]
    assert angle == pytest.approx(float(cosine[[0, 1], [2, 4]].acos().mean() / math.pi), rel=1e-5)


def test_recoverability_is_a_short_fit_for_each_unit(setup):
    net, blocks, data = setup
    ranking = resect.rank(net, blocks.select(blocks.names[3:]), data, by="recoverability", search="greedy", depth=1)
    for name, score in ranking.scores.items():
        assert score == recoverability(net, blocks, name, data)
    assert ranking.ladder[0].units == (min(ranking.scores, key=ranking.scores.get),)
    with pytest.raises(InputError, match=r"seed must be a whole number .*, not -1"):
        resect.rank(net, blocks, data, by="recoverability", seed=-1)
    fewer = resect.rank(net, blocks, data, by="recoverability", steps=2, seed=1)
    assert fewer.scores["layers.3"] == recoverability(net, blocks, "layers.3", data, steps=2, seed=1)


@pytest.mark.parametrize("search", ["once", "greedy"])
def test_every_unit_is_fitted_on_the_same_samples(setup, search):
    net, blocks, _ = setup
    data = [torch.randn(256, 5) for _ in range(8)]
    options = {"by": "recoverability", "search": search, "depth": 2, "steps": 1}
    wanted = resect.rank(net, blocks, data, **options)
    assert resect.rank(net, blocks, iter(data), **options).scores == wanted.scores
    assert len({*wanted.scores.values()}) > 1


def test_controls_and_numbers_of_ones_own(setup):
    net, blocks, _ = setup
    assert [rung.units[-1] for rung in resect.rank(net, blocks, by="last").ladder] == [
        "layers.2", "layers.1", "layers.0", "layers.3"
    ]  # fmt: skip
    orders = {tuple(resect.rank(net, blocks, by="random", seed=seed).order) for seed in range(8)}
    assert len(orders) > 1
    assert resect.rank(net, blocks, by="random", seed=3) == resect.rank(net, blocks, by="random", seed=3)
    numbers = {"layers.0": 3, "layers.1": -2, "layers.2/a": 0.5, "layers.3": 7}
    ranking = resect.rank(net, blocks, by=numbers)
    assert ranking.scores == {"layers.0": 3, "layers.1": -2, "layers.2": 0.5, "layers.3": 7}
    assert ranking.by == "numbers"
    assert ranking.order[0] == "layers.1"
    for by in ("last", "random"):
        control = resect.rank(net, blocks, by=by)
        assert not any(line.rstrip().split()[-1][0] in "+-" for line in str(control).splitlines()[1:])
        assert not control.choose(n=2).scores
    assert ranking.choose(n=2).scores
    text = str(ranking)
    assert text.startswith("4 layers by numbers, search: once")
    assert "+ layers.2" in text


def test_the_model_is_left_alone(setup):
    net, blocks, data = setup
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for by in ("influence", "taylor"):
        resect.rank(net, blocks, data, by=by, search="greedy", depth=2)
    assert all(module.training for module in net.modules())
    net.eval()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not resect.blocks.gate.held(net)


@pytest.mark.parametrize("search", ["once", "runs"])
def test_a_layer_with_another_shortcut_inside_has_no_score_of_the_stream(search):
    class Layer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.first = Net((False,)).layers[0]
            self.shortcut = nn.Linear(6, width)
            self.branch = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, width))

        def forward(self, x):
            x = self.first(x)
            return self.shortcut(x) + self.branch(x)

    torch.manual_seed(0)
    net, x = nn.Sequential(Layer(6), Layer(8), nn.Linear(8, 4)).eval(), torch.randn(4, 6)
    blocks = resect.find_blocks(net, x)
    assert {name: len(layer) for name, layer in blocks.layers().items()} == {"0": 2, "1": 2}
    for by in ("influence", "angle", "size"):
        with pytest.raises(BlocksError, match=r"(?s)comes a shortcut that is no identity.*unit='block'.*'0': .*'1': "):
            resect.rank(net, blocks, [x], by=by, search=search)
    data = [(x, torch.tensor([0, 1, 2, 3]))]
    assert len(resect.rank(net, blocks, data, by="lesion", search=search).scores) == 2


def test_a_metric_of_taylor_is_one_differentiable_number_per_sample(setup):
    net, blocks, data = setup
    mean = lambda output, batch: nn.functional.cross_entropy(output, batch[1])  # noqa: E731
    wrong = lambda output, batch: (output.argmax(1) != batch[1]).float()  # noqa: E731
    with pytest.raises(InputError, match="must return one number per sample"):
        resect.rank(net, blocks, data, by="taylor", metric=mean)
    with pytest.raises(InputError, match="no gradient comes of this one"):
        resect.rank(net, blocks, data, by="taylor", metric=wrong)


def test_what_cannot_be_ranked_is_refused(setup):
    net, blocks, data = setup
    for options, message in (
        ({"by": "lesions"}, "Did you mean 'lesion'"),
        ({"search": "gredy"}, "Did you mean 'greedy'"),
        ({"unit": "layers"}, "Did you mean 'layer'"),
        ({"by": "last", "search": "greedy"}, "changes nothing of by='last'"),
        ({"by": "influence", "search": "beam"}, "goes with by='lesion'"),
        ({"depth": 9}, "depth must be"),
        ({"by": {"layers.0": 1, "layer.1": math.nan}}, "'layer.1' is no block or unit here; did you mean 'layers.1'"),
        ({"by": {"layers.0": math.inf}}, "no finite number"),
        ({"by": {"layers.0": 1.0}}, "no number for 'layers.1/a'"),
        ({"by": {"layers.0": 1.0}, "search": "beam"}, "numbers of your own"),
        ({"by": "lesions", "unit": "layers"}, "(?s)2 problems.*'lesion'.*'layer'"),
        ({"by": "size", "steps": 9}, "steps=9 are those of the fit of by='recoverability', .* with by='size'"),
        ({"by": {"layers.0": 1.0}, "steps": 9}, "none with numbers of your own"),
        ({"search": "beam", "width": 2.5}, "width must be a whole number of at least 1, not 2.5"),
        ({"by": "recoverability", "steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ({"by": "recoverability", "steps": 2.5}, "not 2.5"),
    ):
        with pytest.raises(InputError, match=message):
            resect.rank(net, blocks, data, **options)
    with pytest.raises(InputError, match="needs data"):
        resect.rank(net, blocks)
    with pytest.raises(InputError, match="runs dry"):
        resect.rank(net, blocks, iter(data), search="greedy")
    with pytest.raises(BlocksError, match="nothing to rank"):
        resect.rank(net, blocks[:0], data)
    for by in ("influence", "taylor", "lesion", "recoverability"):
        for nothing in ([], [(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))]):
            with pytest.raises(InputError, match="no samples"):
                resect.rank(net, blocks, nothing, by=by)
    for by in ("influence", "taylor", "lesion"):
        bad = [(torch.full((2, 5), math.nan), torch.zeros(2, dtype=torch.long))]
        with pytest.raises(InputError, match="NaN"):
            resect.rank(net, blocks, bad, by=by, metric="cross_entropy")


def test_runs_do_not_cross_another_shortcut():
    class Projected(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = Net((False, False, False)).layers
            self.shortcut = nn.Linear(6, 6)
            self.branch = nn.Sequential(nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 6))

        def forward(self, x):
            x = self.layers[0](x)
            x = self.shortcut(x) + self.branch(x)
            return self.layers[2](self.layers[1](x))

    torch.manual_seed(0)
    net, x = Projected().eval(), torch.randn(4, 6)
    blocks = resect.find_blocks(net, x)
    assert [block.shortcut for block in blocks] == ["identity", "projection", "identity", "identity"]
    ranking = resect.rank(net, blocks, [x], by="influence", search="runs")
    assert [len(rung.units) for rung in ranking.ladder] == [1, 2, 3]
    assert blocks.names[0] not in ranking.ladder[2].units
    with pytest.raises(InputError, match=r"no set of 4 blocks.*: no run of 4 .*another shortcut.*choose\(n=3\)"):
        ranking.choose(n=4)
    short = resect.rank(net, blocks, [x], by="influence", search="runs", depth=2)
    with pytest.raises(InputError, match=r"no set of 3 blocks.*: rank\(\) was called with depth=2"):
        short.choose(n=3)
    with pytest.raises(InputError, match=r"no set of 3 blocks.*: keep= holds some"):
        ranking.choose(n=3, keep=blocks.names[2])


def test_what_is_gone_already_is_closed_and_counts_as_gone(setup):
    net, blocks, data = setup
    gone, unit = ("layers.0/a",), ("layers.2/a",)
    again = stream_scores(net, blocks, data, gone, [unit], "size", forward_batch)
    with resect.closed(net, blocks.select(gone)):
        assert again == stream_scores(net, blocks, data, (), [unit], "size", forward_batch)
    assert again != stream_scores(net, blocks, data, (), [unit], "size", forward_batch)
    missed = Missed(net, blocks, data, "cross_entropy", forward_batch, None)
    both, first = (error_without(net, blocks, data, names) for names in ((*gone, *unit), gone))
    missed.values([gone])
    assert missed.rises(gone, [unit]) == pytest.approx([both - first])


def test_what_is_missed_is_counted_per_gain():
    assert [search.worth(*pair) for pair in ((2, 0.5), (0, 0.5), (-2, 0.5))] == [4, 0, -1]
    rises = {0: 1.0, 1: 1.2, 2: -0.5}
    gains = {(0,): 0.1, (1,): 0.4, (2,): 0.1}
    order = search.greedy(3, 3, lambda _, sets: [rises[at] for (at,) in sets], gains.__getitem__)
    assert list(order) == [(2,), (2, 1), (2, 1, 0)]
