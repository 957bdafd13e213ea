"""Sharded by FSDP2 a net trains as one process does, and what is closed is not gathered."""

from __future__ import annotations

import contextlib

import pytest
import small
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Processes
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.utils.checkpoint import checkpoint

import resect
from resect.errors import AttachError

# On CPUs torch shards since 2.7 or so; the oldest torch that is supported has no reduce_scatter there.
pytestmark = pytest.mark.skipif(torch.__version__ < "2.8", reason="gloo of this torch does not scatter")


def whole(net):
    """The whole weights of a sharded net, on every process."""
    return get_model_state_dict(net, options=StateDictOptions(full_state_dict=True))


@contextlib.contextmanager
def gathers():
    """Count all-gathers of parameters (those of a method's own answers are not of this kind)."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group as group

    plain, seen = group.foreach_all_gather, []

    def counted(parameters, *args, **kwargs):
        seen.append(sorted(parameter._param_fqn for parameter in parameters))
        return plain(parameters, *args, **kwargs)

    group.foreach_all_gather = counted
    try:
        yield seen
    finally:
        group.foreach_all_gather = plain


def sharded(name, optimizer="sgd", order="shard", options=None):
    net, blocks = small.chain()
    classes = [type(module) for module in net.modules()]
    if order == "attach":
        with small.METHODS[name](net, blocks) as method:
            resect.fully_shard(net, blocks, **(options or {}))
            small.train(net, net, method, optimizer)
    else:
        resect.fully_shard(net, blocks, **(options or {}))
        with small.METHODS[name](net, blocks) as method:
            small.train(net, net, method, optimizer)
    # Detached, it is what torch alone makes of it.
    assert not any("_resect_port" in module.__dict__ for module in net.modules())
    twin = resect.fully_shard(small.chain()[0], blocks)
    assert [type(module).__name__ for module in net.modules()] == [type(module).__name__ for module in twin.modules()]
    assert all(isinstance(module, kind) for module, kind in zip(net.modules(), classes, strict=True))
    with torch.no_grad():
        net(small.batch(0)[0])
    state = whole(net)
    assert list(state) == list(small.chain()[0].state_dict())
    return state | {f"own {place}": value.detach() for place, value in enumerate(method.parameters())}


ORDERS = [("shard", name) for name in small.METHODS if "subset" not in name] + [
    ("attach", name) for name in small.METHODS
]


@pytest.mark.parametrize(("order", "name"), ORDERS)
def test_sharded_processes_train_as_one_on_the_joined_batch(name, order, two):
    optimizer = "sgd" if order == "shard" else "adamw"
    tolerance = 1e-7 if "skipping" in name else 1e-10
    small.check_same(two(sharded, name, optimizer, order), small.alone(name, optimizer), tolerance)


@pytest.mark.parametrize("name", ["StochasticDepth", "ResidualDroppath", "EpsilonGate, stream"])
@pytest.mark.parametrize("options", [{"reshard_after_forward": False}, {"reshard_after_forward": True}], ids=str)
def test_with_three_processes_and_torchs_own_options(name, options, three):
    small.check_same(three(sharded, name, "sgd", "shard", options), small.alone(name))


def gathered_by(make_units):
    """Per number of closed blocks, what is gathered in a training step's forward pass, and in its backward pass."""
    net, blocks = small.chain()
    if make_units == "branches":
        resect.fully_shard(net, blocks)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in net.layers:
            fully_shard(layer)
        fully_shard(net)
    found = {}
    x, y = small.mine(small.batch(0))
    for closed in (0, 3, 7):
        with gathers() as seen, resect.closed(net, blocks[:closed]):
            loss = F.cross_entropy(net(x), y)
            forward = len(seen)
            loss.backward()
        found[closed] = (forward, len(seen) - forward)
    return found


def test_a_closed_branch_is_not_gathered(two):
    # Two matrices in each of 7 branches, and the whole model's rest; backward the rest is still there.
    assert two(gathered_by, "branches") == [{0: (15, 14), 3: (9, 8), 7: (1, 0)}] * 2


def test_a_unit_that_is_a_whole_layer_is_gathered_all_the_same(two):
    (found, _) = two(gathered_by, "layers")
    assert {closed: forward for closed, (forward, _) in found.items()} == {0: 8, 3: 8, 7: 8}


def frozen_stands_still():
    """Per step whether exactly what may learn got a gradient and moved, under a sharded ResidualDroppath."""
    net, blocks = small.chain()
    resect.fully_shard(net, blocks)
    method, found = small.METHODS["ResidualDroppath"](net, blocks), []
    optimizer = small.OPTIMIZERS["adamw"](net.parameters())
    with method:
        small.train(net, net, method, optimizer, 2)
        for step in range(2, 8):
            before = {name: value.clone() for name, value in whole(net).items()}
            with torch.no_grad():
                net(small.batch(step)[0])  # leaves whole parameters where the pieces are to be frozen
            method.begin_step()
            learns = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
            x, y = small.mine(small.batch(step))
            F.cross_entropy(net(x), y).backward()
            given = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
            moved = {name for name, value in whole(net).items() if not torch.equal(value, before[name])}
            found.append((method.kind, given == learns == moved, len(moved)))
    return found


def test_what_stands_still_has_no_gradient_when_sharded(two):
    one, other = two(frozen_stands_still)
    assert one == other
    assert {kind for kind, _, _ in one} == {"drop", "dropped-only"}
    assert all(right for _, right, _ in one)


def closed_differently(attach):
    """What a lesion that differs between processes says, and whether the net runs afterwards."""
    net, blocks = small.chain()
    resect.fully_shard(net, blocks)
    x, _ = small.batch(0)
    expected = net(x)
    net.reshard()
    error, rank = "", dist.get_rank() if attach == "other" else 0
    with gathers() as seen:
        try:
            with resect.gates(net, blocks) as gates:
                gates[rank].close()
                net(x)
        except AttachError as raised:
            error = str(raised)
    return error, len(seen), torch.equal(net(x), expected)


def test_lesions_that_differ_between_processes_of_a_sharded_model_raise(three):
    assert three(closed_differently, "same") == [("", 13, True)] * 3
    for rank, (error, gathered, again) in enumerate(three(closed_differently, "other")):
        assert f"'layers.{rank}/up' here" in error
        assert not gathered
        assert again


def lesion_on_one():
    net, blocks = small.chain()
    resect.fully_shard(net, blocks)
    with resect.closed(net, blocks[2]) if dist.get_rank() else contextlib.nullcontext():
        return net(small.batch(0)[0])


def test_a_lesion_on_one_process_alone_ends_with_an_error_on_all():
    processes = Processes(2, patience=4)
    try:
        outcomes = processes.outcomes(lesion_on_one)
    finally:
        processes.close()
    assert all(failed for failed, _ in outcomes)


class Tied(small.Chain):
    """The first layer's and the second layer's matrices are one parameter; the third layer runs twice."""

    def __init__(self, count=7, width=6):
        super().__init__(count, width)
        self.layers[1].up.weight = self.layers[0].up.weight
        self.layers[3] = self.layers[2]
        self.scale = nn.Parameter(torch.full((width,), 0.7))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head((x + self.scale * torch.tanh(x)).mean(1))


class Nested(small.Layer):
    """A branch in which there is a block."""

    def __init__(self, width):
        super().__init__(width)
        self.up = nn.Sequential(small.Layer(width), nn.Linear(width, 2 * width))


class NestedChain(small.Chain):
    def __init__(self, count=7, width=6):
        super().__init__(count, width)
        self.layers = nn.ModuleList(Nested(width) for _ in range(3))


MAKE = {"tied": Tied, "nested": NestedChain}


def unusual(make, shard):
    """Outputs and whole gradients of a net with each block closed in turn."""
    net, blocks = small.chain(make=MAKE[make])
    if shard:
        resect.fully_shard(net, blocks)
    x, y = small.batch(0)
    found = {}
    for block in (None, *blocks):
        with resect.closed(net, block) if block else contextlib.nullcontext():
            loss = F.cross_entropy(net(x), y)
            loss.backward()
        gradients = {}
        for name, parameter in net.named_parameters():
            value = None if parameter.grad is None else parameter.grad
            gradients[name] = value.full_tensor() if hasattr(value, "full_tensor") else value
            parameter.grad = None
        found[block.name if block else ""] = float(loss.detach()), gradients
    return found


@pytest.mark.parametrize("make", MAKE)
def test_tied_shared_raw_and_nested_parts_are_right_when_sharded(make, two):
    expected = unusual(make, False)
    assert len(expected) > 3
    for found in two(unusual, make, True):
        assert list(found) == list(expected)
        for block, (loss, gradients) in expected.items():
            assert found[block][0] == pytest.approx(loss, rel=1e-12), block
            for name, gradient in gradients.items():
                other = found[block][1][name]
                assert (gradient is None) == (other is None), (block, name)
                assert gradient is None or torch.allclose(gradient, other, rtol=1e-10, atol=1e-12), (block, name)


class Asking(small.Layer):
    """Asks its branch for its shape, also where it was not computed."""

    def forward(self, x):
        wide = self.up(self.norm(x))
        samples, tokens, width = wide.shape
        return x + self.down(torch.relu(wide.view(samples * tokens, width)).view(samples, tokens, width))


class AskingChain(small.Chain):
    def __init__(self, count=7, width=6):
        super().__init__(count, width)
        for layer in self.layers:
            layer.__class__ = Asking


def asked(precision):
    from torch.distributed.fsdp import MixedPrecisionPolicy

    net, blocks = small.chain(make=AskingChain)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float64)
    resect.fully_shard(net, blocks, **({"mp_policy": policy} if precision == "mixed" else {}))
    x, _ = small.batch(0)
    with resect.closed(net, blocks):
        return net(x)


def test_a_model_may_ask_a_closed_branch_of_a_unit_for_its_shape(two):
    net, _ = small.chain()
    x, _ = small.batch(0)
    expected = net.head(net.stem(x).mean(1))
    for found in two(asked, "plain"):
        assert torch.allclose(found, expected)
    for found in two(asked, "mixed"):
        assert torch.allclose(found, expected, rtol=0.05, atol=0.05)


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
    resect.fully_shard(net, blocks)
    with small.METHODS[name](net, blocks) as method:
        small.train(net, net, method)
    return whole(net)


@pytest.mark.parametrize("name", ["StochasticDepth", "ResidualDroppath", "EpsilonGate"])
def test_with_gradient_checkpointing_when_sharded(name, two):
    small.check_same(two(checkpointed, name), small.alone(name))


def resumed():
    """Train sharded, save whole weights, go on in a net that is not sharded; and the other way round."""
    net, blocks = small.chain()
    resect.fully_shard(net, blocks)
    with small.METHODS["StochasticDepth"](net, blocks) as method:
        small.train(net, net, method, torch.optim.SGD(net.parameters(), lr=0.1), 3)
        state = method.state_dict()
    saved = whole(net)
    net, blocks = small.chain()
    resect.fully_shard(net, blocks)
    set_model_state_dict(net, saved, options=StateDictOptions(full_state_dict=True))
    with small.METHODS["StochasticDepth"](net, blocks) as method:
        method.load_state_dict(state)
        small.train(net, net, method, torch.optim.SGD(net.parameters(), lr=0.1), 3, first=3)
    return whole(net)


def test_saved_whole_and_loaded_it_goes_on(two):
    net, blocks = small.chain()
    with small.METHODS["StochasticDepth"](net, blocks) as method:
        small.train(net, net, method, torch.optim.SGD(net.parameters(), lr=0.1), 6)
    small.check_same(two(resumed), small.weights(net))


def folded(shard):
    net, blocks = small.chain()
    if shard:
        resect.fully_shard(net, blocks)
    method = resect.StochasticDepth(net, blocks, scaling="paper", **small.UNIFORM)
    with method:
        small.train(net, net, method)
    method.finalize()
    return whole(net) if shard else small.weights(net)


def test_factors_are_folded_into_the_pieces(two):
    net, blocks = small.chain()
    method = resect.StochasticDepth(net, blocks, scaling="paper", **small.UNIFORM)
    with method:
        small.train(net, net, method)
    method.finalize()
    small.check_same(two(folded, True), small.weights(net))


def misused(how):
    net, blocks = small.chain()
    if how == "wrapped":
        resect.fully_shard(small.wrapped(net), blocks)
    if how == "compiled":
        resect.compile(net, blocks)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with resect.StochasticDepth(net, blocks, optimizer=optimizer) as method:
        resect.fully_shard(net, blocks)
        if how == "twice":
            resect.fully_shard(net, blocks)
        elif how == "optimizer before":
            method.begin_step()
    if how == "found late":
        resect.find_blocks(net, torch.randn(8, 2, 5).double())
    elif how == "compiled late":
        resect.compile(net, blocks)
    elif how == "removed late":
        resect.remove(net, blocks, blocks.names[0])


MISUSED = {
    "wrapped": "takes the model itself, not inside a DistributedDataParallel",
    "twice": "sharded already",
    "optimizer before": "and after sharding",
    "found late": "Find the blocks before fully_shard",
    "compiled": "Parts of this Chain are compiled",
    "compiled late": "sharded by fully_shard",
    "removed late": "Load its full state dict",
}


def message(how):
    try:
        misused(how)
    except resect.ResectError as error:
        return str(error)
    return "nothing was raised"


@pytest.mark.parametrize("how", MISUSED)
def test_what_cannot_be_is_refused_with_the_remedy(how, two):
    for error in two(message, how):
        assert MISUSED[how] in error
