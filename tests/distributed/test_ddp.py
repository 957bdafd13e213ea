"""N processes under DistributedDataParallel train as one process on the joined batch does."""

from __future__ import annotations

import copy

import pytest
import small
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import resect

pytestmark = pytest.mark.core


def ddp(name, optimizer="sgd", options=None):
    net, blocks = small.chain()
    options = dict(options or {})
    if options.pop("first", "attach") == "wrap":
        run = small.wrapped(net, **options)
        method = small.METHODS[name](run, blocks)
        with method:
            small.train(net, run, method, optimizer)
    else:
        method = small.METHODS[name](net, blocks)
        with method:
            small.train(net, small.wrapped(net, **options), method, optimizer)
    assert not net._forward_pre_hooks
    return small.weights(net, method)


def close_to(name):
    return 1e-7 if "skipping" in name else 1e-10  # a side head is float32


@pytest.mark.parametrize("name", small.METHODS)
@pytest.mark.parametrize("optimizer", small.OPTIMIZERS)
def test_processes_train_as_one_on_the_joined_batch(name, optimizer, several):
    small.check_same(several(ddp, name, optimizer), small.alone(name, optimizer), close_to(name))


@pytest.mark.parametrize("name", ["StochasticDepth", "ResidualDroppath", "EpsilonGate, skipping"])
@pytest.mark.parametrize("options", [{"first": "wrap"}, {"gradient_as_bucket_view": True}], ids=str)
def test_whichever_comes_first_and_however_gradients_are_kept(name, options, two):
    small.check_same(two(ddp, name, "sgd", options), small.alone(name), close_to(name))


def accumulated(name):
    net, blocks = small.chain()
    method = small.METHODS[name](net, blocks)
    with method:
        small.train(net, small.wrapped(net), method, micro=2)
    return small.weights(net, method)


@pytest.mark.parametrize("name", ["StochasticDepth", "ResidualDroppath", "EffectivePaths", "RandomSubset"])
def test_micro_batches_without_synchronisation(name, several):
    small.check_same(several(accumulated, name), small.alone(name))


class Checkpointed(small.Layer):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


class CheckpointedChain(small.Chain):
    def __init__(self, count=7, width=6):
        super().__init__(count, width)
        for layer in self.layers:
            layer.__class__ = Checkpointed


def checkpointed(name):
    net, blocks = small.chain(make=CheckpointedChain)
    method = small.METHODS[name](net, blocks)
    with method:
        small.train(net, small.wrapped(net), method)
    return small.weights(net, method)


@pytest.mark.parametrize(
    "name", ["StochasticDepth", "StochasticDepth, per sample", "ResidualDroppath", "EpsilonGate", "EpsilonGate, stream"]
)
def test_with_gradient_checkpointing(name, several):
    small.check_same(several(checkpointed, name), small.alone(name))


def compiled(name):
    net, blocks = small.chain()
    resect.compile(net, blocks, backend="aot_eager")
    method = small.METHODS[name](net, blocks)
    with method:
        small.train(net, small.wrapped(net), method)
    return small.weights(net, method)


@pytest.mark.skipif(torch.__version__ < "2.15", reason="resect.compile needs torch 2.15")
@pytest.mark.parametrize("name", ["EpsilonGate, stream", "ResidualDroppath"])  # each takes 15 s and more
def test_compiled_block_by_block(name, two):
    small.check_same(two(compiled, name), small.alone(name))


def resumed(name, first, more):
    """Train, save, and go on with a new net, method and optimizer; return the weights."""
    net, blocks = small.chain()
    method = small.METHODS[name](net, blocks)
    optimizer = small.OPTIMIZERS["sgd"]([*net.parameters(), *method.parameters()])
    with method:
        small.train(net, small.wrapped(net), method, optimizer, first)
        saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), method.state_dict()))
    assert not hasattr(net.layers[0].up, "_resect_port")
    net, blocks = small.chain()
    run = small.wrapped(net)
    method = small.METHODS[name](run, blocks)
    optimizer = small.OPTIMIZERS["sgd"]([*net.parameters(), *method.parameters()])
    with method:
        for holder, state in zip((net, optimizer, method), saved, strict=True):
            holder.load_state_dict(state)
        small.train(net, run, method, optimizer, more, first=first)
    return small.weights(net, method)


@pytest.mark.parametrize("name", ["StochasticDepth, per sample", "ResidualDroppath", "EpsilonGate, skipping"])
def test_saved_and_loaded_it_goes_on(name, two):
    small.check_same(two(resumed, name, 3, 3), small.alone(name), close_to(name))


def frozen_stands_still():
    """Per step whether what must not learn got no gradient and stood still to the bit, and how much that was."""
    net, blocks = small.chain()
    method = small.METHODS["ResidualDroppath"](net, blocks)
    run, found = small.wrapped(net), []
    optimizer = small.OPTIMIZERS["adamw"](net.parameters())
    with method:
        small.train(net, run, method, optimizer, 2)
        for step in range(2, 8):
            before = small.weights(net)
            method.begin_step()
            learns = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
            x, y = small.mine(small.batch(step))
            F.cross_entropy(run(x), y).backward()
            given = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
            moved = {name for name, value in small.weights(net).items() if not torch.equal(value, before[name])}
            found.append((method.kind, given == learns == moved, len(moved)))
    return found


def test_what_stands_still_has_no_gradient_on_any_process(two):
    one, other = two(frozen_stands_still)
    assert one == other
    assert {kind for kind, _, _ in one} == {"drop", "dropped-only"}
    assert all(right for _, right, _ in one)
    assert len({moved for _, _, moved in one}) > 1


def unequal(name):
    """Train on batches of 7 samples, which processes cannot share evenly, with losses weighed as in the joined mean."""
    net, blocks = small.chain()
    method = small.METHODS[name](net, blocks)
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    run = small.wrapped(net) if ranks > 1 else net
    optimizer = small.OPTIMIZERS["sgd"](net.parameters())
    with method:
        for step in range(small.STEPS):
            method.begin_step()
            x, y = small.mine(small.batch(step, 7))
            (F.cross_entropy(run(x), y, reduction="sum") * (ranks / 7)).backward()
            optimizer.step()
            optimizer.zero_grad()
    return small.weights(net)


@pytest.mark.parametrize("name", ["StochasticDepth, per sample", "ResidualDroppath, per sample", "EpsilonGate, stream"])
def test_batches_that_do_not_divide_evenly(name, several):
    small.check_same(several(unequal, name), unequal(name))


def found_on_a_wrapper():
    net, blocks = small.chain()
    run = small.wrapped(net)
    again = resect.find_blocks(run, torch.randn(8, 2, 5).double())
    cut = resect.remove(run, again, again.names[-2:])
    with torch.no_grad(), resect.closed(run, again[-2:]):
        same = torch.equal(run.eval()(small.batch(0)[0]), cut.eval()(small.batch(0)[0]))
    return again.names == blocks.names, same, type(cut).__name__


def test_blocks_of_a_wrapped_model_are_found_closed_and_removed(two):
    assert two(found_on_a_wrapper) == [(True, True, "Chain")] * 2


class Normed(nn.Module):
    """A layer with batch statistics."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return x + self.norm(self.conv(x))


def synchronised(when):
    net, x = nn.Sequential(*[Normed() for _ in range(7)]), torch.randn(4, 3, 8, 8)
    if when == "before":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    blocks = resect.find_blocks(net, x)
    if when == "between":
        net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    method = resect.StochasticDepth(net, blocks, drop_prob=1.0, rule="uniform")
    with method:
        if when == "after":
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        try:
            method.begin_step()
        except resect.ResectError as error:
            return str(error)
        with torch.no_grad():
            return torch.equal(net(x), x) and len(blocks) == 7 and not torch.equal(net.eval()(x), x)


def test_norms_may_be_synchronised_before_a_method_is_attached_and_not_after(two):
    assert two(synchronised, "before") == [True, True]
    assert two(synchronised, "between") == [True, True]
    for error in two(synchronised, "after"):
        assert "module '0.norm' was replaced by a SyncBatchNorm. Detach the method first" in error
