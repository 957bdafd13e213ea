"""What must hold for every training method on every family; a new method adds itself to METHODS."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import FAMILIES, family_params

import resect
from resect.blocks.intercept import PORT

# name -> method on (model, blocks, optimizer), set so that it acts: about half of the blocks are muted.
METHODS = {
    "EpsilonGate": lambda model, blocks, optimizer, level: resect.EpsilonGate(
        model, blocks, epsilon=level, optimizer=optimizer, muted_at_start="allow"
    ),
    "EpsilonGate, skipping": lambda model, blocks, optimizer, level: resect.EpsilonGate(
        model, blocks, epsilon=level, skip_muted_after=1, optimizer=optimizer, muted_at_start="allow"
    ),
}
# name -> the same method set so that it must change nothing.
OFF = {"EpsilonGate": lambda model, blocks, optimizer: resect.EpsilonGate(model, blocks, epsilon=0.0)}

every_family = pytest.mark.parametrize("family", family_params())
every_method = pytest.mark.parametrize("method", METHODS)


def setup(family):
    from resect.blocks.response import watch

    model, x = FAMILIES[family]()
    for module in model.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    blocks = resect.find_blocks(model, x)
    model.train()
    with torch.no_grad(), resect.gates(model, blocks) as gates:
        largest = watch(gates)
        model(x)
    model.load_state_dict(FAMILIES[family]()[0].state_dict())  # batch statistics moved
    level = sorted(largest.values())[len(largest) // 2]
    return model, x, blocks, level


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
