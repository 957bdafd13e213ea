"""Compiled block by block: no recompilation after warm-up, the values of eager code, the wrong ways refused."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from chains import Layer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import resect
from resect.errors import AttachError, InputError

pytest.importorskip("torch._dynamo")
RECENT = "isolate_recompiles" in inspect.signature(torch.compile).parameters
pytestmark = [
    pytest.mark.skipif(not RECENT, reason="torch.compile cannot isolate recompilations here"),
    pytest.mark.filterwarnings("ignore:.*below 6, dropping"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # torch looks, and hides it
]


class Two(nn.Module):
    """Two blocks of one owner, as in a transformer's layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.f = nn.LayerNorm(width), nn.Linear(width, width)
        self.g = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(self.norm(x))
        return x + self.g(x)


class Net(nn.Module):
    """Three blocks of two owners."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
        self.layers = nn.ModuleList([Layer(width), Two(width)])
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


RAMP = resect.schedules.Ramp(0.0, 1.0, 40)
METHODS = {
    "StochasticDepth": (resect.StochasticDepth, {}),
    "scheduled": (resect.StochasticDepth, {"drop_prob": RAMP}),
    "paper": (resect.StochasticDepth, {"drop_prob": RAMP, "scaling": "paper"}),
    "per sample": (resect.StochasticDepth, {"per": "sample", "drop_prob": RAMP}),
    "ResidualDroppath": (resect.ResidualDroppath, {"rule": "uniform"}),
    "ResidualDroppath, inverted": (resect.ResidualDroppath, {"scaling": "inverted"}),
    "ResidualDroppath per sample": (resect.ResidualDroppath, {"per": "sample"}),
    "shortcuts": (resect.ResidualDroppath, {"backward": "shortcuts", "norms": "eval", "rest": "trained"}),
    "dropped alone": (resect.ResidualDroppath, {"forward": "dropped", "drop_steps": 2, "warmup": 5}),
    "EpsilonGate": (resect.EpsilonGate, {"epsilon": RAMP}),
    "stream": (resect.EpsilonGate, {"epsilon": RAMP, "units": "stream", "muted_at_start": "allow"}),
    "skipping": (
        resect.EpsilonGate,
        {"epsilon": RAMP, "skip_muted_after": 3, "recheck_every": 7, "settle_after": 150, "side": 0.1},
    ),
    "EffectivePaths": (resect.EffectivePaths, {"keep": 2, "scaling": "inverted"}),
    "RandomSubset": (resect.RandomSubset, {"keep": 2}),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def pair(build=Net, *, x=None, **options):
    """A compiled net and its eager twin, with their blocks."""
    torch.manual_seed(0)
    net, x = build(), torch.randn(16, 3) if x is None else x
    blocks = resect.find_blocks(net, x)
    other = copy.deepcopy(net)
    compiled = resect.compile(net, blocks, **{"backend": "eager"} | options)
    return net.train(), other.train(), x, blocks, compiled


def step(net, method, optimizer, x, y):
    """One training step; returns the output and the gradients that the optimizer saw."""
    method.begin_step()
    torch.manual_seed(7)
    output = net(x)
    (nn.functional.cross_entropy(output, y) + method.extra_loss(y)).backward()
    optimizer.step()
    gradients = [None if p.grad is None else p.grad.clone() for p in net.parameters()]
    optimizer.zero_grad()
    return output.detach(), gradients


def alike(one, other, **near):
    if one is None or other is None:
        return one is other
    return torch.allclose(one, other, **near)


@pytest.mark.parametrize("name", METHODS)
def test_no_method_compiles_anything_after_warm_up(name):
    make, options = METHODS[name]
    net, other, x, blocks, _ = pair()
    methods = [make(model, blocks, **options) for model in (net, other)]
    optimizers = [
        torch.optim.SGD([*model.parameters(), *method.parameters()], lr=0.02, momentum=0.5)
        for model, method in zip((net, other), methods, strict=True)
    ]
    y = torch.arange(16) % 3
    with methods[0], methods[1]:
        assert methods[0].warmup((x, y)) > 0
        with torch.compiler.set_stance("fail_on_recompile"):
            for number in range(200):
                generator = torch.Generator().manual_seed(number)
                x = torch.randn(16, 3, generator=generator)
                runs = [
                    step(model, method, optimizer, x, y)
                    for model, method, optimizer in zip((net, other), methods, optimizers, strict=True)
                ]
                assert alike(runs[0][0], runs[1][0], atol=1e-5), number
                assert all(alike(a, b, atol=1e-5) for a, b in zip(runs[0][1], runs[1][1], strict=True)), number
                if number % 50 == 10:
                    with torch.no_grad():
                        assert torch.allclose(net.eval()(x), other.eval()(x), atol=1e-5)
                    net.train(), other.train()
        assert methods[0].metrics() == methods[1].metrics()
    assert not torch._dynamo.utils.counters["graph_break"]
    states = zip(net.state_dict().values(), other.state_dict().values(), strict=True)
    assert all(torch.allclose(one, two, atol=1e-4) for one, two in states)


@pytest.mark.parametrize("name", ["scheduled", "EpsilonGate"])
def test_inductor_gives_the_values_and_gradients_of_eager_code(name):
    make, options = METHODS[name]
    x = torch.randn(8, 4)
    net, other, _, blocks, _ = pair(lambda: nn.Sequential(nn.Linear(4, 4), Layer(4)), x=x, backend="inductor")
    with make(net, blocks, **options) as method, make(other, blocks, **options) as eager:
        method.warmup(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            for _ in range(10):
                gradients = []
                for model, its in ((net, method), (other, eager)):
                    its.begin_step()
                    model.zero_grad()
                    model(x).square().mean().backward()
                    gradients.append([p.grad for p in model.parameters()])
                assert torch.allclose(net(x), other(x), atol=1e-5)
                assert all(alike(a, b, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["paper", "per sample", "shortcuts", "skipping", "RandomSubset"])
def test_warm_up_leaves_no_trace(name):
    make, options = METHODS[name]
    net, other, x, blocks, _ = pair()
    y = torch.arange(16) % 3
    runs = []
    for model in (net, other):
        method = make(model, blocks, **options)
        optimizer = torch.optim.SGD([*model.parameters(), *method.parameters()], lr=0.1, momentum=0.5)
        runs.append((model, method, optimizer))
        method.attach()
        for _ in range(4):
            step(model, method, optimizer, x, y)
    net.head.weight.grad, net.head.bias.requires_grad = torch.ones(3, 4), False
    net.layers[0].eval()
    before = [value.clone() for value in net.state_dict().values()]
    gates = [dict(vars(gate)) for gate in runs[0][1]._gates]
    modes, random = [module.training for module in net.modules()], torch.get_rng_state()
    method = runs[0][1]
    state = copy.deepcopy(method.state_dict())
    method.warmup(x)
    assert all(torch.equal(a, b) for a, b in zip(before, net.state_dict().values(), strict=True))
    assert [dict(vars(gate)) for gate in method._gates] == gates
    assert [module.training for module in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert str(method.state_dict()) == str(state)
    assert torch.equal(net.head.weight.grad, torch.ones(3, 4))
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["head.bias"]
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["head.weight"]
    net.head.weight.grad, net.head.bias.requires_grad = None, True
    net.train()
    for _ in range(4):
        one, two = (step(*run, x, y) for run in runs)
        assert torch.allclose(one[0], two[0], atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_there_are_as_few_graphs_as_states():
    net, _, x, blocks, _ = pair()
    with resect.StochasticDepth(net, blocks) as method:
        assert method.warmup(x) == (2 + 1) + (4 + 1), "open and closed for every block, and one in eval mode"


def test_warm_up_says_when_it_is_not_its_time():
    net, other, x, blocks, _ = pair()
    method = resect.StochasticDepth(net, blocks)
    with pytest.raises(AttachError, match="comes after attach"):
        method.warmup(x)
    with method:
        method.begin_step()
        with pytest.raises(AttachError, match="before begin_step"):
            method.warmup(x)
    with resect.StochasticDepth(other, blocks) as method, pytest.raises(AttachError, match=r"resect\.compile\(model"):
        method.warmup(x)


def test_another_size_of_batch_is_warmed_up_by_another_call():
    net, _, x, blocks, _ = pair()
    with resect.StochasticDepth(net, blocks) as method:
        assert method.warmup(x) > 0
        assert method.warmup(x) == 0
        assert method.warmup(x[:5]) > 0
        with torch.compiler.set_stance("fail_on_recompile"):
            for size in (16, 5, 16, 7):
                method.begin_step()
                net(x[:size]).sum().backward()


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x + self.f(x))


class Around(nn.Module):
    """Owns one block and holds another owner."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.f = Layer(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return self.inner(x)


class Many(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for f in self.f:
            x = x + f(x)
        return x


class Repeated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.f(x)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (Around, "it holds '0.inner'"),
        (Many, "it holds 4 blocks"),
        (Repeated, "several times"),
    ],
)
def test_owners_that_stay_as_written_are_named(build, reason):
    net, x = nn.Sequential(build(), Layer(4)), torch.randn(8, 4)
    blocks = resect.find_blocks(net, x)
    with pytest.warns(UserWarning, match=f"(?s)1 of . owners of blocks are not compiled.*'0'.*{reason}"):
        compiled = resect.compile(net, blocks, backend="eager")
    assert list(compiled.eager) == ["0"]
    assert compiled.owners == (("0.inner", "1") if build is Around else ("1",))
    assert net[0]._compiled_call_impl is None
    assert net[1]._compiled_call_impl is not None


def test_a_model_that_owns_its_blocks_stays_as_written():
    net, x = Many(), torch.randn(8, 4)
    with pytest.warns(UserWarning, match="it is the model itself"):
        assert resect.compile(net, resect.find_blocks(net, x)).owners == ()


def test_what_cannot_be_compiled_block_by_block_is_refused(monkeypatch):
    net, x = nn.Sequential(nn.Sequential(Layer(4), Layer(4))), torch.randn(8, 4)
    blocks = resect.find_blocks(net, x)
    with pytest.raises(InputError, match="Pass the model itself"):
        resect.compile(torch.compile(net, backend="eager"), blocks)
    with resect.gates(net, blocks), pytest.raises(AttachError, match="comes before anything"):
        resect.compile(net, blocks)
    for module, name in ((net, "The model"), (net[0], "'0'"), (net[0][0].up, r"'0\.0\.up'")):
        module.compile(backend="eager")
        with pytest.raises(InputError, match=f"{name} is compiled already"):
            resect.compile(net, blocks)
        module._compiled_call_impl = None
    monkeypatch.setattr(torch, "compile", lambda model, *, backend=None: model)
    with pytest.raises(InputError, match=r"needs torch 2\.15"):
        resect.compile(net, blocks)


@pytest.mark.parametrize("how", ["wrapper", "in place", "part", "each alone"])
def test_a_net_compiled_the_wrong_way_is_refused_at_attach(how):
    net, x = nn.Sequential(nn.Sequential(Layer(4), Layer(4))), torch.randn(8, 4)
    blocks = resect.find_blocks(net, x)
    model = torch.compile(net, backend="eager") if how == "wrapper" else net
    for module in {"wrapper": [], "in place": [net], "part": [net[0]], "each alone": [net[0][0]]}[how]:
        module.compile(backend="eager")
    moving = [resect.StochasticDepth(model, blocks), resect.ResidualDroppath(model, blocks)]
    moving += [resect.EffectivePaths(model, blocks, keep=1), resect.RandomSubset(model, blocks, keep=1)]
    for method in [*moving, resect.EpsilonGate(model, blocks, epsilon=0.1, skip_muted_after=3)]:
        with pytest.raises(AttachError, match=r"is compiled .* write resect\.compile\(model, blocks\)"):
            method.attach()
        assert type(net[0][0].norm) is nn.BatchNorm1d
    # What does the same in every step may be compiled as a whole.
    resect.EpsilonGate(model, blocks, epsilon=0.1, muted_at_start="allow").attach().detach()
    resect.StochasticDepth(model, blocks, per="sample").attach().detach()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_wrapper_that_the_method_does_not_know_is_found_out_in_the_first_step(when):
    net, other, x, blocks, _ = pair()
    compiled = torch.compile(other, backend="eager") if when == "before" else None
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    with resect.StochasticDepth(other, blocks) as method:
        if compiled is None:
            compiled = torch.compile(other, backend="eager")
        with pytest.raises(AttachError, match=r"compiled as a whole.*resect\.compile"):
            step(compiled, method, optimizer, x, torch.arange(16) % 3)
    with resect.StochasticDepth(net, blocks) as method:
        net.layers[0].compile(backend="eager")
        with pytest.raises(AttachError, match="Compile first, then attach"):
            method.begin_step()


def test_one_wrapper_around_everything_is_right_where_every_step_does_the_same():
    _, other, x, blocks, _ = pair()
    model = copy.deepcopy(other)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    y = torch.arange(16) % 3
    for name in ("stream", "per sample"):
        make, options = METHODS[name]
        options = options | ({"drop_prob": 0.5} if name == "per sample" else {})
        runs = [
            (net, make(model, blocks, **options), torch.optim.SGD(model.parameters(), lr=0.1))
            for net, model in ((compiled, model), (other, other))
        ]
        with runs[0][1], runs[1][1]:
            for number in range(12):
                with torch.compiler.set_stance("default" if number < 2 else "fail_on_recompile"):
                    one, two = (step(*run, x, y) for run in runs)
                assert torch.allclose(one[0], two[0], atol=1e-5)
                assert all(alike(a, b, atol=1e-5) for a, b in zip(one[1], two[1], strict=True))


class Late(nn.Module):
    """The branch ends after its last module: gates act at the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.f(x)) * 2


class Raw(nn.Module):
    """The branch ends in a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.f(x)


class Begins(nn.Module):
    """The branch begins at a raw parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(x @ self.weight)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(4), nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0]


@pytest.mark.parametrize("build", [Late, Raw, Begins, Attention])
def test_gates_at_the_addition_and_raw_parameters(build):
    x = torch.randn(8, 5, 4)
    net, other, _, blocks, compiled = pair(lambda: nn.Sequential(nn.Linear(4, 4), build(), build()), x=x)
    assert compiled.owners == ("1", "2")
    makes = [lambda model: resect.StochasticDepth(model, blocks, scaling="none", drop_prob=0.9, rule="uniform")]
    if blocks[0].scalable:
        makes += [
            lambda model: resect.StochasticDepth(model, blocks, drop_prob=RAMP, rule="uniform"),
            lambda model: resect.EpsilonGate(model, blocks, epsilon=RAMP, units="stream", muted_at_start="allow"),
        ]
    for make in makes:
        with make(net) as method, make(other) as eager:
            method.warmup(x)
            with torch.compiler.set_stance("fail_on_recompile"):
                for _ in range(20):
                    gradients = []
                    for model, its in ((net, method), (other, eager)):
                        model.zero_grad()
                        its.begin_step()
                        model(x).square().mean().backward()
                        gradients.append([p.grad for p in model.parameters()])
                    assert torch.allclose(net(x), other(x), atol=1e-6)
                    assert all(alike(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(4), Layer(4)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=self.reentrant)
        return x

    reentrant = False


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_compiled_block_under_checkpointing_is_recomputed_as_it_was_or_raises(reentrant):
    x = torch.randn(8, 4, requires_grad=True)
    net, other, _, blocks, _ = pair(Checkpointed, x=x)
    net.reentrant = other.reentrant = reentrant
    make = lambda model: resect.StochasticDepth(model, blocks, scaling="none", rule=[0, 1], drop_prob=0.5, seed=1)  # noqa: E731
    with make(net) as method, make(other) as eager:
        for _ in range(4):
            gradients = []
            for model, its in ((net, method), (other, eager)):
                model.zero_grad()
                its.begin_step()
                model(x).sum().backward()
                gradients.append([p.grad for p in model.parameters()])
            assert all(alike(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))
        states = [gate.is_closed for gate in method._gates]
        output = net(x).sum()
        while [gate.is_closed for gate in method._gates] == states:
            method._begun = False
            method.begin_step()
        with pytest.raises(AttachError, match="changed between a forward pass and its recomputation"):
            output.backward()


def test_a_closed_block_gives_no_gradient_whatever_the_mode_is_by_then():
    net, _, x, blocks, _ = pair()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    with resect.StochasticDepth(net, blocks, drop_prob=1.0, rule="uniform", optimizer=optimizer) as method:
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        before = net.layers[1].f.weight.clone()
        method.begin_step()
        net(x).sum().backward()
        net.eval()
        optimizer.step()
    assert torch.equal(net.layers[1].f.weight, before)


def test_a_copy_of_a_compiled_net_is_not_compiled():
    net, _, x, _, _ = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin = copy.deepcopy(net.eval())
    assert torch.allclose(twin(x), net(x), atol=1e-6)
    assert all(module._compiled_call_impl is None for module in twin.modules())
