"""Every study against the slow way: close by hand, run, take the mean."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net
from torch import nn

import resect
from resect.blocks.intercept import Intercepted
from resect.errors import BlocksError, InputError

pytestmark = pytest.mark.core
loss = nn.functional.cross_entropy


@pytest.fixture(scope="module")
def setup():
    torch.manual_seed(0)
    net, x, y = Net((False, False, True, False)).eval(), torch.randn(50, 5), torch.randint(0, 4, (50,))
    return net, resect.find_blocks(net, x), [(x[:32], y[:32]), (x[32:], y[32:])], (x, y)


def slowly(setup, closed):
    net, _, _, (x, y) = setup
    with resect.closed(net, list(closed)), torch.no_grad():
        return loss(net(x), y).item()


def study(setup, **wanted):
    net, blocks, data, _ = setup
    return resect.lesion_study(net, blocks, data, **({"metric": "cross_entropy", "each": False} | wanted))


def test_runs_groups_and_pairs_are_what_their_names_say(setup):
    names = setup[1].names
    found = study(setup, runs=[2, 5], groups=["layer", "stage", "part", "kind"], pairs=True)
    assert [x.closed for x in found.of("runs")] == [*itertools.pairwise(names), tuple(names)]
    layers = [(names[0],), (names[1],), tuple(names[2:4]), (names[4],)]
    assert [x.closed for x in found.of("by layer")] == layers
    for grouping in ("stage", "part", "kind"):
        assert [x.closed for x in found.of(f"by {grouping}")] == [tuple(names)]
    assert [x.closed for x in found.of("pairs")] == list(itertools.combinations(names, 2))
    for lesion in found.lesions:
        assert lesion.value == pytest.approx(slowly(setup, lesion.closed), rel=1e-5)
        assert lesion.k == len(lesion.closed)


def test_interaction_is_what_both_cost_beyond_each(setup):
    whole = slowly(setup, ())
    rows = study(setup, pairs=True).interactions()
    assert len(rows) == 10
    for row in rows:
        one, other = slowly(setup, [row["one"]]) - whole, slowly(setup, [row["other"]]) - whole
        both = slowly(setup, [row["one"], row["other"]]) - whole
        assert row["interaction"] == pytest.approx(both - one - other, abs=1e-5)


def test_greedy_closes_what_is_missed_least_at_every_step(setup):
    gone: list[str] = []
    for lesion in study(setup, greedy=True).of("greedy"):
        values = {name: slowly(setup, [*gone, name]) for name in setup[1].names if name not in gone}
        assert lesion.value == pytest.approx(min(values.values()), rel=1e-5)
        assert lesion.label == min(values, key=values.get)
        gone.append(lesion.label)
        assert set(lesion.closed) == set(gone)
    assert len(gone) == 5
    assert len(study(setup, greedy=2).of("greedy")) == 2


def test_sub_networks_and_their_ensembles_are_the_hand_made_ones(setup):
    net, blocks, _, (x, y) = setup
    found = study(setup, paths=[0, 2, 4], draws=5, seed=1)
    by_place = {(lesion.k, lesion.draw): lesion for lesion in found.of("paths")}
    assert [sum(length == k for length, _ in by_place) for k in (0, 2, 4)] == [1, 5, 2]  # there are 1, 9 and 2
    outputs = {}
    for (length, draw), lesion in by_place.items():
        kept = [name for name in blocks.names if name not in lesion.closed]
        assert len(kept) == length
        assert len({blocks[name].sum for name in kept}) == length
        assert lesion.value == pytest.approx(slowly(setup, lesion.closed), rel=1e-5)
        with resect.closed(net, list(lesion.closed)), torch.no_grad():
            outputs[length, draw] = net(x).softmax(dim=-1)
    teams = found.of("ensembles")
    assert sorted({(t.k, t.members, t.draw) for t in teams}) == [
        (2, 2, 0), (2, 2, 1), (2, 4, 0), (4, 2, 0),
    ]  # fmt: skip
    for team in teams:
        first = team.draw * team.members
        mean = torch.stack([outputs[team.k, d] for d in range(first, first + team.members)]).mean(dim=0)
        assert team.value == pytest.approx(nn.functional.nll_loss(mean.log(), y).item(), rel=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 5), st.integers(0, 99))
def test_draws_are_functions_of_names_and_seed(k, seed):
    from resect.analyse.subsets import random_subsets

    torch.manual_seed(0)
    blocks = resect.find_blocks(Net((False, False, True, False)), torch.randn(4, 5))
    drawn = list(random_subsets(blocks, [k], 3, seed))
    assert len(drawn) == (1 if k in (0, 5) else 3)
    assert [*drawn, *drawn] == list(random_subsets(blocks, [1, k, k], 3, seed))[3:]
    assert all(len(subset.closed) == k for subset in drawn)


def test_no_subset_is_measured_twice_and_where_all_are_there_is_no_interval(setup):
    names = setup[1].names
    found = study(setup, random_counts=[0, 1, 2, 5], paths=[0, 1, 2], draws=9)
    drawn = {k: [x.closed for x in found.random if x.k == k] for k in (0, 1, 2, 5)}
    assert drawn[0] == [()]
    assert drawn[1] == [(name,) for name in names]
    assert len(drawn[2]) == len(set(drawn[2])) == 9  # of 10
    assert drawn[5] == [tuple(names)]
    rows = {row["k"]: row for row in found.by_count()}
    assert [rows[k]["every"] for k in (0, 1, 2, 5)] == [True, True, False, True]
    assert all(row["low"] == row["mean"] == row["high"] for k, row in rows.items() if k != 2)
    assert rows[2]["low"] < rows[2]["mean"] < rows[2]["high"]
    kept = {k: [x.closed for x in found.of("paths") if x.k == k] for k in (0, 1, 2)}
    assert [(len(x), len(set(x))) for x in kept.values()] == [(1, 1), (5, 5), (9, 9)]
    assert {row["k"]: row["every"] for row in found.by_count("paths")} == {0: True, 1: True, 2: True}
    text = str(found)
    for said in ("(all 5 subsets)", "(the only subset)", "(all 9 sub-networks)", "9 draws)"):
        assert said in text


def test_one_number_or_one_grouping_alone_is_taken_and_unknown_studies_are_told(setup):
    alone = study(setup, random_counts=2, runs=2, groups="layer", swaps=1, paths=3, draws=2)
    assert alone == study(setup, random_counts=[2, 2], runs=[2], groups=["layer"], swaps=[1], paths=[3], draws=2)
    assert alone.of("greedy") == ()
    with pytest.raises(InputError, match=r"Unknown study 'gready'\. Did you mean 'greedy'"):
        alone.of("gready")


def test_the_text_says_units_and_what_is_a_change(setup):
    lines = str(study(setup, metric="top1", each=True, random_counts=[1])).splitlines()
    assert lines[0].startswith("top1 of the whole model: ")
    assert lines[0].endswith(" %")
    assert lines[1] == "change with one block closed (points of %):"
    assert lines[-2] == "top1 itself (not its change):"
    assert lines[-1].endswith(" %  (all 5 subsets)")
    assert "%" not in str(study(setup, each=True)).splitlines()[1]


def test_draws_that_do_not_collide_are_those_of_the_first_release(setup):
    import random

    from resect.analyse.subsets import random_subsets

    names = setup[1].names
    before = [set(random.Random(f"0/2/{draw}").sample(names, 2)) for draw in range(9)]
    now = [set(subset.closed) for subset in random_subsets(setup[1], [2], 9, 0)]
    fresh = [place for place, one in enumerate(before) if one not in before[:place] and one not in now[:place]]
    assert 3 < len(fresh) < 9
    assert all(now[place] == before[place] for place in fresh)


def test_progress_counts_to_the_end_whatever_was_known_already(setup):
    told = []
    every = {"each": True, "random_counts": [1], "runs": [1], "groups": ["layer"], "greedy": True, "pairs": True}
    study(setup, **every, swaps=[1], paths=[2], draws=2, progress=lambda *now: told.append(now))
    total = 5 + 2 + 5 + 4 + 15 + 10 + 2 + 2
    assert told[-1] == (total, total)
    assert told == sorted(told)
    assert {of for _, of in told} == {total}


def test_rows_hold_all_that_is_drawn(setup):
    found = study(setup, each=True, greedy=1, pairs=True, swaps=[2], paths=[3], draws=2)
    rows = found.rows()
    assert len(rows) == len(found.lesions) == 5 + 10 + 1 + 2 + 2 + 1
    assert {row["study"] for row in rows} == {"each", "greedy", "pairs", "swaps", "paths", "ensembles"}
    assert all(row["value"] - row["baseline"] == row["change"] for row in rows)
    assert {row["part"] for row in rows if row["study"] == "each"} == {"mlp"}
    text = str(found)
    assert "10 pairs of blocks" in text
    assert "2 swaps of layers (mean Kendall τ" in text


def test_what_was_measured_is_not_measured_again(setup, monkeypatch):
    from resect.analyse import measuring

    asked = []

    def measured(model, blocks, data, subsets, *others, **more):
        asked.extend(subsets)
        return real(model, blocks, data, subsets, *others, **more)

    real = measuring.measured
    monkeypatch.setattr(measuring, "measured", measured)
    study(setup, each=True, runs=[1], random_counts=[1], groups=["layer"], greedy=2)
    assert len(asked) == len(set(asked)) == 5 + 1 + 4


def test_perplexity_is_the_exponential_of_the_mean_in_every_study(setup):
    every = {"each": True, "swaps": [1], "paths": [2], "draws": 2}
    nats = study(setup, **every)
    found = study(setup, **every, metric="perplexity")
    assert found.baseline == pytest.approx(math.exp(nats.baseline))
    for one, other in zip(nats.lesions, found.lesions, strict=True):
        assert other.value == pytest.approx(math.exp(one.value))


def test_a_study_goes_on_from_its_store_and_takes_an_evaluation(setup, tmp_path):
    calls = []

    def forward(model, batch):
        calls.append(batch)
        return model(batch[0])

    wanted = {"each": True, "random_counts": [2], "greedy": 3, "pairs": True, "store": tmp_path / "s.jsonl"}
    one = study(setup, **wanted, forward=forward)
    first = len(calls)
    assert study(setup, **wanted, forward=forward) == one
    whole_passes = len(calls) - first
    assert whole_passes < first / 2  # the check that nothing is random, and the whole model once a step

    def evaluate(model, batch):
        return loss(model(batch[0]), batch[1], reduction="none")

    other = study(setup, each=True, swaps=[1], evaluate=evaluate)
    assert other.metric == "evaluate"
    assert [x.value for x in other.each] == pytest.approx([x.value for x in one.each])
    with pytest.raises(InputError, match="paths need a metric"):
        study(setup, paths=[1], evaluate=evaluate)


class Noisy(nn.Module):
    """Dropout that does not ask whether it trains."""

    def __init__(self):
        super().__init__()
        self.net = Net((False, False))
        self.forget = nn.Linear(5, 5)
        self.forget.register_forward_hook(lambda _, __, output: nn.functional.dropout(output))

    def forward(self, x):
        return self.net(self.forget(x))


class Constant(Noisy):
    def forward(self, x):
        return self.net(x) + 0 * nn.functional.dropout(x).sum()


def test_a_model_that_is_random_in_eval_mode_is_refused_and_the_place_named(setup):
    data = setup[2]
    net = Constant()
    blocks = resect.find_blocks(net, data[0][0])
    with pytest.warns(UserWarning, match="'forget' has hooks"):
        assert resect.lesion_study(net, blocks, data).each
    noisy = Noisy()
    noisy.load_state_dict(net.state_dict())
    with pytest.raises(InputError, match=r"differ, though it is in eval mode: .* first in 'forget' \(Linear\)"):
        resect.lesion_study(noisy, blocks, data)


def test_dropout_modules_and_train_mode_do_not_disturb(setup):
    net = nn.Sequential(nn.Dropout(0.5), Net((False, False)))
    blocks = resect.find_blocks(net.eval(), setup[3][0])
    still = resect.lesion_study(net, blocks, setup[2])
    net.train()
    net[1].layers[0].eval()
    assert resect.lesion_study(net, blocks, setup[2]) == still
    assert net.training
    assert net[0].training
    assert not net[1].layers[0].training


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"runs": [6]}, "There is no run of 6 neighbouring blocks: there are 5"),
        ({"runs": [0]}, "no run of 0"),
        ({"random_counts": [1.5]}, r"random_counts must be whole numbers, as \[1, 2, 4\], but holds 1.5"),
        ({"paths": "3"}, "paths must be whole numbers, .* holds '3'"),
        ({"swaps": True}, "swaps must be whole numbers, .* holds True"),
        ({"groups": ["stages"]}, r"Unknown grouping of blocks 'stages'\. Did you mean 'stage'"),
        ({"greedy": 6}, "from 0 to 5, but is 6"),
        ({"paths": [5]}, "no path of length 5: the longest has 4"),
        ({"swaps": [-1]}, "Cannot swap -1"),
        ({"draws": 0}, "draws must be a whole number of at least 1"),
        ({"metric": lambda output, batch: loss(output, batch[1])}, r"one number per sample.*reduction='none'"),
        ({"metric": lambda output, batch: 3.0}, r"'<lambda>' returned 3.0 for a batch of 32 samples"),
        ({"metric": lambda output, batch: output}, r"returned a tensor of shape \(32, 4\)"),
        ({"metric": lambda output, batch: output.sum(1) * math.nan, "each": True}, "NaN"),
        ({"metric": 3}, "metric must be one of"),
        ({"metric": "top5", "each": True}, "top5 needs at least 5 classes; this model has 4"),
    ],
)
def test_bad_wishes_are_refused_before_anything_is_changed(setup, wanted, message):
    net = setup[0]
    with pytest.raises(InputError, match=message):
        study(setup, **wanted)
    assert not any(isinstance(module, Intercepted) for module in net.modules())


def test_one_block_alone(setup):
    torch.manual_seed(0)
    net = Net((False,))
    blocks = resect.find_blocks(net, torch.randn(4, 5))
    found = resect.lesion_study(net, blocks, setup[2], greedy=True, runs=[1], paths=[0, 1], draws=2)
    assert len(found.lesions) == 1 + 1 + 1 + 2
    with pytest.raises(InputError, match="Pairs need at least two blocks"):
        resect.lesion_study(net, blocks, setup[2], pairs=True)
    with pytest.raises(BlocksError, match=r"cannot be reordered: 'layers.0': no other layer is built like it"):
        resect.lesion_study(net, blocks, setup[2], swaps=[1])
    with pytest.raises(BlocksError, match="selection of residual blocks is empty"):
        resect.lesion_study(net, blocks[:0], setup[2])
