"""What users do to a model that has a method attached: right, or refused where it goes wrong, and never silent."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from chains import batches, chain, moved, snapshot, twin
from torch import nn

import resect
from resect.errors import AttachError, InputError
from resect.train.draws import draw_closed

pytestmark = pytest.mark.core
UNIFORM = {"drop_prob": 0.5, "rule": "uniform"}


class Plain(nn.Module):
    """A block without batch norm, that adds in place if asked."""

    def __init__(self, in_place=False, flat=False):
        super().__init__()
        self.f, self.g, self.in_place, self.flat = nn.Linear(4, 4), nn.Linear(4, 4), in_place, flat

    def forward(self, x):
        h = x * 1
        inner = self.f(x.reshape(-1, 4)).reshape(x.shape) if self.flat else self.f(x)
        branch = self.g(torch.tanh(inner))
        if not self.in_place:
            return h + branch
        h.add_(branch)
        return h


def plain(count=8, **options):
    torch.manual_seed(0)
    net, x = nn.Sequential(*[Plain(**options) for _ in range(count)]), torch.randn(6, 3, 4)
    return net, x, resect.find_blocks(net, x)


def sgd(net, lr=0.1):
    return torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=0.1)


METHODS = {
    "StochasticDepth": lambda net, blocks, **more: resect.StochasticDepth(net, blocks, **UNIFORM, **more),
    "ResidualDroppath": lambda net, blocks, **more: resect.ResidualDroppath(net, blocks, **UNIFORM, **more),
    "RandomSubset": lambda net, blocks, **more: resect.RandomSubset(net, blocks, keep=2, **more),
    "EpsilonGate": lambda net, blocks, **more: resect.EpsilonGate(net, blocks, epsilon=1e-3, side=0.1, **more),
}


@pytest.mark.parametrize("given", [True, False])
def test_every_optimizer_of_the_models_weights_is_watched(given):
    net, x, blocks = chain()
    norms = [p for name, p in net.named_parameters() if "norm" in name]
    others = [p for name, p in net.named_parameters() if "norm" not in name]
    first, second = (torch.optim.SGD(part, lr=0.1, momentum=0.9, weight_decay=0.1) for part in (norms, others))
    with resect.StochasticDepth(net, blocks, **UNIFORM, optimizer=first if given else None) as method:
        for step in range(6):
            method.begin_step()
            before = snapshot(net, first)
            net(x).square().mean().backward()
            second.step()
            first.step()
            closed = draw_closed([0.5] * 7, 0, step)
            now = moved(before, snapshot(net, first))
            assert {f"layers.{i}" for i in range(7) if not closed[i]} == {m for m in now if m.startswith("layers")}
            for optimizer in (first, second):
                optimizer.zero_grad(set_to_none=False)
    with pytest.raises(AttachError, match="holds no parameter of the model"):
        resect.StochasticDepth(net, blocks, optimizer=torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)).attach()


def test_a_plan_never_holds_blocks_that_were_open():
    net, x, blocks = plain(12)
    optimizer = sgd(net, 0.01)
    method = resect.EpsilonGate(
        net, blocks, epsilon=1e3, skip_muted_after=20, settle_after=10, optimizer=optimizer, muted_at_start="allow"
    )
    with method:
        for _ in range(30):
            method.begin_step()
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not method.finalize(steps=9).names
        assert method.metrics()["muted"] == 0
    schedule = resect.EpsilonGate(net, blocks, epsilon=lambda step: 1e3 if step < 5 else 0.0, muted_at_start="allow")
    with schedule:
        for _ in range(12):
            schedule.begin_step()
            net(x)
        assert not schedule.finalize(steps=3).names
        assert schedule.metrics()["muted"] == 0
        assert all(value > 0 for value in schedule.responses().values()), "measured without a gate, too"


def test_sums_in_place_in_units_of_the_stream():
    net, x, blocks = plain(in_place=True)
    expected = net(x)
    expected.square().sum().backward()
    gradients = [p.grad.clone() for p in net.parameters()]
    for epsilon in (0.0, 1e-9):
        net.zero_grad()
        with resect.EpsilonGate(net, blocks, epsilon=epsilon, units="stream", muted_at_start="allow"):
            output = net(x)
            output.square().sum().backward()
        assert torch.equal(output, expected)
        assert all(torch.equal(p.grad, wanted) for p, wanted in zip(net.parameters(), gradients, strict=True))
    with resect.closed(net, blocks):
        closed = net(x)
    with resect.EpsilonGate(net, blocks, epsilon=1e9, units="stream", muted_at_start="allow"):
        assert torch.equal(net(x), closed)


def test_per_sample_freezing_refuses_modules_that_see_no_batch():
    net, _, blocks = plain(flat=True)
    with pytest.raises(AttachError, match="begins with 18 for a batch of 6"):
        resect.ResidualDroppath(net, blocks, per="sample").attach()
    assert not any(module._forward_hooks for module in net.modules())
    net, _, blocks = plain()
    resect.ResidualDroppath(net, blocks, per="sample").attach().detach()


@pytest.mark.parametrize("name", ["ResidualDroppath", "RandomSubset"])
def test_weights_loaded_in_the_middle_of_a_step_stay_loaded(name):
    net, x, blocks = chain()
    best = copy.deepcopy(net.state_dict())
    with METHODS[name](net, blocks) as method:
        for _ in range(4):
            method.begin_step()
            net(x)
        net.load_state_dict(best)
    assert all(torch.equal(best[key], value) for key, value in net.state_dict().items())


def test_frozen_buffers_stand_still_when_they_are_other_objects():
    from resect.train.freeze import Freeze

    norm = nn.BatchNorm1d(2)
    mean = norm.running_mean
    freeze = Freeze([], [norm])
    norm(torch.randn(4, 2))
    norm.running_mean = torch.ones(2)  # a module that puts a new tensor in place of the old one
    freeze.release()
    assert norm.running_mean is mean
    assert not mean.any()
    assert int(norm.num_batches_tracked) == 0
    freeze = Freeze([], [norm])
    norm(torch.randn(4, 2))
    norm.double()  # cast in the middle of a step
    freeze.release()
    assert norm.running_mean.dtype == torch.float64
    assert not norm.running_mean.any()

    net, x, blocks = chain()
    with resect.ResidualDroppath(net, blocks, drop_prob=1.0, rule=[0, 0, 1, 0, 0, 0, 0]) as method:
        net.double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for _ in range(2):
            before = snapshot(net, optimizer)
            method.begin_step()
            net(x.double()).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert moved(before, snapshot(net, optimizer)) == {"layers.2"}


@pytest.mark.parametrize("name", ["ResidualDroppath", "RandomSubset"])
def test_train_mode_after_begin_step_is_noticed(name):
    net, x, blocks = chain()
    optimizer = sgd(net)
    with METHODS[name](net, blocks, optimizer=optimizer) as method:
        net.eval()
        method.begin_step()
        net.train()
        net(x).sum().backward()
        with pytest.raises(AttachError, match=r"model.train\(\) was called after .*begin_step\(\)"):
            optimizer.step()


def test_eval_mode_before_the_optimizer_steps_changes_nothing():
    net, x, blocks = chain()
    optimizer = sgd(net)
    net(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with resect.StochasticDepth(net, blocks, **UNIFORM, optimizer=optimizer) as method:
        method.begin_step()
        before = snapshot(net, optimizer)
        net(x).square().sum().backward()
        net.eval()
        optimizer.step()
        closed = {f"layers.{i}" for i, gone in enumerate(draw_closed([0.5] * 7, 0, 0)) if gone}
        assert closed
        assert not closed & moved(before, snapshot(net, optimizer))
    net.train()
    with resect.ResidualDroppath(net, blocks, **UNIFORM, norms="eval", optimizer=optimizer) as method:
        for _ in range(2):
            method.begin_step()
            net.zero_grad()
            net(x).sum().backward()
            net.eval()
            optimizer.step()
            assert not any(module.training for module in net.modules())
            net.train()


def test_a_loop_left_in_the_middle_of_a_batch_begins_anew():
    net, _, blocks = chain()
    data = batches(2)
    method = resect.ResidualDroppath(net, blocks, drop_prob=1.0, rule=[0, 0, 1, 0, 0, 0, 0], data="same")
    with method:
        for _ in method.batches(data):
            method.begin_step()
            break
        kinds = []
        for x, _ in method.batches(data):
            method.begin_step()
            kinds.append((method.kind, x is data[0][0]))
    assert kinds == [("drop", True), ("dropped-only", True), ("drop", False), ("dropped-only", False)]


def test_the_learning_rate_is_given_back_after_a_failed_step(monkeypatch):
    net, x, blocks = chain()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    method = resect.ResidualDroppath(
        net, blocks, drop_prob=1.0, rule=[0, 0, 1, 0, 0, 0, 0], lr_scale=0.5, optimizer=optimizer
    )
    with method:
        method.begin_step()
        optimizer.step()
        method.begin_step()
        net(x).sum().backward()
        with monkeypatch.context() as patch:
            patch.setattr(optimizer, "_init_group", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_own_dropping_stays_off_until_the_last_method_goes():
    class DropPath(nn.Module):
        drop_prob = 0.3

        def forward(self, x):
            return x

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.f, self.drop = nn.Linear(4, 4), DropPath()

        def forward(self, x):
            return x + self.drop(self.f(x))

    net, x = nn.Sequential(*[Block() for _ in range(12)]), torch.randn(8, 4)
    blocks = resect.find_blocks(net, x)
    first = resect.StochasticDepth(net, blocks[:6], own_drop="replace").attach()
    net[0].drop.drop_prob = 0.4  # by hand, meanwhile
    second = resect.EffectivePaths(net, blocks[6:], keep=2, own_drop="replace").attach()
    first.detach()
    assert {block.drop.drop_prob for block in net} == {0.0}
    second.detach()
    assert [block.drop.drop_prob for block in net] == [0.4, *[0.3] * 11]
    with pytest.raises(AttachError, match="EpsilonGate would act on top of that"):
        resect.EpsilonGate(net, blocks, epsilon=1e-6).attach()


def test_nothing_that_learns_makes_a_plain_step():
    net, x, blocks = chain()
    net.layers[2].requires_grad_(False)
    optimizer = sgd(net)
    with resect.ResidualDroppath(net, blocks, drop_prob=1.0, rule=[0, 0, 1, 0, 0, 0, 0], optimizer=optimizer) as method:
        for kind in ("drop", "plain"):
            method.begin_step()
            assert method.kind == kind
            net(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_recheck_does_not_depend_on_when_the_plan_is_asked_for():
    def run(*, ask):
        net, x, blocks = chain()
        method = resect.EpsilonGate(
            net, blocks, epsilon=1e6, skip_muted_after=2, recheck_every=5, muted_at_start="allow"
        )
        computed = []
        with method, torch.no_grad():
            for step in range(12):
                method.begin_step()
                if ask and step:
                    method.finalize(1, data=[(x, None)])
                computed.append(sum(not gate.is_closed for gate in method._gates))
                net(x)
        return computed

    assert run(ask=True) == run(ask=False) == [7, 7, 0, 0, 0, 7, 0, 0, 0, 0, 7, 0]
    net, x, blocks = chain()
    with resect.EpsilonGate(net, blocks, epsilon=1e6, muted_at_start="allow") as method:
        method.begin_step()
        net(x)
        with pytest.raises(InputError, match="at least one batch"):
            method.finalize(1, data=iter([]))


def test_an_empty_batch_passes_the_gate():
    net, _, blocks = plain()
    with resect.EpsilonGate(net, blocks, epsilon=0.1, muted_at_start="allow"):
        assert net(torch.zeros(0, 3, 4)).shape == (0, 3, 4)


def test_states_of_other_methods_are_refused_before_anything_is_loaded():
    net, _, blocks = chain()
    gate = resect.EpsilonGate(net, blocks, epsilon=1e-3)
    with_head = resect.EpsilonGate(net, blocks, epsilon=1e-3, side=0.1)
    for method, state in ((with_head, gate), (gate, with_head), (resect.ResidualDroppath(net, blocks), gate)):
        with pytest.raises(InputError, match="This is not the state of such a"):
            method.load_state_dict(state.state_dict())


def test_recalibrating_around_a_lesion_keeps_what_the_closed_blocks_have():
    net, x, blocks = chain()
    for _ in range(20):
        net(x)
    before = copy.deepcopy(net.state_dict())
    with resect.closed(net, blocks[2:4]):
        resect.recalibrate(net, [x] * 3)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]) == (("running" not in name and "num" not in name) or name[7] in "23")
    norm = nn.Sequential(nn.InstanceNorm1d(3, track_running_stats=True))
    norm(5 + torch.randn(4, 3, 8))
    kept = copy.deepcopy(norm.state_dict())
    resect.recalibrate(norm, [torch.randn(4, 3, 8)])
    assert all(torch.equal(kept[key], value) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_copies_carry_no_hooks_and_can_be_detached(name):
    net, x, blocks = chain()
    clean = twin(net).eval()
    method = METHODS[name](net, blocks)
    with method:
        method.begin_step()
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301 - our own bytes
            resect.detach(other)
            assert torch.equal(other.eval()(x), clean(x))
            assert len(resect.find_blocks(other, x)) == 7
            resect.remove(other, resect.find_blocks(other, x), "layers.3")
    consistent = resect.ResidualDroppath(net, blocks, **UNIFORM, data="same", consistency=1.0)
    with consistent:
        for batch in consistent.batches([x]):
            consistent.begin_step()
            assert consistent.kind == "drop"
            for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301 - our own bytes
                other(batch)
            assert not consistent._compare.teachers
            net(batch)
            assert len(consistent._compare.teachers) == 1
            break
    net, x, blocks = plain()
    with resect.ResidualDroppath(net, blocks, per="sample", **UNIFORM):
        pickle.dumps(net)


def test_half_precision_folds_and_thresholds():
    net, x, blocks = plain()
    net, x = net.bfloat16(), x.bfloat16()
    blocks = resect.find_blocks(net, x)
    resect.StochasticDepth(net, blocks, scaling="paper").finalize()
    branch = torch.full((4,), 0.30078125, dtype=torch.bfloat16)
    assert torch.equal(resect.train.muting.epsilon_gate(branch, 0.3), branch), "0.3 is not rounded to the branch's type"


def test_the_random_subset_control_says_what_it_cannot_do():
    net, _, blocks = chain()
    with pytest.raises(InputError, match="drop_prob must be a number"):
        resect.droppath_control("random-subset", net, blocks, drop_prob=resect.schedules.Ramp(0, 0.5, 10))
    with pytest.raises(InputError, match="drop_prob must be a number between 0 and 1"):
        resect.droppath_control("random-subset", net, blocks, drop_prob=2.0)
    with pytest.raises(InputError, match=r"(?s)2 problems.*rule must be one of .* or 7 shares, one per block, not 2"):
        resect.droppath_control("random-subset", net, blocks, drop_prob=2.0, rule=[1.0, 1.0])
    resect.droppath_control("random-subset", net, blocks, own_drop="replace")


def test_wrong_arguments_are_explained():
    net, _, blocks = chain()
    with pytest.raises(InputError, match="between 0 and 1, or a schedule of it, not 'linear'"):
        resect.StochasticDepth(net, blocks, drop_prob="linear")
    with pytest.raises(InputError, match="side_at names the place of side supervision: it needs a weight"):
        resect.EpsilonGate(net, blocks, side_at="layers.2")
    with pytest.raises(InputError, match="follows an EpsilonGate, not a StochasticDepth"):
        resect.AdaptiveLR(sgd(net), resect.StochasticDepth(net, blocks))
    assert repr(resect.StochasticDepth(net, blocks)) == "<StochasticDepth on 7 blocks, 0 steps, not attached>"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"seed": 1}, "seed was 0, and is 1"),
        ({"drop_prob": 0.4}, "drop_prob was Constant(value=0.5), and is Constant(value=0.4)"),
        ({"per": "sample", "rule": "uniform"}, "per was 'batch', and is 'sample'"),
    ],
)
def test_a_state_of_a_method_made_otherwise_is_refused(other, says):
    net, _, blocks = chain()
    method = resect.StochasticDepth(net, blocks)
    state = json.loads(json.dumps(method.state_dict() | {"steps": 3}))
    changed = resect.StochasticDepth(net, blocks, **other)
    with pytest.raises(InputError, match="made otherwise") as error:
        changed.load_state_dict(state)
    assert says in str(error.value)
    assert changed.steps == 0
    changed.load_state_dict(state | {"options": changed.state_dict()["options"]})
    assert changed.steps == 3
    with pytest.raises(InputError, match="method was StochasticDepth, and is EffectivePaths"):
        resect.EffectivePaths(net, blocks, keep=3).load_state_dict(state)
    with pytest.raises(InputError, match=r"it had 7 blocks .*layers.0.* and has 6"):
        resect.StochasticDepth(net, blocks[1:]).load_state_dict(state)
    again = resect.StochasticDepth(net, blocks, own_drop="replace")
    again.load_state_dict(state)
    assert again.steps == 3


def test_a_schedule_that_ends_does_not_lose_the_checkpoint():
    net, _, blocks = chain()
    values = [0.1, 0.3, 0.5]
    method = resect.StochasticDepth(net, blocks, drop_prob=lambda step: values[step])
    state = json.loads(json.dumps(method.state_dict()))
    resect.StochasticDepth(net, blocks, drop_prob=lambda step: values[step]).load_state_dict(state)
    with pytest.raises(InputError, match=r"drop_prob was 0.1 at step 0, IndexError at step 1000, and is 0.2"):
        resect.StochasticDepth(net, blocks, drop_prob=lambda step: 0.2).load_state_dict(state)
