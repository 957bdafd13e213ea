"""Stochastic depth and effective paths against a forward pass written by hand with the same draws."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from chains import OPTIMIZERS, batches, chain, draw_dropped, same, twin
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import resect
from resect.errors import AttachError, InputError, ProofError
from resect.train.draws import draw_closed, draw_subset
from resect.train.masks import SampleMasks
from resect.train.schedules import Progressive, Ramp, StartAt, drop_probs

pytestmark = pytest.mark.core


def train(net, method, optimizer, data, forward=None):
    for x, y in data:
        method.begin_step()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("scaling", ["none", "inverted", "paper"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_per_batch_equals_the_formula_written_by_hand(name, scaling):
    net, _, blocks = chain()
    other = twin(net)
    optimizer, reference = OPTIMIZERS[name](net.parameters()), OPTIMIZERS[name](other.parameters())
    with resect.StochasticDepth(net, blocks, drop_prob=0.6, scaling=scaling, seed=3, optimizer=optimizer) as method:
        train(net, method, optimizer, batches(6))
    for step, (x, y) in enumerate(batches(6)):
        probs = [0.6 * (place + 1) / 7 for place in range(7)]
        kept = [1 / (1 - p) if scaling == "inverted" else 1.0 for p in probs]
        closed = draw_closed(probs, 3, step)
        assert any(closed)
        F.cross_entropy(other.by_hand(x, [None if c else k for c, k in zip(closed, kept, strict=True)]), y).backward()
        reference.step()
        reference.zero_grad()
    assert same(net, other)


@pytest.mark.parametrize("scaling", ["none", "inverted"])
def test_per_sample_equals_the_formula_written_by_hand(scaling):
    net, x, blocks = chain()
    other = twin(net)
    with resect.StochasticDepth(net, blocks, drop_prob=0.5, rule="uniform", per="sample", scaling=scaling) as method:
        method.begin_step()
        output = net(x)
        output.square().sum().backward()
        assert not torch.equal(net.eval()(x), output)
    masks = draw_dropped([0.5] * 7, 16, 0, 0)
    factors = [torch.where(mask, 0.0, 2.0 if scaling == "inverted" else 1.0)[:, None] for mask in masks]
    expected = other.by_hand(x, factors)
    expected.square().sum().backward()
    assert torch.equal(output, expected)
    gradients = zip(net.parameters(), other.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-6) for a, b in gradients)


def test_in_eval_mode_every_branch_is_open_and_a_frozen_stage_is_not_drawn():
    net, x, blocks = chain()
    other = twin(net)
    expected = twin(net).eval()(x)
    with resect.StochasticDepth(net, blocks, drop_prob=1.0, rule="uniform") as method:
        method.begin_step()
        assert torch.equal(net.eval()(x), expected)
        net.train()
        net.layers[2].eval()
        other.layers[2].eval()
        assert torch.equal(net(x), other.by_hand(x, [None, None, 1.0, None, None, None, None]))


def test_the_papers_scaling_acts_at_test_time_and_can_be_folded():
    net, x, blocks = chain()
    plain = twin(net).eval()
    method = resect.StochasticDepth(net, blocks, drop_prob=0.5, scaling="paper")
    with method:
        method.begin_step()
        scaled = net.eval()(x)
        factors = [1 - 0.5 * (place + 1) / 7 for place in range(7)]
        assert torch.equal(scaled, plain.by_hand(x, factors))
    assert not torch.allclose(net(x), scaled), "detached, the net is as it was trained"
    found = method.finalize()
    assert list(found.values()) == pytest.approx(factors)
    assert torch.allclose(net(x), scaled, atol=1e-5)


def test_what_cannot_be_folded_is_refused_and_left_as_it_was():
    class Ends(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.act = nn.Linear(4, 4), nn.Sigmoid()

        def forward(self, x):
            return x + self.act(self.a(x))

    net, x = nn.Sequential(*[Ends() for _ in range(6)]), torch.randn(4, 4)
    blocks = resect.find_blocks(net, x)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ProofError, match=r"cannot be folded into '0/a'.*inverted"):
        resect.StochasticDepth(net, blocks, scaling="paper").finalize()
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


@given(rule=st.sampled_from(["uniform", "linear", "linear-from-zero"]), count=st.integers(1, 60), p=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_rules(rule, count, p):
    probs = drop_probs(p, rule, count)
    assert len(probs) == count
    assert probs == sorted(probs)
    assert all(0 <= prob <= p + 1e-12 for prob in probs)
    if rule == "linear":
        assert probs[0] == pytest.approx(p / count)
        assert probs[-1] == pytest.approx(p)
    if rule == "linear-from-zero" and count > 1:
        assert probs[0] == 0
        assert probs == pytest.approx(torch.linspace(0, p, count, dtype=torch.float64).tolist())


def test_huangs_expected_depth():
    """p_L = 0.5 and 54 blocks: (3L - 1)/4 of them run on average (Huang 2016, section 3)."""
    assert 54 - sum(drop_probs(0.5, "linear", 54)) == pytest.approx((3 * 54 - 1) / 4)


def test_draws_have_the_right_frequencies_and_depend_on_seed_and_step_alone():
    probs = drop_probs(0.8, "linear", 9)
    drawn = torch.tensor([draw_closed(probs, 0, step) for step in range(4000)], dtype=torch.float64)
    assert torch.allclose(drawn.mean(0), torch.tensor(probs, dtype=torch.float64), atol=0.03)
    torch.manual_seed(1)
    first = draw_closed(probs, 5, 17)
    torch.manual_seed(2)
    assert draw_closed(probs, 5, 17) == first
    assert [draw_closed(probs, 5, s) for s in range(20)] != [draw_closed(probs, 6, s) for s in range(20)]
    kept = torch.tensor([draw_subset(3, 9, 0, step) for step in range(4000)], dtype=torch.float64)
    assert kept.sum(1).unique().tolist() == [3]
    assert torch.allclose(kept.mean(0), torch.full((9,), 1 / 3, dtype=torch.float64), atol=0.03)


def test_draws_per_sample_have_the_right_frequencies_and_no_two_are_alike():
    probs, samples, steps = [0.0, 0.1, 0.5, 0.5, 0.9, 1.0], 64, 400
    masks = SampleMasks(probs, None)
    rows = []
    for step in range(steps):
        masks.begin(probs, 0, step, scaled=False)
        rows.append(torch.stack([masks.dropped(place, samples, torch.device("cpu")) for place in range(len(probs))]))
    drawn = torch.stack(rows).double()  # steps, blocks, samples
    deviation = (torch.tensor(probs) * (1 - torch.tensor(probs)) / (samples * steps)).sqrt()
    assert ((drawn.mean((0, 2)) - torch.tensor(probs)).abs() <= 4 * deviation).all()
    # Neither neighbouring samples, nor blocks, nor steps know of each other.
    for one, other in (
        (drawn[:, 2, :-1], drawn[:, 2, 1:]),
        (drawn[:, 2], drawn[:, 3]),
        (drawn[:-1, 2], drawn[1:, 2]),
        (drawn[:, 2, ::2], drawn[:, 2, 1::2]),
    ):
        together = ((one - 0.5) * (other - 0.5)).mean() * 4
        assert abs(together) < 4 / one.numel() ** 0.5
    assert len({tuple(row) for row in drawn[:, 2].tolist()}) == steps


def test_several_ranks_deal_one_draw_out_between_them(monkeypatch):
    probs = [0.3, 0.7]
    whole = draw_dropped(probs, 11, 5, 9)
    for rank, samples in ((0, 4), (1, 4), (2, 3)):
        monkeypatch.setattr("resect.train.masks.rank_of_ranks", lambda rank=rank: (rank, 3))
        masks = SampleMasks(probs, None)
        masks.begin(probs, 5, 9, scaled=False)
        for place in (0, 1):
            assert torch.equal(masks.dropped(place, samples, torch.device("cpu")), whole[place, rank::3])


def test_schedules():
    assert [StartAt(2.5, 3)(step) for step in (0, 2, 3, 9)] == [0, 0, 2.5, 2.5]
    assert [Ramp(0.0, 0.5, 10)(step) for step in (0, 5, 10, 99)] == [0, 0.25, 0.5, 0.5]
    # Zhang & He 2020: keep rate (1 - 0.5) exp(-0.001 t) + 0.5
    assert 1 - Progressive()(700) == pytest.approx(0.5 * 2.718281828459045 ** (-0.7) + 0.5)
    net, _, blocks = chain()
    with resect.StochasticDepth(net, blocks, drop_prob=Ramp(0.0, 1.0, 2), rule="uniform") as method:
        seen = []
        for _ in range(3):
            method.begin_step()
            seen.append((method.drop_probs["layers.0/up"], method.open_blocks))
    assert seen[0] == (0.0, 7)
    assert seen[2] == (1.0, 0)
    method = resect.StochasticDepth(net, blocks, drop_prob=lambda step: 2.0)
    with pytest.raises(InputError, match=r"schedule gives 2\.0 at step 0"), method:
        method.begin_step()


def test_exactly_k_of_n_blocks_run():
    net, x, blocks = chain()
    other = twin(net)
    with resect.EffectivePaths(net, blocks, keep=3, seed=2) as method:
        for step in range(4):
            method.begin_step()
            stays = draw_subset(3, 7, 2, step)
            assert torch.equal(net(x), other.by_hand(x, [1.0 if stay else None for stay in stays]))
            assert method.metrics() == {"open_blocks": 3.0}
    with resect.EffectivePaths(net, blocks, keep=3, scaling="paper") as method:
        assert torch.allclose(net.eval()(x), twin(other).eval().by_hand(x, [3 / 7] * 7), atol=1e-6)
    with pytest.raises(InputError, match="keep must be a whole number between 0 and 7, the number of blocks, not 8"):
        resect.EffectivePaths(net, blocks, keep=8)


def test_every_wrong_value_is_reported_at_once():
    net, _, blocks = chain()
    with pytest.raises(InputError) as caught:
        resect.StochasticDepth(
            net, blocks, drop_prob=1.5, rule="liner", per="batches", scaling="x", seed=-1, own_drop="z"
        )
    message = str(caught.value)
    for part in ("drop_prob", "1.5", "Did you mean 'linear'", "'batches'", "scaling 'x'", "seed", "own_drop"):
        assert part in message, part
    with pytest.raises(InputError, match="7 shares, one per block, not 2"):
        resect.StochasticDepth(net, blocks, rule=[0.5, 0.5])
    with pytest.raises(InputError, match=r"rule\[6\] must be a share between 0 and 1, not 3"):
        resect.StochasticDepth(net, blocks, rule=[0.0] * 6 + [3])


def test_few_blocks_get_a_warning():
    net, _, blocks = chain(3)
    with pytest.warns(UserWarning, match="on 3 residual blocks: below 6"), resect.StochasticDepth(net, blocks):
        pass
    net, _, blocks = chain(6)
    with warnings.catch_warnings(), resect.StochasticDepth(net, blocks):
        warnings.simplefilter("error")


def test_a_forgotten_begin_step_is_noticed_without_being_given_the_optimizer():
    net, x, blocks = chain()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    bystander = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with resect.StochasticDepth(net, blocks) as method:
        method.begin_step()
        net(x).sum().backward()
        optimizer.step()
        bystander.step()
        bystander.step()
        with pytest.raises(AttachError, match=r"without StochasticDepth\.begin_step"):
            optimizer.step()
    optimizer.step()


def test_several_optimizers_step_once_each():
    net, x, blocks = chain()
    first, second = torch.optim.SGD(net.layers.parameters(), 0.1), torch.optim.AdamW(net.head.parameters())
    with resect.StochasticDepth(net, blocks) as method:
        for _ in range(2):
            method.begin_step()
            net(x).sum().backward()
            first.step()
            second.step()


def test_a_model_changed_after_attach_is_noticed():
    net, _, blocks = chain()
    with resect.StochasticDepth(net, blocks) as method:
        method.begin_step()
        kept, net.layers[3].up = net.layers[3].up, nn.Linear(4, 4)
        with pytest.raises(AttachError, match=r"module 'layers\.3\.up' was replaced by a Linear"):
            method.begin_step()
        net.layers[3].up = kept
        method.begin_step()


class DropPath(nn.Module):
    def __init__(self, drop_prob):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        keep = 1 - self.drop_prob
        return x if not self.training or not self.drop_prob else x * x.new_empty(len(x), 1).bernoulli_(keep) / keep


def test_a_models_own_drop_path_is_refused_or_replaced_never_both():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.drop = nn.Linear(4, 4), DropPath(0.25)

        def forward(self, x):
            return x + self.drop(self.f(x))

    net, x = nn.Sequential(*[Block() for _ in range(6)]), torch.randn(8, 4)
    blocks = resect.find_blocks(net, x)
    with pytest.raises(AttachError, match=r"6 places, for instance 5.drop.drop_prob = 0.25.*own_drop='replace'"):
        resect.StochasticDepth(net, blocks).attach()
    assert all(block.drop.drop_prob == 0.25 for block in net)
    with resect.StochasticDepth(net, blocks, drop_prob=0.0, own_drop="replace") as method:
        method.begin_step()
        assert torch.equal(net.train()(x), net(x)), "nothing random is left"
    assert all(block.drop.drop_prob == 0.25 for block in net)


def test_layer_drop_in_a_models_configuration_counts_as_its_own():
    net, _, blocks = chain()
    net.config = type("Config", (), {"layerdrop": 0.1})()
    with pytest.raises(AttachError, match=r"1 places, for instance config.layerdrop = 0.1"):
        resect.EffectivePaths(net, blocks, keep=2).attach()
    with resect.EffectivePaths(net, blocks, keep=2, own_drop="replace"):
        assert net.config.layerdrop == 0.0
    assert net.config.layerdrop == 0.1


def test_two_methods_on_one_block_and_attaching_twice_are_refused():
    net, _, blocks = chain()
    method = resect.StochasticDepth(net, blocks[:6])
    with method:
        with pytest.raises(AttachError, match="attached already"):
            method.attach()
        with pytest.raises(AttachError, match="already has a StochasticDepth"):
            resect.EffectivePaths(net, blocks, keep=2).attach()


def test_a_copy_keeps_the_draws_of_its_step():
    net, x, blocks = chain()
    with resect.StochasticDepth(net, blocks, per="sample", rule="uniform") as method:
        method.begin_step()
        expected = net(x)
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301 - our own bytes
            assert torch.equal(other(x), expected)


def test_per_sample_needs_the_batch_first():
    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(6))

        def forward(self, x):
            x = x.transpose(0, 1)
            for layer in self.layers:
                x = x + layer(x)
            return x.transpose(0, 1)

    net, x = Swapped(), torch.randn(3, 5, 4)
    blocks = resect.find_blocks(net, x)
    with pytest.raises(AttachError, match=r"'layers\.0' is 5 for a batch of 3"):
        resect.StochasticDepth(net, blocks, per="sample").attach()


def test_finalize_folds_once():
    net, x, blocks = chain()
    method = resect.StochasticDepth(net, blocks, drop_prob=0.5, scaling="paper")
    with method:
        expected = net.eval()(x)
    factors = method.finalize()
    assert method.finalize() == factors
    assert torch.allclose(net(x), expected, atol=1e-5)


def test_drop_path_under_another_name_is_the_models_own_too():
    class SwinDropPath(nn.Module):  # as transformers call theirs
        drop_prob = 0.25

        def forward(self, x):
            return x

    net, _, blocks = chain()
    net.drop = SwinDropPath()
    with pytest.raises(AttachError, match=r"drop.drop_prob = 0.25"):
        resect.StochasticDepth(net, blocks).attach()
    with resect.StochasticDepth(net, blocks, own_drop="replace"):
        assert net.drop.drop_prob == 0
    assert net.drop.drop_prob == 0.25
