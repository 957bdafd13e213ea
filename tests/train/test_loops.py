"""What loops do around a method: closures, wrapped losses, skipped steps, averaged copies, recomputed blocks."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from chains import OPTIMIZERS, batches, chain, moved, same, snapshot
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import resect
from resect.errors import AttachError, InputError

pytestmark = pytest.mark.core
METHODS = {
    "StochasticDepth": lambda net, blocks: resect.StochasticDepth(net, blocks, rule="uniform"),
    "StochasticDepth, per sample": lambda net, blocks: resect.StochasticDepth(net, blocks, per="sample"),
    "ResidualDroppath": lambda net, blocks: resect.ResidualDroppath(net, blocks, rule="uniform", lr_scale=0.5),
    "EffectivePaths": lambda net, blocks: resect.EffectivePaths(net, blocks, keep=4),
    "RandomSubset": lambda net, blocks: resect.RandomSubset(net, blocks, keep=2),
    "EpsilonGate": lambda net, blocks: resect.EpsilonGate(
        net, blocks, epsilon=1.0, side=0.1, skip_muted_after=2, muted_at_start="allow"
    ),
}
every_method = pytest.mark.parametrize("name", METHODS)


def setup(name, optimizer="sgd"):
    net, _, blocks = chain()
    method = METHODS[name](net, blocks)
    return net, method, OPTIMIZERS[optimizer]([*net.parameters(), *method.parameters()])


def plain_steps(name, *, steps=6, optimizer="sgd", lost=()):
    """The reference: one batch a step; what ``lost`` steps computed is thrown away."""
    net, method, optimizer = setup(name, optimizer)
    with method:
        for step, (x, y) in enumerate(batches(steps)):
            method.begin_step()
            loss = F.cross_entropy(net(x), y) + method.extra_loss(y)
            loss.backward()
            if step not in lost:
                optimizer.step()
            optimizer.zero_grad()
    return net


@every_method
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("by_name", [True, False])
def test_a_closure_trains_as_without_one(name, optimizer, by_name):
    expected = plain_steps(name, optimizer=optimizer)
    net, method, optimizer = setup(name, optimizer)
    with method:
        for x, y in batches(6):

            def closure(x=x, y=y):
                loss = F.cross_entropy(net(x), y) + method.extra_loss(y)
                optimizer.zero_grad()
                loss.backward()
                return loss

            method.begin_step()
            loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
            assert loss.isfinite()
    assert same(net, expected)


class Ascent(torch.optim.SGD):
    """Moves the weights before it asks for gradients."""

    def step(self, closure=None):
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.add_(0.1)
        closure()
        return super().step()


class Deaf(torch.optim.SGD):
    def step(self, closure=None):
        return super().step()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (torch.optim.LBFGS, "LBFGS calls its closure several times"),
        (Ascent, "Ascent moved weights in this step before"),
        (Deaf, "Deaf stepped without calling"),
    ],
)
def test_optimizers_that_look_at_gradients_otherwise_are_refused(kind, message):
    net, x, blocks = chain()
    optimizer = kind(net.parameters(), lr=0.1)
    with resect.StochasticDepth(net, blocks, optimizer=optimizer) as method:
        method.begin_step()
        before = snapshot(net, optimizer)
        with pytest.raises(AttachError, match=message):
            optimizer.step(lambda: net(x).sum().backward())
        if kind is torch.optim.LBFGS:
            assert not moved(before, snapshot(net, optimizer))


class Child(torch.optim.SGD):
    """The parent's step is hooked too."""

    def step(self, closure=None):
        return super().step(closure)


@every_method
@pytest.mark.parametrize("with_closure", [True, False])
def test_an_optimizer_that_steps_by_its_parents_step_is_looked_at_once(name, with_closure, monkeypatch):
    expected = plain_steps(name)
    net, method, optimizer = setup(name)
    looks = []
    look = method._before_optimizer_step
    monkeypatch.setattr(method, "_before_optimizer_step", lambda which: looks.append(which) or look(which))
    optimizer = Child(optimizer.param_groups[0]["params"], lr=0.1, momentum=0.9, weight_decay=0.01)
    with method:
        for x, y in batches(6):
            method.begin_step()
            loss = F.cross_entropy(net(x), y) + method.extra_loss(y)
            if with_closure:
                optimizer.step(loss.backward)
            else:
                loss.backward()
                optimizer.step()
            optimizer.zero_grad()
        with pytest.raises(AttachError, match="Two optimizer steps"):
            optimizer.step()
    assert looks == [optimizer] * 6
    assert same(net, expected)


@pytest.mark.parametrize("name", ["ResidualDroppath", "EpsilonGate"])
def test_a_compiled_optimizer_step_is_looked_at_too(name):
    expected = plain_steps(name)
    net, method, optimizer = setup(name)
    step = torch.compile(optimizer.step, backend="eager")
    with method:
        for x, y in batches(6):
            method.begin_step()
            (F.cross_entropy(net(x), y) + method.extra_loss(y)).backward()
            step()
            optimizer.zero_grad()
    for mine, wanted in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted)
    torch.compiler.reset()


def test_a_step_that_failed_is_no_step_under_way(monkeypatch):
    net, x, blocks = chain()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with resect.StochasticDepth(net, blocks) as method:
        method.begin_step()
        net(x).sum().backward()
        with monkeypatch.context() as patch:
            patch.setattr(optimizer, "_init_group", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                optimizer.step()
        with pytest.raises(AttachError, match="Two optimizer steps"):
            optimizer.step()


def test_a_model_moved_before_attach_finds_what_the_method_brings_beside_it():
    net, _, blocks = chain()
    method = resect.EpsilonGate(net, blocks, epsilon=1.0, side=0.1, muted_at_start="allow")
    net.to("meta")
    method.attach()
    assert {p.device.type for p in method.parameters()} == {method.count.run.device.type} == {"meta"}


def test_what_is_no_optimizer_is_refused():
    net, _, blocks = chain()
    with pytest.raises(InputError, match="or Lightning, not a list"):
        resect.StochasticDepth(net, blocks, optimizer=[torch.optim.SGD(net.parameters(), 0.1)])


def test_a_wrapped_loss_adds_the_extra_loss_in_train_mode_alone():
    net, x, blocks = chain()
    y = torch.randint(0, 3, (16,))
    method = resect.EpsilonGate(net, blocks, epsilon=1e-3, side=0.1)
    loss_fn = method.wrap(F.cross_entropy)
    assert loss_fn.__name__ == "cross_entropy"
    with method:
        method.begin_step()
        stream = []
        hook = net.layers[3].register_forward_hook(lambda *call: stream.append(call[-1]))
        output = net(x)
        hook.remove()
        side = F.cross_entropy(method._side.head(stream[0]), y)
        method._side.head.norm.reset_running_stats()
        torch.testing.assert_close(loss_fn(output, y), F.cross_entropy(output, y) + 0.1 * side)
        net.eval()
        output = net(x)
        assert torch.equal(loss_fn(output, y, label_smoothing=0.1), F.cross_entropy(output, y, label_smoothing=0.1))


def test_a_wrapped_loss_over_several_micro_batches_is_the_mean_over_all_targets():
    """As transformers' Trainer calls it: a sum over the micro-batch, divided by the targets of the whole step."""

    class Marked(resect.StochasticDepth):
        def extra_loss(self, target=None):
            return target[target != -100].float().mean()

    def loss_fn(output, target, num_items_in_batch=None):
        return F.cross_entropy(output, target, reduction="sum") / num_items_in_batch

    net, _, blocks = chain()
    y = torch.tensor([0, 1, 2, -100, 2, 2, -100, -100, 1, 0])
    output = torch.randn(10, 3)
    wrapped = Marked(net, blocks).wrap(loss_fn)
    parts = [wrapped(output[at], y[at], num_items_in_batch=torch.tensor(7)) for at in (slice(0, 4), slice(4, 10))]
    expected = F.cross_entropy(output, y) + y[y != -100].float().mean()
    torch.testing.assert_close(sum(parts), expected)


@every_method
@pytest.mark.parametrize("clip", [False, True])
def test_steps_that_a_grad_scaler_skips_move_nothing_and_use_up_their_draw(name, clip):
    expected = plain_steps(name, steps=9, lost=(2, 3, 6)) if not clip else None
    net, method, optimizer = setup(name)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=1000)
    skipped = []
    with method:
        for step, (x, y) in enumerate(batches(9)):
            method.begin_step()
            before = snapshot(net, optimizer)
            loss = F.cross_entropy(net(x), y) + method.extra_loss(y)
            if step in (2, 3, 6):
                loss = loss * float("inf")
            scaler.scale(loss).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            after = snapshot(net, optimizer)
            weights = {key for key, _ in net.named_parameters()}
            if all(torch.equal(before[key], after[key]) for key in weights):
                skipped.append(step)
    assert skipped == [2, 3, 6]
    assert method.steps == 9
    assert expected is None or same(net, expected)
    assert all(parameter.requires_grad for parameter in net.parameters())


@every_method
def test_an_average_made_before_or_while_attached_is_the_average_of_the_weights(name):
    net, method, optimizer = setup(name)
    early = AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True)
    by_hand, late = None, None
    with method:
        for step, (x, y) in enumerate(batches(6)):
            method.begin_step()
            (F.cross_entropy(net(x), y) + method.extra_loss(y)).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                late = copy.deepcopy(early)  # so that both average the same
                late.module = copy.deepcopy(net)
                late.module.load_state_dict(early.module.state_dict())
            for average in (early, late):
                if average is not None:
                    average.update_parameters(net)
            weights = [parameter.detach().clone() for parameter in net.parameters()]
            by_hand = weights if by_hand is None else [(a + b) / 2 for a, b in zip(by_hand, weights, strict=True)]
    for parameter, expected in zip(early.parameters(), by_hand, strict=True):
        torch.testing.assert_close(parameter, expected)
    assert list(late.state_dict()) == list(early.state_dict()), "a copy made while attached has no keys more"
    x = batches(1)[0][0]
    resect.detach(late.module)  # it carries the gates of the step it was made in
    for mode in (True, False):
        outputs = [copy.deepcopy(average).train(mode)(x) for average in (early, late)]
        torch.testing.assert_close(*outputs)


class Checkpointed(nn.Module):
    def __init__(self, net, reentrant):
        super().__init__()
        self.net, self.reentrant = net, reentrant

    def forward(self, x):
        x = self.net.stem(x)
        for layer in self.net.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return self.net.head(x)


@pytest.mark.parametrize(
    ("name", "reentrant"), [*((name, False) for name in METHODS), ("StochasticDepth", True), ("EffectivePaths", True)]
)
def test_recomputed_blocks_learn_as_the_others_do(name, reentrant):
    def train(checkpointed):
        net, method, optimizer = setup(name)
        model = Checkpointed(net, reentrant) if checkpointed else net
        for module in net.modules():  # a recomputation moves the statistics a second time, with or without Resect
            if isinstance(module, nn.BatchNorm1d):
                module.momentum = 0.0
        with method:
            for x, y in batches(12):
                method.begin_step()
                (F.cross_entropy(model(x), y) + method.extra_loss(y)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return list(net.parameters())

    for mine, expected in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(mine, expected)


def test_reentrant_checkpointing_is_refused_where_it_loses_gradients():
    net, method, _ = setup("EpsilonGate")
    x, y = batches(1)[0]
    with method:
        method.begin_step()
        Checkpointed(net, True)(x)
        with pytest.raises(InputError, match="use_reentrant=False"):
            method.extra_loss(y)
    net, method, optimizer = setup("ResidualDroppath")
    with method:
        method.begin_step()
        Checkpointed(net, True)(x).sum().backward()
        optimizer.step()
        method.begin_step()  # freezes the stem
        with pytest.warns(UserWarning, match="None of the inputs"):
            loss = Checkpointed(net, True)(x).sum()
        with pytest.raises(RuntimeError, match="does not require grad"):
            loss.backward()


@every_method
def test_micro_batches_share_the_draw(name):
    """Four micro-batches of one step through the very same net: the mean of their gradients is the step's."""
    net, method, optimizer = setup(name)
    with method:
        for step in range(6):
            method.begin_step()
            gates = []
            for x, y in batches(4):
                gates.append([(gate.state, gate.version) for gate in method._gates])
                ((F.cross_entropy(net(x), y) + method.extra_loss(y)) / 4).backward()
            assert all(state == gates[0] for state in gates)
            optimizer.step()
            optimizer.zero_grad()
            assert method.steps == step + 1
