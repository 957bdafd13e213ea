"""What find_blocks says to an example or a model that it cannot work with: what, where, what to do next."""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from nets import Net
from torch import Tensor, nn

import resect
from resect.blocks.rehearse import run_once
from resect.errors import BlocksError, InputError

pytestmark = pytest.mark.core


class Written(nn.Module):
    """A model whose forward is given by the test; ``f`` and ``g`` are its modules."""

    def __init__(self, forward, **options):
        super().__init__()
        self.f, self.g = nn.Linear(4, 4), nn.Linear(4, 4)
        self.__dict__.update(options)
        self._forward = forward

    def forward(self, *args, **kwargs):
        return self._forward(self, *args, **kwargs)


X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def fails(model, example):
    with pytest.raises(resect.ResectError) as caught:
        resect.find_blocks(model, example)
    return caught.value


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Net, "the class Net. Pass an instance: Net(…)"),
        ("resnet18", "timm.create_model('resnet18')"),
        (Net().state_dict(), "load_state_dict"),
        (None, "not NoneType"),
        (torch.relu, "write it as a torch.nn.Module"),
    ],
)
def test_what_is_no_model(model, told):
    error = fails(model, X)
    assert isinstance(error, InputError)
    assert told in str(error)


@pytest.mark.parametrize(
    ("example", "told"),
    [
        (None, "pass what you would call it with"),
        (iter([X]), "next(iterator)"),
        ((x for x in [X]), "next(iterator)"),
        (torch.utils.data.DataLoader([X]), "next(iter(loader))"),
        (X.numpy(), "torch.from_numpy"),
        ({0: X}, "resect.Example((mapping,))"),
        (torch.Tensor, "must be a tensor"),
        (3.0, "not float"),
    ],
)
def test_what_is_no_example(example, told):
    error = fails(Net(), example)
    assert isinstance(error, InputError)
    assert told in str(error)


@pytest.mark.parametrize(
    ("model", "example", "told"),
    [
        (Net(), X.double(), "example.to(torch.float32)"),
        (Net().half(), X, "example.to(torch.float16)"),
        (Net().bfloat16(), X, "weights are torch.bfloat16 and the example is torch.float32"),
        (Net(), torch.ones(2, 5, dtype=torch.long), "whole numbers: pass example.to(torch.float32)"),
        (nn.Embedding(9, 4), torch.rand(2, 3), "pass whole numbers"),
        (Net(), (X, torch.zeros(2)), "inputs alone: batch[0]"),
        (Net(), {"z": X}, "unexpected keyword argument 'z'"),
        (Net(), (), "no tensors"),
        (Net(), torch.randn(2, 6), "raised in 'stem', a Linear"),
    ],
)
def test_an_example_that_does_not_fit(model, example, told):
    error = fails(model, example)
    assert isinstance(error, InputError)
    assert told in str(error)
    assert isinstance(error.__cause__, Exception), "the model's own error is the cause"


def test_an_error_inside_the_model_is_the_cause_and_its_module_is_named():
    class Bad(nn.Module):
        def forward(self, x):
            raise KeyError("no such thing")

    net = Net()
    net.layers[1].a.up = Bad()
    error = fails(net, X)
    assert isinstance(error.__cause__, KeyError)
    assert "KeyError: 'no such thing' (raised in 'layers.1.a.up', a Bad)" in str(error)
    assert "(2, 5) float32" in str(error)


@pytest.mark.parametrize("output", [None, 3, "text", (1, {"a": None})])
def test_an_output_without_tensors(output):
    error = fails(Written(lambda m, x: output), X)
    assert isinstance(error, InputError)
    assert f"returns no tensor on this example but {type(output).__name__}" in str(error)


@dataclass
class Outputs:
    first: Any
    second: Any = None


def test_tensors_in_a_dataclass_are_seen():
    model = Written(lambda m, x: Outputs(None, (m.f(x),)))
    with torch.no_grad():
        assert isinstance(run_once(model, resect.Example((torch.randn(2, 4),))), Outputs)


def test_half_precision_on_the_cpu_and_an_example_that_requires_gradients_are_fine():
    assert len(resect.find_blocks(Net().half(), X.half())) == 3
    assert len(resect.find_blocks(Net().bfloat16(), X.bfloat16())) == 3
    leaf = X.clone().requires_grad_()
    assert len(resect.find_blocks(Net(), leaf)) == 3
    assert leaf.grad is None


def test_nothing_is_left_behind_by_a_failure():
    net = Net().train()
    net.layers[0].eval()
    before = {name: (type(module), module.training) for name, module in net.named_modules()}
    fast, seed = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
    fails(net, torch.randn(2, 6))
    assert {name: (type(module), module.training) for name, module in net.named_modules()} == before
    assert torch.backends.mha.get_fastpath_enabled() == fast
    torch.set_rng_state(seed)


# Devices. The meta device stands for another one: there is no second device where these tests run.


def test_a_meta_example_for_a_real_model():
    assert "holds no values, and the model is on cpu" in str(fails(Net(), X.to("meta")))


def test_a_model_partly_on_meta():
    net = Net()
    net.layers[1].to("meta")
    error = fails(net, X)
    assert isinstance(error, BlocksError)
    assert "6 of the model's 22 parameters are on the meta device (for instance 'layers.1.a.norm.weight')" in str(error)


def test_the_example_is_moved_to_the_models_device():
    seen = []
    model = Written(lambda m, x, y: seen.append((x.device.type, y.device.type)) or m.f(x))
    resect.Example((torch.ones(2, 4), torch.ones(3)), {}).run(model.to("meta"))
    assert seen == [("meta", "meta")]


def test_weights_on_meta():
    """A model too large to hold: its blocks are found without computing, by the names they have when it is real."""
    assert resect.find_blocks(Net().to("meta"), X).names == resect.find_blocks(Net(), X).names


# Models that do not repeat themselves.


def coin(m, x):
    return m.g(x + m.f(x)) if m.throw() else m.g(x) + x


def counts(m, x):
    m.n = m.n + 1
    return coin(m, x)


DIFFERENT = {
    "a coin of Python's": (lambda: Written(coin, throw=lambda: next(COINS)), "does not run the same operations"),
    "every other call": (
        lambda: (lambda m: m.__dict__.update(throw=lambda: m.n % 2) or m)(Written(counts, n=0)),
        "does not run the same operations",
    ),
    "a coin of torch's, also in eval mode": (
        lambda: Written(coin, throw=lambda: torch.rand(()) < 0.5),
        "does not run the same operations",
    ),
    "numbers of Python's": (lambda: Written(lambda m, x: x + m.f(x) * random.random()), "another output every time"),
    "a generator of its own": (
        lambda: Written(lambda m, x: x + m.f(x + torch.randn(2, 4, generator=m.own)), own=torch.Generator()),
        "another output every time",
    ),
    "a growing state": (
        lambda: Written(lambda m, x: m.__dict__.update(h=m.h + 1) or x + m.f(x) * m.h, h=0),
        "another output every time",
    ),
}
COINS = iter([True, False] * 99)


@pytest.mark.parametrize("case", DIFFERENT)
def test_a_model_that_differs_from_run_to_run(case):
    build, told = DIFFERENT[case]
    torch.manual_seed(0)
    error = fails(build(), torch.randn(2, 4))
    assert isinstance(error, BlocksError)
    assert told in str(error)
    assert "Look for random numbers from another source" in str(error)


def test_the_first_difference_is_shown():
    model = nn.Sequential(nn.Linear(4, 4), Written(lambda m, x: x + m.f(x) * next(m.numbers), numbers=iter(range(99))))
    assert "operation 4 was aten::mul in '1' gave other values" in str(fails(model, torch.randn(2, 4)))
    model = nn.Sequential(nn.Linear(4, 4), Written(coin, throw=iter([True, True, False, True, False] * 9).__next__))
    told = str(fails(model, torch.randn(2, 4)))
    assert "operation 2 was aten::t in '1.f' in one run and aten::t in '1.g' in the next" in told or (
        "operation 2 was aten::t in '1.g' in one run and aten::t in '1.f' in the next" in told
    )


def test_what_only_the_first_run_does_is_no_difference():
    """A cache built lazily, and random numbers of torch that change no operation."""

    def forward(m, x):
        if m.cache is None:
            m.cache = torch.tanh(torch.ones(4)).exp()
        return x + m.f(x + m.cache + torch.rand(4))

    assert len(resect.find_blocks(Written(forward, cache=None), torch.randn(2, 4))) == 1


def test_a_model_may_write_into_its_input_or_fill_a_cache_handed_in():
    class Cache:
        def __init__(self):
            self.seen = []

    def forward(m, x, cache):
        cache.seen.append(x.relu_())
        h = sum(cache.seen)
        return h + m.f(h)

    x, cache = torch.randn(2, 4), Cache()
    before = x.clone()
    assert len(resect.find_blocks(Written(forward), (x, cache))) == 1
    assert torch.equal(x, before)
    assert not cache.seen


def test_one_value_given_twice_is_one_value():
    x = torch.randn(2, 4)
    model = Written(lambda m, x, y: x + m.f(y))
    assert len(resect.find_blocks(model, (x, x))) == 1
    assert not resect.find_blocks(model, (x, torch.randn(2, 4)))


def test_a_labelled_tensor_is_an_example_like_any_other():
    """Torchvision's ``Image`` and MONAI's ``MetaTensor`` are subclasses that every operation wraps anew."""

    class Labelled(torch.Tensor):
        pass

    blocks = resect.find_blocks(Net(), X.as_subclass(Labelled))
    assert len(blocks) == 3
    net = Net()
    with resect.closed(net, blocks):
        assert type(net(X.as_subclass(Labelled))) is Labelled


def test_discovery_runs_the_model_at_most_twelve_times():
    def runs_of(model, x):
        runs = []
        model.register_forward_pre_hook(lambda *_: runs.append(1))
        resect.find_blocks(model, x)
        return len(runs)

    assert runs_of(nn.Linear(5, 5), X) == 3, "where there is nothing to verify"
    assert runs_of(Written(lambda m, x: m.f(x + torch.rand(4))), torch.randn(2, 4)) == 4, "another seed is tried too"
    assert runs_of(Net((False, True, False, True)), X) <= 12


# Wrappers.


@pytest.fixture
def one_process():
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def wrapped(net, how):
    if how == "DistributedDataParallel":
        return nn.parallel.DistributedDataParallel(net)
    if how == "DataParallel":
        return nn.DataParallel(net)
    if how == "torch.compile":
        return torch.compile(net, backend="eager")
    return torch.compile(nn.DataParallel(net), backend="eager")


WRAPPERS = ("DistributedDataParallel", "DataParallel", "torch.compile", "torch.compile of DataParallel")


@pytest.mark.parametrize("how", WRAPPERS)
def test_blocks_of_a_wrapped_model_are_those_of_the_model_inside(how, one_process):
    net = Net().eval()
    blocks = resect.find_blocks(wrapped(net, how), X)
    assert blocks.names == resect.find_blocks(net, X).names
    assert blocks.model == "Net"
    model = wrapped(net, how)
    with torch.no_grad(), resect.closed(net, blocks):
        assert torch.equal(model(X), net.head(net.stem(X)))


@pytest.mark.parametrize("how", WRAPPERS)
def test_gates_act_through_wrappers(how, one_process):
    net = Net().eval()
    model = wrapped(net, how)
    blocks = resect.find_blocks(model, X)
    expected = net.head(net.layers[2](net.layers[1](net.stem(X))))
    for which in (blocks[:1], "layers.0", [0]):
        for gated in (model, net):
            with torch.no_grad(), resect.closed(gated, which):
                assert torch.equal(model(X), expected)
    with torch.no_grad(), resect.closed(model, blocks):
        assert torch.equal(model(X), net.head(net.stem(X)))
    small = resect.remove(model, blocks, blocks.names)
    assert type(small) is Net
    assert torch.equal(small(X), net.head(net.stem(X)))


@pytest.mark.parametrize("how", WRAPPERS)
def test_a_users_hooks_on_a_wrapper_act_around_gates_and_not_while_blocks_are_found(how, one_process):
    net, seen = Net().eval(), []
    model = wrapped(net, how)
    model.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model.register_forward_hook(lambda m, args, output: seen.append(output))
    net.layers[0].a.register_forward_hook(lambda m, args, output: output * 3)
    blocks = resect.find_blocks(model, X)
    assert len(blocks) == 3
    assert not seen
    with torch.no_grad(), resect.closed(model, blocks[1:]):
        output = model(X)
        stream = net.stem(X * 2)
        assert torch.equal(output, net.head(stream + net.layers[0].a(stream)))
    assert len(seen) == 1
    assert torch.equal(seen[0], output)


def compiled_parts(how):
    net = Net().eval()
    if how == "model.compile()":
        net.compile(backend="eager")
    for place, layer in enumerate(net.layers):
        if how == "layer.compile()":
            layer.compile(backend="eager")
        elif how == "branch.compile()":
            layer.a.compile(backend="eager")
        elif how == "compiled children":
            net.layers[place] = torch.compile(layer, backend="eager")
        elif how == "compiled functions":
            layer.forward = torch.compile(layer.forward, backend="eager")
    return net


@pytest.mark.parametrize(
    "how", ["model.compile()", "layer.compile()", "branch.compile()", "compiled children", "compiled functions"]
)
def test_compiled_parts_run_as_written_while_blocks_are_found(how):
    torch._dynamo.reset()
    net = compiled_parts(how)
    with torch.no_grad():
        expected = net(X)  # compiled before anything is found
        blocks = resect.find_blocks(net, X)
        assert len(blocks) == 3
        for _ in range(2):
            with resect.closed(net, blocks):
                assert torch.equal(net(X), net.head(net.stem(X)))
            assert torch.equal(net(X), expected)


def test_fsdp_is_refused_by_name(one_process):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    with warnings.catch_warnings():  # it says that one process needs no sharding
        warnings.simplefilter("ignore")
        net = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"))
    assert "wrapped by FullyShardedDataParallel" in str(fails(net, X))
    net = Net()
    fully_shard(net.layers[1])
    told = str(fails(net, X))
    assert "'layers.1' (FSDPBlock) is sharded by fully_shard (FSDP2)" in told
    assert "Find the blocks before fully_shard" in told


def test_gates_act_on_a_sharded_model_whose_blocks_were_found_before(one_process):
    from torch.distributed.fsdp import fully_shard

    net = Net().eval()
    blocks = resect.find_blocks(net, X)
    with torch.no_grad():
        expected = net.head(net.layers[1](net.stem(X)))
        for layer in net.layers:
            fully_shard(layer)
        try:
            net(X)
        except AttributeError:
            pytest.skip("this version of torch shards on accelerators only")
        with resect.closed(net, blocks.select(["layers.0", "layers.2"])):
            assert torch.equal(net(X), expected)


def test_tensor_parallel_is_refused_by_name(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    net = Net()
    up = net.layers[0].a.up
    with warnings.catch_warnings():  # older versions speak of random numbers
        warnings.simplefilter("ignore")
        up.weight = nn.Parameter(distribute_tensor(up.weight.data, init_device_mesh("cpu", (1,))))
    assert "Parameter 'weight' of 'layers.0.a.up' (Linear) is a DTensor" in str(fails(net, X))


def test_deepspeed_is_refused_by_name():
    engine = type("DeepSpeedEngine", (Net,), {})()
    assert "before deepspeed.initialize" in str(fails(engine, X))


class Scripted(nn.Module):
    def __init__(self):
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, torch.randn(2, 4))])
def test_a_scripted_model_is_refused_by_name(make):
    assert "compiled by torch.jit" in str(fails(make(Scripted()), torch.randn(2, 4)))


def test_a_scripted_branch_is_a_branch():
    net = Written(lambda m, x: x + m.f(x))
    net.f = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    x = torch.randn(2, 4)
    blocks = resect.find_blocks(net, x)
    with torch.no_grad(), resect.closed(net, blocks):
        assert torch.equal(net(x), x)
