"""What must hold for every training method on every family; a new method adds itself to METHODS."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from families import FAMILIES, family_params

import resect
from resect.blocks.state import PORT

# name -> method on (model, blocks, optimizer, level), set so that it acts: about half of the blocks are muted or drawn.
METHODS = {
    "StochasticDepth": lambda model, blocks, optimizer, level: resect.StochasticDepth(
        model, blocks, rule="uniform", scaling="none", seed=4, optimizer=optimizer
    ),
    "StochasticDepth, inverted": lambda model, blocks, optimizer, level: resect.StochasticDepth(
        model, blocks, drop_prob=0.9, optimizer=optimizer
    ),
    "StochasticDepth, per sample": lambda model, blocks, optimizer, level: resect.StochasticDepth(
        model, blocks, per="sample", rule="linear-from-zero", optimizer=optimizer
    ),
    "StochasticDepth, per sample, subset": lambda model, blocks, optimizer, level: resect.StochasticDepth(
        model, blocks, per="sample", compute="subset", optimizer=optimizer
    ),
    "StochasticDepth, per sample, mask": lambda model, blocks, optimizer, level: resect.StochasticDepth(
        model, blocks, per="sample", compute="mask", optimizer=optimizer
    ),
    "StochasticDepth, paper": lambda model, blocks, optimizer, level: resect.StochasticDepth(
        model, blocks, scaling="paper", optimizer=optimizer
    ),
    "ResidualDroppath": lambda model, blocks, optimizer, level: resect.ResidualDroppath(
        model, blocks, rule="uniform", seed=2, optimizer=optimizer
    ),
    "ResidualDroppath, fresh mask": lambda model, blocks, optimizer, level: resect.ResidualDroppath(
        model, blocks, rule="uniform", mask="fresh", rest="trained", optimizer=optimizer
    ),
    "EpsilonGate": lambda model, blocks, optimizer, level: resect.EpsilonGate(
        model, blocks, epsilon=level, optimizer=optimizer, muted_at_start="allow"
    ),
    "EpsilonGate, skipping": lambda model, blocks, optimizer, level: resect.EpsilonGate(
        model, blocks, epsilon=level, skip_muted_after=1, recheck_every=2, optimizer=optimizer, muted_at_start="allow"
    ),
    "EpsilonGate, in units of the stream": lambda model, blocks, optimizer, level: resect.EpsilonGate(
        model, blocks, epsilon=2.0, units="stream", optimizer=optimizer, muted_at_start="allow"
    ),
    "EffectivePaths": lambda model, blocks, optimizer, level: resect.EffectivePaths(
        model, blocks, keep=len(blocks) // 2, optimizer=optimizer
    ),
    "RandomSubset": lambda model, blocks, optimizer, level: resect.RandomSubset(
        model, blocks, keep=len(blocks) // 2, optimizer=optimizer
    ),
}
# name -> the same method set so that it must change nothing.
OFF = {
    "StochasticDepth": lambda model, blocks, optimizer: resect.StochasticDepth(model, blocks, drop_prob=0.0),
    "StochasticDepth, per sample": lambda model, blocks, optimizer: resect.StochasticDepth(
        model, blocks, drop_prob=0.0, per="sample"
    ),
    "StochasticDepth, paper": lambda model, blocks, optimizer: resect.StochasticDepth(
        model, blocks, drop_prob=0.0, scaling="paper"
    ),
    "ResidualDroppath": lambda model, blocks, optimizer: resect.ResidualDroppath(model, blocks, drop_prob=0.0),
    "EpsilonGate": lambda model, blocks, optimizer: resect.EpsilonGate(model, blocks, epsilon=0.0),
    "EpsilonGate, in units of the stream": lambda model, blocks, optimizer: resect.EpsilonGate(
        model, blocks, epsilon=0.0, units="stream"
    ),
    "EffectivePaths": lambda model, blocks, optimizer: resect.EffectivePaths(model, blocks, keep=len(blocks)),
    "RandomSubset": lambda model, blocks, optimizer: resect.RandomSubset(model, blocks, keep=len(blocks)),
}
# name -> the same method set so that every branch is left out while training.
ALL = {
    "StochasticDepth": lambda model, blocks: resect.StochasticDepth(model, blocks, drop_prob=1.0, rule="uniform"),
    "StochasticDepth, per sample": lambda model, blocks: resect.StochasticDepth(
        model, blocks, drop_prob=1.0, rule="uniform", per="sample"
    ),
    "ResidualDroppath": lambda model, blocks: resect.ResidualDroppath(model, blocks, drop_prob=1.0, rule="uniform"),
    "EffectivePaths": lambda model, blocks: resect.EffectivePaths(model, blocks, keep=0),
}

# The hand-written nets have few blocks, on purpose: their paths can be enumerated.
pytestmark = pytest.mark.filterwarnings("ignore:.*dropping branches tends to hurt")
# One bottleneck ResNet is enough here: timm's, whose shortcuts pool.
every_family = pytest.mark.parametrize("family", [p for p in family_params() if "torchvision-resnet50" not in p.values])
every_method = pytest.mark.parametrize("method", METHODS)


def setup(family):
    model, x, blocks, level = looked_at(family)
    torch.manual_seed(0)  # the same draws whichever test comes first
    return copy.deepcopy(model).train(), x.clone(), blocks, level


@functools.cache
def looked_at(family):
    """A model that no test touches, its input, blocks, and the median of their largest responses."""
    from resect.blocks.response import watch

    model, x = FAMILIES[family]()
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    blocks = resect.find_blocks(model, x)
    untouched = copy.deepcopy(model)
    model.train()
    with torch.no_grad(), resect.gates(model, blocks) as gates:
        largest = watch(gates)
        model(x)
    return untouched, x, blocks, sorted(largest.values())[len(largest) // 2]


def step(model, x, optimizer, method=None):
    if method is not None:
        method.begin_step()
    loss = model(x).square().mean()
    if method is not None:
        loss = loss + method.extra_loss()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)


@every_family
@every_method
def test_attached_and_detached_leaves_no_trace(method, family):
    model, x, blocks, level = setup(family)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    optimizer = sgd(model)
    with METHODS[method](model, blocks, optimizer, level) as attached:
        step(model, x, optimizer, attached)
        assert list(model.state_dict()) == keys
        assert not list(attached.parameters())
    with pytest.raises(ZeroDivisionError), METHODS[method](model, blocks, optimizer, level):
        raise ZeroDivisionError
    assert [type(module) for module in model.modules()] == classes
    assert not any(PORT in module.__dict__ for module in model.modules())
    assert not optimizer._optimizer_step_pre_hooks


@every_family
@pytest.mark.parametrize("method", ALL)
def test_with_every_branch_left_out_it_is_a_lesion_while_training_and_open_in_eval_mode(method, family):
    model, x, blocks, _ = setup(family)
    twin = copy.deepcopy(model)
    with ALL[method](model, blocks) as attached:
        attached.begin_step()
        output = model(x)
        output.square().mean().backward()
        with resect.closed(twin, blocks):
            expected = twin(x)
            expected.square().mean().backward()
        assert torch.equal(output, expected)
        for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (mine.grad is None) == (theirs.grad is None), name
            assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), twin.buffers(), strict=True))
        with torch.no_grad():  # with gradients, a net that is frozen in part would take another attention kernel
            assert torch.equal(model.eval()(x), twin.eval()(x))


@every_family
@pytest.mark.parametrize("method", OFF)
def test_off_is_plain_training(method, family):
    model, x, blocks, _ = setup(family)
    twin = copy.deepcopy(model)
    optimizer, other = sgd(model), sgd(twin)
    with OFF[method](model, blocks, optimizer) as attached:
        for _ in range(2):
            assert torch.equal(step(model, x, optimizer, attached), step(twin, x, other))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


@every_family
@every_method
def test_resumed_from_its_state_it_goes_on_exactly(method, family):
    model, x, blocks, level = setup(family)
    optimizer = sgd(model)
    with METHODS[method](model, blocks, optimizer, level) as attached:
        step(model, x, optimizer, attached)
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), attached.state_dict()))
        expected = [step(model, x, optimizer, attached) for _ in range(2)]
        final = attached.metrics()
    again, _ = FAMILIES[family]()
    for module in again.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    blocks = resect.find_blocks(again, x)
    again.train()
    again.load_state_dict(saved[0])
    optimizer = sgd(again)
    optimizer.load_state_dict(saved[1])
    with METHODS[method](again, blocks, optimizer, level) as attached:
        attached.load_state_dict(saved[2])
        assert [step(again, x, optimizer, attached) for _ in range(2)] == expected
        assert attached.metrics() == final


@every_family
@every_method
def test_the_same_seed_and_step_give_the_same_training(method, family):
    finals = []
    for noise in (1, 2):
        model, x, blocks, level = setup(family)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.manual_seed(noise)  # what else was drawn does not matter
        optimizer = sgd(model)
        with METHODS[method](model, blocks, optimizer, level) as attached:
            for _ in range(3):
                step(model, x, optimizer, attached)
        finals.append(list(model.state_dict().values()))
    assert all(torch.equal(a, b) for a, b in zip(*finals, strict=True))


FREEZING = [name for name in METHODS if name.startswith(("StochasticDepth, inv", "Residual", "Effective", "Random"))]
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-2),
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-2),
}


@every_family
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("method", FREEZING)
def test_a_block_that_does_not_learn_stands_still_bit_for_bit(method, optimizer, family):
    from resect.train.freeze import branch_modules, branch_parameters

    model, x, blocks, level = setup(family)
    optimizer = OPTIMIZERS[optimizer](model)
    step(model, x, optimizer)  # momentum everywhere
    still = 0
    with METHODS[method](model, blocks, optimizer, level) as attached:
        for number in range(4):
            parts = [
                (branch_parameters(model, b), [x for m in branch_modules(model, b) for x in m.buffers(False)])
                for b in blocks
            ]
            before = [[value.detach().clone() for value in (*weights, *buffers)] for weights, buffers in parts]
            states = [copy.deepcopy([optimizer.state.get(p, {}) for p in weights]) for weights, _ in parts]
            attached.begin_step()
            gates = list(attached._gates)
            model(x).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            learned = [any(p.grad is not None for p in weights) for weights, _ in parts]
            optimizer.zero_grad(set_to_none=number % 2 == 0)
            for place, (weights, buffers) in enumerate(parts):
                if gates[place].is_closed:
                    assert not learned[place]
                if learned[place] or not weights:
                    continue
                still += 1
                assert all(torch.equal(a, b) for a, b in zip(before[place], (*weights, *buffers), strict=True))
                now = [optimizer.state.get(p, {}) for p in weights]
                for old, new in zip(states[place], now, strict=True):
                    assert all(torch.equal(torch.as_tensor(old[k]), torch.as_tensor(new[k])) for k in new)
    assert still


@every_family
@every_method
def test_copies_of_an_attached_model_compute_the_same_and_run_their_own_weights(method, family):
    model, x, blocks, level = setup(family)
    model.eval()
    with torch.no_grad(), METHODS[method](model, blocks, None, level):
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301 - our own bytes
            assert torch.equal(twin(x), expected)
            for parameter in twin.parameters():
                parameter.mul_(0.5)
            assert not torch.equal(twin(x), expected)
        assert torch.equal(model(x), expected)


@every_family
@every_method
def test_a_lesion_wins_over_a_method(method, family):
    model, x, blocks, level = setup(family)
    model.eval()
    with torch.no_grad():
        with resect.closed(model, blocks):
            expected = model(x)
        with METHODS[method](model, blocks, None, level), resect.closed(model, blocks):
            assert torch.equal(model(x), expected)
