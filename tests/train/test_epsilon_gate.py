"""The ε-gate against the paper's formula, and what an attached gate does to training."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net
from torch import nn

import resect
from resect.blocks.intercept import Intercepted
from resect.errors import AttachError, InputError
from resect.train.muting import epsilon_gate

pytestmark = pytest.mark.core


def four_relus(f, epsilon, k=1e6):
    """The authors' gate, ReLU by ReLU (papers: EpsilonResnetBase.py)."""
    relu = torch.relu
    s = (relu(f - epsilon) + relu(-f - epsilon)).max()
    gate = relu(1 - k * relu(1 - k * s))
    return gate * f


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), epsilon=st.sampled_from([0.5, 1.5, 2.5, 4.0]))
def test_value_and_gradient_equal_the_papers_four_relus(seed, epsilon):
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    if abs(float(f.abs().max()) - epsilon) < 1e-5:
        return  # on the paper's ramp, 1/K wide
    ours, theirs = f.clone().requires_grad_(), f.clone().requires_grad_()
    weight = torch.randn(3, 4, dtype=torch.float64, generator=generator)
    (epsilon_gate(ours, epsilon) * weight).sum().backward()
    (four_relus(theirs, epsilon) * weight).sum().backward()
    assert torch.equal(epsilon_gate(f, epsilon), four_relus(f, epsilon))
    assert torch.equal(ours.grad, theirs.grad)


def test_the_threshold_itself_is_muted_and_nan_is_open():
    f = torch.tensor([1.0, -2.5])
    assert torch.equal(epsilon_gate(f, 2.5), torch.zeros(2))
    assert torch.equal(epsilon_gate(f, 2.4), f)
    assert epsilon_gate(torch.tensor([float("nan"), 0.0]), 9.0).isnan().any()
    zeros = torch.zeros(3, requires_grad=True)
    epsilon_gate(zeros, 0.0).sum().backward()
    assert torch.equal(zeros.grad, torch.ones(3)), "ε = 0 is no gate, even where f is all zeros"


@pytest.fixture
def setup():
    torch.manual_seed(0)
    net, x = Net((False, True, False)), torch.randn(16, 5)
    return net, x, resect.find_blocks(net, x)


def responses(net, x, blocks):
    from resect.blocks.response import watch

    with torch.no_grad(), resect.gates(net, blocks) as gates:
        largest = watch(gates)
        net(x)
    return largest


def between(values):
    """A threshold that mutes about half of the blocks, and lies far from all of them."""
    ordered = sorted(values)
    gaps = [(b - a, (a + b) / 2) for a, b in itertools.pairwise(ordered)]
    return max(gaps)[1]


def test_epsilon_zero_changes_nothing_gradients_included(setup):
    net, x, blocks = setup
    net(x).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.zero_grad()
    with resect.EpsilonGate(net, blocks, epsilon=0.0):
        net(x).square().sum().backward()
    assert all(torch.equal(expected[name], p.grad) for name, p in net.named_parameters())


def test_muted_is_the_formula_with_zero_gradients_and_moving_statistics(setup):
    net, x, blocks = setup
    largest = responses(net, x, blocks)
    epsilon = between(largest.values())
    muted = {name for name, value in largest.items() if value <= epsilon}
    assert 0 < len(muted) < len(blocks)
    with resect.gates(net, blocks) as g:
        for name in muted:
            g[name].scale(0.0)
        expected = net(x)
    with resect.EpsilonGate(net, blocks, epsilon=epsilon, muted_at_start="allow") as method:
        output = net(x)
        method.begin_step()
        output.sum().backward()
    first = next(b for b in blocks if b.name in muted)
    if first.index == min(blocks[name].index for name in muted):
        assert torch.allclose(output, expected)
    for parameter in net.get_submodule(first.modules[0]).parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any(), "zeros, not None: weight decay must go on acting"


def test_weight_decay_and_momentum_act_on_a_muted_branch(setup):
    net, x, blocks = setup
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    before = net.layers[0].a.down.weight.detach().clone()
    with resect.EpsilonGate(net, blocks, epsilon=1e9, optimizer=optimizer, muted_at_start="allow") as method:
        for _ in range(3):
            method.begin_step()
            net(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert net.layers[0].a.down.weight.norm() < before.norm()
    assert method.metrics()["muted"] == 4.0


def test_a_net_muted_everywhere_equals_the_net_closed_everywhere(setup):
    net, x, blocks = setup
    with torch.no_grad():
        with resect.EpsilonGate(net, blocks, epsilon=1e9, muted_at_start="allow"):
            muted = net(x)
        with resect.closed(net, blocks):
            assert torch.equal(net(x), muted)


def step(method, net, x, optimizer):
    method.begin_step()
    net(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_the_plan_holds_what_was_muted_in_every_one_of_the_last_steps(setup):
    net, x, blocks = setup
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    largest = responses(net, x, blocks)
    epsilon = between(largest.values())
    with resect.EpsilonGate(net, blocks, epsilon=epsilon, optimizer=optimizer, muted_at_start="allow") as method:
        step(method, net, 100 * x, optimizer)
        for _ in range(4):
            step(method, net, x, optimizer)
        runs = method.muted_steps()
        plan = method.finalize(steps=4)
    assert plan.by == "muted"
    assert plan.names == [name for name in blocks.names if runs[name] >= 4]
    assert 0 < len(plan.names) < len(blocks)
    assert plan.evidence["largest_response"].keys() == set(blocks.names)
    with pytest.raises(InputError, match="more steps than were trained"):
        method.finalize(steps=6)


def test_one_open_micro_batch_makes_the_step_open(setup):
    net, x, blocks = setup
    first = blocks[:1]
    (value,) = responses(net, x, first).values()
    with resect.EpsilonGate(net, first, epsilon=value, muted_at_start="allow") as method:
        method.begin_step()
        net(x)
        assert method.muted_steps() == {first[0].name: 1}
        method.begin_step()
        net(x)
        with torch.no_grad():
            net.layers[0].a.down.weight.mul_(3)
        net(x)
        assert method.muted_steps() == {first[0].name: 0}
        method.begin_step()
        net(x)
        with torch.no_grad():
            net.layers[0].a.down.weight.div_(3)
        net(x)
        assert method.muted_steps() == {first[0].name: 0}, "in whatever order they come"


def test_a_diverged_branch_stays_visible(setup):
    net, x, blocks = setup
    with torch.no_grad():
        net.layers[2].a.down.bias[0] = float("nan")
    with resect.EpsilonGate(net, blocks, epsilon=1e9, muted_at_start="allow"):
        assert net(x).isnan().any()


def test_looking_at_the_start_moves_no_batch_statistics():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4))

        def forward(self, x):
            return x + self.branch(x)

    torch.manual_seed(0)
    net, x = Normed(), 5 + torch.randn(16, 4)
    blocks = resect.find_blocks(net, x)
    before = copy.deepcopy(net.state_dict())
    resect.EpsilonGate(net, blocks, epsilon=1e-3).attach().detach()
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_evaluation_is_gated_too_and_counts_nothing(setup):
    net, x, blocks = setup
    net.eval()
    with resect.EpsilonGate(net, blocks, epsilon=1e9, muted_at_start="allow") as method:
        method.begin_step()
        net(x)
        assert set(method.muted_steps().values()) == {0}


def test_state_goes_on_exactly(setup):
    net, x, blocks = setup
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    method = resect.EpsilonGate(net, blocks, epsilon=1e9, optimizer=optimizer, muted_at_start="allow")
    with method:
        for _ in range(3):
            step(method, net, x, optimizer)
    again = resect.EpsilonGate(net, blocks, epsilon=1e9, optimizer=optimizer)
    again.load_state_dict(copy.deepcopy(method.state_dict()))
    with again:
        step(again, net, x, optimizer)
        assert set(again.muted_steps().values()) == {4}
    with pytest.raises(InputError, match=r"it had 4 blocks .* and has 2"):
        resect.EpsilonGate(net, blocks[:2], epsilon=1.0).load_state_dict(method.state_dict())


def test_zero_initialised_branches_raise_at_attach_with_the_remedy(setup):
    net, _x, blocks = setup
    nn.init.zeros_(net.layers[2].a.down.weight)
    nn.init.zeros_(net.layers[2].a.down.bias)
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(AttachError, match=r"1 of 4 branches would start muted.*'layers.2/a'.*zero_init_last=False"):
        resect.EpsilonGate(net, blocks, epsilon=1e-3).attach()
    assert not any(isinstance(module, Intercepted) for module in net.modules())
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    resect.EpsilonGate(net, blocks, epsilon=1e-3, muted_at_start="allow").attach().detach()


def test_branches_just_below_epsilon_are_warned_of(setup):
    net, x, blocks = setup
    smallest = min(responses(net, x, blocks).values())
    with pytest.warns(UserWarning, match="1 of 4 branches start just below"):
        resect.EpsilonGate(net, blocks, epsilon=smallest * 1.01).attach().detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resect.EpsilonGate(net, blocks, epsilon=smallest * 0.99).attach().detach()


def test_misuse_gets_one_clear_message_and_leaves_nothing_attached(setup):
    net, _x, blocks = setup
    for epsilon in (-1, float("nan"), "2.5", True):
        with pytest.raises(InputError, match="epsilon must be a number of at least 0"):
            resect.EpsilonGate(net, blocks, epsilon=epsilon)
    with pytest.raises(resect.ResectError, match="at least one residual block"):
        resect.EpsilonGate(net, blocks[:0], epsilon=1.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = resect.EpsilonGate(net, blocks, epsilon=1e-6, optimizer=optimizer)
    with pytest.raises(AttachError, match="not attached"):
        method.begin_step()
    with method:
        with pytest.raises(AttachError, match="attached already"):
            method.attach()
        with pytest.raises(AttachError, match="already has a EpsilonGate"):
            resect.EpsilonGate(net, blocks, epsilon=1e-6).attach()
        method.begin_step()
        optimizer.step()
        with pytest.raises(AttachError, match=r"Two optimizer steps without EpsilonGate.begin_step\(\)"):
            optimizer.step()
    optimizer.step()
    assert not any(isinstance(module, Intercepted) for module in net.modules())


def test_a_copy_of_an_attached_model_keeps_its_gates_and_reports_to_nobody(setup):
    net, x, blocks = setup
    with resect.EpsilonGate(net, blocks, epsilon=1e9, muted_at_start="allow") as method:
        twin = copy.deepcopy(net)
        method.begin_step()
        twin(x)
        assert set(method.muted_steps().values()) == {0}
        assert torch.equal(twin(x), net(x))


def test_skipping_closes_a_block_once_it_was_muted_for_long_enough(setup):
    net, x, blocks = setup
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1)
    epsilon = between(responses(net, x, blocks).values())
    muted = [name for name, value in responses(net, x, blocks).items() if value <= epsilon]
    method = resect.EpsilonGate(
        net, blocks, epsilon=epsilon, skip_muted_after=3, optimizer=optimizer, muted_at_start="allow"
    )
    ran = []
    inside = net.get_submodule(blocks[muted[0]].modules[0]).up
    inside.register_forward_hook(lambda *_: ran.append(1))
    with method:
        for _ in range(3):
            method.begin_step()
            net(x)
        assert len(ran) == 3
        frozen = inside.weight.clone()
        for _ in range(4):
            method.begin_step()
            net(100 * x).sum().backward()
            assert inside.weight.grad is None
            optimizer.step()
            optimizer.zero_grad()
        assert len(ran) == 3, "a closed block is not computed, however large the input"
        assert torch.equal(inside.weight, frozen)
        assert method.muted_steps()[muted[0]] == 7
        assert muted[0] in method.finalize(steps=7).names
        again = resect.EpsilonGate(net, blocks, epsilon=epsilon, skip_muted_after=3, muted_at_start="allow")
        state = method.state_dict()
    with again:
        again.load_state_dict(state)
        again.begin_step()
        net(x)
        assert len(ran) == 3
        assert again.muted_steps()[muted[0]] == 8
    net(x)
    assert len(ran) == 4, "detached, nothing stays closed"


def test_settled_nothing_changes_any_more_and_the_rest_is_open(setup):
    net, x, blocks = setup
    epsilon = between(responses(net, x, blocks).values())
    muted = {name for name, value in responses(net, x, blocks).items() if value <= epsilon}
    method = resect.EpsilonGate(
        net, blocks, epsilon=epsilon, skip_muted_after=2, settle_after=3, muted_at_start="allow"
    )
    with method:
        for _ in range(4):
            method.begin_step()
            net(x)
        with torch.no_grad():
            output = net(1e-3 * x), net(x)
    plan = method.finalize(steps=2)
    assert set(plan.names) == muted
    with torch.no_grad(), resect.closed(net, plan.names):
        assert torch.equal(output[0], net(1e-3 * x)), "open however small the response"
        assert torch.equal(output[1], net(x))
    with pytest.raises(InputError, match="settle_after and recheck_every need skip_muted_after"):
        resect.EpsilonGate(net, blocks, epsilon=epsilon, settle_after=3)


def test_looking_at_the_counts_within_a_step_counts_nothing_twice(setup):
    net, x, blocks = setup
    with resect.EpsilonGate(net, blocks, epsilon=1e9, muted_at_start="allow") as method:
        for _ in range(3):
            method.begin_step()
            for _ in range(4):
                net(x)
                method.metrics()
                method.state_dict()
        assert set(method.muted_steps().values()) == {3}


def test_a_branch_end_frozen_in_eval_mode_is_counted(setup):
    net, x, blocks = setup
    net.layers[0].a.eval()
    with resect.EpsilonGate(net, blocks, epsilon=1e9, muted_at_start="allow") as method:
        method.begin_step()
        net(x)
        assert set(method.muted_steps().values()) == {1}


def test_the_running_mean_of_muted_blocks_is_tensorpacks(setup):
    net, x, blocks = setup
    epsilon = between(responses(net, x, blocks).values())
    wanted = 0.0
    with resect.EpsilonGate(net, blocks, epsilon=epsilon, muted_at_start="allow") as method:
        for t, scale in enumerate((1, 1, 100, 1, 100, 100)):
            method.begin_step()
            net(scale * x)
            muted = sum(value <= epsilon for value in method.responses().values())
            decay = min(0.95, (1 + t) / (10 + t))
            wanted = decay * wanted + (1 - decay) * muted
            assert method.muted_average == pytest.approx(wanted)
            assert method.metrics()["muted_average"] == pytest.approx(wanted)


def test_a_schedule_starts_the_gate_late_so_that_zero_initialised_branches_can_learn(setup):
    net, x, blocks = setup
    nn.init.zeros_(net.layers[2].a.down.weight)
    nn.init.zeros_(net.layers[2].a.down.bias)
    plain = copy.deepcopy(net)
    with resect.EpsilonGate(net, blocks, epsilon=resect.schedules.StartAt(1e9, 2)) as method:
        for muted in (0, 0, 4):
            method.begin_step()
            assert method.epsilon == (1e9 if muted else 0)
            if not muted:
                assert torch.equal(net(x), plain(x))
            net(x)
            assert method.metrics()["muted"] == muted
    method = resect.EpsilonGate(net, blocks, epsilon=lambda step: -1.0, muted_at_start="allow")
    with pytest.raises(InputError, match="epsilon must be a number at least 0"), method:
        method.begin_step()


def test_in_units_of_the_stream_the_size_of_the_stream_does_not_matter():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fs = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(4))

        def forward(self, x):
            for f in self.fs:
                x = x + f(x)
            return x

    torch.manual_seed(0)
    net, x = Scaled(), torch.randn(16, 5)
    blocks = resect.find_blocks(net, x)
    with torch.no_grad():
        net.fs[1].weight.mul_(0.05)
        stream = x + net.fs[0](x)
        small = float(net.fs[1](stream).abs().max() / stream.square().mean().sqrt())
    for scale in (1e-4, 1.0, 1e4):
        with (
            resect.EpsilonGate(net, blocks, epsilon=1.01 * small, units="stream", muted_at_start="allow") as method,
            torch.no_grad(),
        ):
            method.begin_step()
            output = net(scale * x)
            assert list(method.muted_steps().values()) == [0, 1, 0, 0]
            assert method.responses()["fs.1"] == pytest.approx(small, rel=1e-4)
        with torch.no_grad(), resect.closed(net, "fs.1"):
            assert torch.equal(output, net(scale * x))
    output = net(x)
    with resect.EpsilonGate(net, blocks, epsilon=1e-9, units="stream", muted_at_start="allow"):
        assert torch.equal(net(x), output), "open is as without a gate"


def test_closed_blocks_are_computed_again_now_and_then(setup):
    net, x, blocks = setup
    method = resect.EpsilonGate(net, blocks, epsilon=1e6, skip_muted_after=2, recheck_every=5, muted_at_start="allow")
    computed = []
    with method, torch.no_grad():
        for step in range(12):
            method.begin_step()
            net(x if step < 10 else 1e9 * x)  # layer norm: only the weights can make a response large
            computed.append(method.open_blocks)
            if step == 7:
                net.layers[0].a.down.weight.mul_(1e9)
    assert computed == [4, 4, 0, 0, 0, 4, 0, 0, 0, 0, 4, 1], "the block that a recheck leaves open stays computed"
    assert list(method.muted_steps().values()) == [0, 12, 12, 12]


def test_side_supervision_is_the_formula_and_must_be_optimised(setup):
    net, x, blocks = setup
    y = torch.arange(16) % 4
    before = torch.random.get_rng_state()
    method = resect.EpsilonGate(net, blocks, epsilon=1e-9, side=0.1, side_at="layers.1/b")
    assert torch.equal(before, torch.random.get_rng_state())
    twin = copy.deepcopy(net)
    weights = list(method.parameters())
    assert sum(p.numel() for p in weights) == 2 * 6 + 6 * 4 + 4
    with pytest.raises(AttachError, match=r"40 weights\), and no optimizer has them.*\*method.parameters\(\)"):
        resect.EpsilonGate(
            net, blocks, epsilon=1e-9, side=0.1, optimizer=torch.optim.SGD(net.parameters(), 0.1)
        ).attach()
    optimizer = torch.optim.SGD([*net.parameters(), *weights], lr=0.1)
    with method:
        method.begin_step()
        with pytest.raises(InputError, match="comes after the forward pass"):
            method.extra_loss(y)
        loss = nn.functional.cross_entropy(net(x), y)
        with pytest.raises(InputError, match=r"extra_loss\(y\)"):
            method.extra_loss()
        extra = method.extra_loss(y)
        (loss + extra).backward()
        stream = twin.layers[1](twin.layers[0](twin.stem(x)))
        norm, fc = nn.BatchNorm1d(6), nn.Linear(6, 4)
        fc.load_state_dict({"weight": weights[2].detach(), "bias": weights[3].detach()})
        wanted = 0.1 * nn.functional.cross_entropy(fc(torch.relu(norm(stream))), y)
        assert torch.allclose(extra, wanted)
        wanted.backward()
        assert torch.allclose(weights[2].grad, fc.weight.grad)
        optimizer.step()
        assert weights[2].grad.any()
        method.begin_step()
        net(x).sum().backward()
        with pytest.raises(AttachError, match=r"extra_loss\(y\) was not called"):
            optimizer.step()
    state = method.state_dict()
    again = resect.EpsilonGate(net, blocks, epsilon=1e-9, side=0.1, side_at="layers.1/b")
    again.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), weights, strict=True))
    alone = torch.optim.SGD(net.parameters(), lr=0.1)
    with again:
        again.begin_step()
        (net(x).sum() + again.extra_loss(y)).backward()
        alone.step()
        with pytest.raises(AttachError, match="no optimizer has them"):
            again.begin_step()
    assert resect.EpsilonGate(net, blocks, epsilon=1e-9, side=0.1)._side.block.name == blocks[2].name


def test_the_plan_holds_the_evidence(setup):
    net, x, blocks = setup
    epsilon = between(responses(net, x, blocks).values())
    with resect.EpsilonGate(net, blocks, epsilon=epsilon, muted_at_start="allow") as method:
        for scale in (1.0, 0.5):
            method.begin_step()
            net(scale * x)
    plan = method.finalize(steps=2, data=[(2 * x, None), (x, None)])
    assert plan.names
    with resect.EpsilonGate(net, blocks, epsilon=epsilon, muted_at_start="allow") as other:
        largest = []
        for scale in (1.0, 0.5):
            other.begin_step()
            net(scale * x)
            largest.append(other.responses())
    for name in plan.names:
        assert plan.evidence["largest_while_muted"][name] == max(seen[name] for seen in largest) <= epsilon
        assert plan.evidence["muted_steps"][name] == 2
    assert {plan.evidence["largest_while_muted"][name] for name in blocks.names if name not in plan.names} == {0.0}
    assert plan.evidence["largest_in_data"].keys() == set(blocks.names)
    first = blocks[0].name
    with torch.no_grad():
        wanted = max(float(net.layers[0].a(net.stem(scale * x)).abs().max()) for scale in (2, 1))
    assert plan.evidence["largest_in_data"][first] == pytest.approx(wanted)
    assert resect.Plan.from_json(plan.to_json()) == plan


def test_skipped_blocks_stand_still_without_gradients_of_none_too(setup):
    net, x, blocks = setup
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    epsilon = between(responses(net, x, blocks).values())
    muted = next(name for name, value in responses(net, x, blocks).items() if value <= epsilon)
    weight = next(net.get_submodule(blocks[muted].modules[0]).parameters())
    method = resect.EpsilonGate(net, blocks, epsilon=epsilon, skip_muted_after=1, muted_at_start="allow")
    with method:
        for number in range(4):
            before = weight.detach().clone()
            method.begin_step()
            net(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            assert torch.equal(weight, before) == (number > 0)


def test_a_state_loaded_while_attached_mutes_at_once(setup):
    net, x, blocks = setup
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    late = {"epsilon": resect.schedules.StartAt(1e9, 2), "optimizer": optimizer}
    with resect.EpsilonGate(net, blocks, **late) as method:
        for _ in range(3):
            step(method, net, x, optimizer)
        state = copy.deepcopy(method.state_dict())
        expected = net.eval()(x)
    with resect.EpsilonGate(net.train(), blocks, **late) as again:
        again.load_state_dict(state)
        assert torch.equal(net.eval()(x), expected)
    assert not torch.equal(net(x), expected)


class Window(nn.Module):
    """A block of a stream (N, H, W, C), as Swin's."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x):
        return x + self.f(x)


def test_side_supervision_finds_the_channels_of_a_stream_that_ends_in_them():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 6), *[Window() for _ in range(6)], nn.Flatten(), nn.Linear(120, 2))
    x = torch.randn(2, 5, 4, 3)
    method = resect.EpsilonGate(net, resect.find_blocks(net, x), epsilon=0.0, side=0.1)
    assert sorted(tuple(p.shape) for p in method.parameters()) == [(2,), (2, 6), (6,), (6,)]
