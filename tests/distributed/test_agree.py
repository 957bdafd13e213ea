"""Processes that do not do the same are told so, all of them, instead of drifting apart."""

from __future__ import annotations

import re

import pytest
import small
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Processes
from torch.nn.parallel import DistributedDataParallel

import resect
from resect.errors import AttachError

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore:.*residual blocks. below.*")]


def told(kind, *args):
    """The error that attaching raises here, and whether the net is as it was."""
    net, blocks = small.chain()
    classes = [type(module) for module in net.modules()]
    try:
        kind(dist.get_rank(), net, blocks, *args)
    except AttachError as error:
        assert [type(module) for module in net.modules()] == classes
        assert not net._forward_pre_hooks
        return str(error)
    return ""


def depth(net, blocks, **options):
    return resect.StochasticDepth(net, blocks, **{"drop_prob": 0.5} | options)


def other_seed(rank, net, blocks):
    depth(net, blocks, seed=rank).attach()


def other_blocks(rank, net, blocks):
    depth(net, blocks[rank:]).attach()


def other_schedule(rank, net, blocks):
    depth(net, blocks, drop_prob=lambda step: min(0.9, step * 0.1 * rank)).attach()


def other_steps(rank, net, blocks):
    method = depth(net, blocks)
    method.steps = 10 * rank
    method.attach()


def other_method(rank, net, blocks):
    (depth(net, blocks) if rank else resect.RandomSubset(net, blocks, keep=3)).attach()


def fails_on_one(rank, net, blocks):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))] if rank else net.parameters(), lr=0.1)
    depth(net, blocks, optimizer=optimizer).attach()


def loads_another_state(rank, net, blocks):
    with depth(net, blocks) as method:
        method.load_state_dict(method.state_dict() | {"steps": 7 - rank})
        method.begin_step()


DIFFERENT = {
    other_seed: "seed is '0' on process 0 and '1' on process 1",
    other_blocks: "blocks: 'layers.0/up' only on process 0",
    other_schedule: "drop_prob is '0 at step 0, 0 at step 1000' on process 0 and '0 at step 0, 0.9 at step 1000' on",
    other_steps: "steps is '0' on process 0 and '10' on process 1",
    other_method: "method is 'RandomSubset' on process 0 and 'StochasticDepth' on process 1",
    loads_another_state: "steps is '7' on process 0 and '6' on process 1",
}


@pytest.mark.parametrize("kind", DIFFERENT, ids=lambda kind: kind.__name__)
def test_methods_that_differ_raise_on_every_process_and_say_what(kind, several):
    errors = several(told, kind)
    for error in errors:
        assert re.search(DIFFERENT[kind], error), error
    assert errors[0] == errors[1]


def test_what_fails_on_one_process_raises_on_all(three):
    own, *others = three(told, fails_on_one)
    assert "process 1: AttachError: The optimizer given to StochasticDepth holds no parameter" in own
    assert all(error.startswith("The optimizer given") for error in others)


def same_everywhere():
    net, blocks = small.chain()
    for name, make in small.METHODS.items():
        with make(net, blocks) as method:
            method.load_state_dict(method.state_dict())
            method.begin_step()
            assert net._forward_pre_hooks, name
        assert not net._forward_pre_hooks
    return True


def test_methods_that_are_the_same_attach(two):
    assert two(same_everywhere) == [True, True]


def attaches_alone(what):
    net, blocks = small.chain()
    if dist.get_rank() == 0:
        depth(net, blocks).attach()
    elif what == "dies":
        import os

        os._exit(1)
    else:
        small.wrapped(net)(small.batch(0)[0])


@pytest.mark.parametrize("what", ["dies", "never attaches"])
def test_a_process_that_does_not_come_is_waited_for_no_longer_than_the_group_says(what):
    processes = Processes(2, patience=4)
    try:
        failed, error = processes.outcomes(attaches_alone, what)[0]
    finally:
        processes.close()
    assert failed
    assert "another one did not answer" in error


def trains_and_dies():
    import os

    net, blocks = small.chain()
    run = small.wrapped(net)
    with depth(net, blocks, rule="uniform") as method:
        small.train(net, run, method, steps=2)
        if dist.get_rank():
            os._exit(1)
        small.train(net, run, method, steps=2)


def test_a_process_that_dies_in_the_training_ends_the_others_with_an_error():
    processes = Processes(2, patience=4)
    try:
        (failed, error), _ = processes.outcomes(trains_and_dies)
    finally:
        processes.close()
    assert failed
    assert "RuntimeError" in error


def unfit_wrapper(name, options):
    """Train in a wrapper that waits for every gradient; return the error, and whether anything moved before it."""
    net, blocks = small.chain()
    before = small.weights(net)
    run = small.wrapped(net, **options)
    method = small.METHODS[name](net, blocks)
    optimizer = small.OPTIMIZERS["sgd"]([*net.parameters(), *method.parameters()])
    steps, error = 0, ""
    with method:
        try:
            for _ in range(small.STEPS):
                small.train(net, run, method, optimizer, 1, first=steps)
                steps += 1
        except AttachError as raised:
            error = str(raised)
    moved = any(not torch.equal(value, before[key]) for key, value in small.weights(net).items())
    # The net is whole: it trains in a wrapper that is fit.
    with method:
        small.train(net, small.wrapped(net), method, optimizer, 2, first=steps)
    return error, steps, moved, small.weights(net)


@pytest.mark.parametrize("name", ["StochasticDepth", "ResidualDroppath", "ResidualDroppath, zeros", "RandomSubset"])
@pytest.mark.parametrize("options", [{"find_unused_parameters": False}, {"static_graph": True}], ids=str)
def test_a_wrapper_that_waits_for_every_gradient_is_refused_before_anything_moves(name, options, two):
    (error, steps, moved, one), (other_error, _, _, other) = two(unfit_wrapper, name, options)
    assert "DistributedDataParallel(model, find_unused_parameters=True)" in error
    assert next(iter(options)) in error
    assert error == other_error
    assert steps == 0
    assert not moved
    assert all(torch.equal(one[key], other[key]) for key in one)


def leaves_nothing_out():
    net, blocks = small.chain()
    run = DistributedDataParallel(net)
    for method in (depth(net, blocks, drop_prob=0.0), small.METHODS["EpsilonGate"](net, blocks)):
        with method:
            small.train(net, run, method, steps=2)
    with depth(net, blocks, rule="uniform", drop_prob=1.0) as method:
        method.begin_step()
        with torch.no_grad():
            run(small.batch(0)[0])
        run.eval()(small.batch(0)[0])
    x, y = small.batch(0)
    F.cross_entropy(run.train()(x), y).backward()  # detached: the wrapper is none of ours
    return True


def test_a_wrapper_is_let_be_where_nothing_is_left_out(two):
    assert two(leaves_nothing_out) == [True, True]
