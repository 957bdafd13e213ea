"""Every block of every family: found, closed, scaled, removed, reloaded; against the oracle, to the bit."""

from __future__ import annotations

import collections
import copy
import functools
import pickle

import pytest
import torch
from families import COUNTS, FAMILIES, family_params

import resect
from resect.blocks.intercept import Intercepted
from resect.blocks.state import PORT
from resect.blocks.trace import is_sum
from resect.blocks.verify import Oracle

every_family = pytest.mark.parametrize("family", family_params())


class SumRecorder(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the shape of both operands of every addition: an oracle that knows nothing of modules."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if is_sum(func, args):
            self.sums.append((name, self.counts[name], (args[0].clone(), args[1].clone())))
        self.counts[name] += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self):
        self.sums, self.counts = [], collections.Counter()
        return super().__enter__()


def built(family):
    model, x, blocks = found(family)
    torch.manual_seed(0)
    return copy.deepcopy(model), x.clone(), blocks


@functools.cache
def found(family):
    model, x = FAMILIES[family]()
    return model, x, resect.find_blocks(model, x)


def place_of_branch(model, x, block):
    """Find the addition and operand of a block by what its end module returned."""
    caught = []
    handle = model.get_submodule(block.modules[block.end]).register_forward_hook(
        lambda m, a, out: caught.append(copy.deepcopy(out))
    )
    with torch.no_grad(), SumRecorder() as recorder:
        model(x)
    handle.remove()
    value = caught[0] if block.end_leaf is None else caught[0][block.end_leaf[0]]
    found = [
        (name, number, operand)
        for name, number, operands in recorder.sums
        for operand in (0, 1)
        if operands[operand].shape == value.shape and torch.equal(operands[operand], value)
    ]
    return found


@every_family
def test_the_published_number_of_blocks_is_found(family):
    _, _, blocks = built(family)
    kinds = {kind: len(blocks.kind(kind)) for kind in ("identity", "projection", "reshape") if len(blocks.kind(kind))}
    assert kinds == COUNTS[family]
    assert not blocks.refused
    assert all(block.scalable for block in blocks)
    assert len(set(blocks.names)) == len(blocks)


@every_family
def test_finding_leaves_the_model_as_it_was(family):
    model, x = FAMILIES[family]()
    model.train()
    next(iter(model.children())).eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    resect.find_blocks(model, x)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(isinstance(module, Intercepted) for module in model.modules())


@every_family
@torch.no_grad()
def test_open_is_the_original_and_nothing_stays_behind(family):
    model, x, blocks = built(family)
    expected, keys, classes = model(x), list(model.state_dict()), [type(m) for m in model.modules()]
    with resect.gates(model, blocks) as g:
        assert torch.equal(model(x), expected)
        assert list(model.state_dict()) == keys
        assert [type(m).__name__ for m in model.modules()] == [c.__name__ for c in classes]
        g[0].close()
        assert not torch.equal(model(x), expected)
    assert [type(m) for m in model.modules()] == classes
    assert torch.equal(model(x), expected)
    assert all(PORT not in module.__dict__ for module in model.modules())


@every_family
@torch.no_grad()
def test_every_block_closed_and_scaled_equals_the_oracle(family):
    model, x, blocks = built(family)
    for block in blocks:
        place = place_of_branch(model, x, block)
        assert place, block.name
        with Oracle({place[0]: torch.zeros_like}):
            zeroed = model(x)
        with Oracle({place[0]: lambda branch: branch * 0.37}):
            scaled = model(x)
        assert not torch.equal(zeroed, model(x)), "the test would prove nothing"
        with resect.gates(model, blocks) as g:
            g[block.name].close()
            assert torch.equal(model(x), zeroed), block.name
            g[block.name].scale(0.37)
            assert torch.equal(model(x), scaled), block.name


@every_family
@torch.no_grad()
def test_a_closed_branch_is_not_computed(family):
    """No module inside a closed branch runs, and the open ones run as before."""
    model, x, blocks = built(family)
    ran = set()
    inside = {name: {m for part in block.modules for m in model.get_submodule(part).modules()}
              for name, block in zip(blocks.names, blocks, strict=True)}  # fmt: skip
    hooks = [m.register_forward_pre_hook(lambda m, args: ran.add(m)) for m in model.modules()]
    half = blocks[::2]
    with resect.closed(model, half):
        model(x)
    for hook in hooks:
        hook.remove()
    for block in blocks:
        assert bool(ran & inside[block.name]) == (block.name not in half.names)


@every_family
def test_closed_equals_removed_equals_reloaded(family, tmp_path):
    model, x, blocks = built(family)
    for names in ([blocks.names[0]], blocks.names[::2], blocks.names):
        small = resect.remove(model, blocks, names)
        resect.save(small, tmp_path / "cut")
        fresh = FAMILIES[family]()[0]
        torch.nn.init.normal_(next(fresh.parameters()))
        reloaded = resect.load(tmp_path / "cut", fresh)
        with torch.no_grad(), resect.closed(model, blocks.select(names)):
            expected = model(x)
        with torch.no_grad():
            assert torch.equal(small(x), expected)
            assert torch.equal(reloaded(x), expected)
        assert set(small.state_dict()) <= set(model.state_dict())
        gone = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
        assert gone == sum(blocks[name].parameters for name in names)


@every_family
def test_closed_equals_removed_in_train_mode_with_gradients_and_buffers(family):
    model, x, blocks = built(family)
    names = blocks.names[1::2]
    small = resect.remove(model, blocks, names)
    for net in (model, small):
        net.train()
        for module in net.modules():
            if type(module).__name__ in ("DropPath", "StochasticDepth", "Dropout"):
                module.eval()  # their draws would differ from one model to the other
    with resect.closed(model, blocks.select(names)):
        closed_output = model(x)
        closed_output.square().sum().backward()
    output = small(x)
    output.square().sum().backward()
    assert torch.equal(closed_output, output)
    kept = dict(small.named_parameters())
    gone = {name for name, _ in model.named_parameters()} - set(kept)
    assert gone
    for name, parameter in model.named_parameters():
        if name in gone or kept[name].grad is None:
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, kept[name].grad), name
    buffers = dict(small.named_buffers())
    fresh = dict(FAMILIES[family]()[0].named_buffers())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers.get(name, fresh[name])), name


@every_family
@torch.no_grad()
def test_copies_have_gates_and_weights_of_their_own(family):
    model, x, blocks = built(family)
    with resect.gates(model, blocks) as g:
        g[0].close()
        expected = model(x)
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))  # noqa: S301 - a round trip of our own bytes
        g[0].open()
        for other in (twin, again):
            assert torch.equal(other(x), expected)
            for parameter in other.parameters():
                parameter.mul_(0.5)
            assert not torch.equal(other(x), expected)
        assert not torch.equal(model(x), expected)
    assert all(isinstance(m, type(n)) for m, n in zip(twin.modules(), model.modules(), strict=True))


@every_family
@torch.no_grad()
def test_other_batch_sizes_than_the_examples(family):
    model, x, blocks = built(family)
    small = resect.remove(model, blocks, blocks.names[::3])
    other = torch.cat([x, x, x])[:5]
    with resect.closed(model, blocks[::3]):
        assert torch.equal(model(other), small(other))
