"""What altered networks share is not run again, and nothing comes out otherwise: compared to the bit with full runs."""

from __future__ import annotations

import itertools
import random

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import Net
from torch import Tensor, nn

import resect
from resect.blocks import replay
from resect.blocks.intercept import Intercepted
from resect.blocks.running import in_order, running


def each(model, blocks, x, subsets):
    """The outputs of replaying, those of full runs, how many layers were computed by each; and why in full, if so."""
    computed = []
    hooks = nn.Conv2d.forward, nn.Linear.forward

    def counted(plain):
        return lambda *args: computed.append(1) or plain(*args)

    with running(model, blocks, lambda model, x: model(x)) as run:
        list(run.each(x, subsets))  # proven from here on
        nn.Conv2d.forward, nn.Linear.forward = map(counted, hooks)
        try:
            ours = [output.clone() for output in run.each(x, subsets)]
            replayed = len(computed)
            full = [run._full(x, frozenset(subset)) for subset in subsets]
        finally:
            nn.Conv2d.forward, nn.Linear.forward = hooks
        return ours, full, replayed, len(computed) - replayed, run.proof.in_full


def some_subsets(names, seed=0):
    draw = random.Random(seed)
    return [(), *((name,) for name in names), *(draw.sample(names, min(len(names), k)) for k in (2, 2, 3, 3))]


def check(model, blocks, x, subsets):
    ours, full, replayed, computed, in_full = each(model, blocks, x, subsets)
    assert in_full == ""
    assert all(torch.equal(a, b) for a, b in zip(ours, full, strict=True))
    return replayed / computed


@pytest.mark.parametrize("family", [
    pytest.param(name, marks=pytest.mark.core if name in families.CORE else ()) for name in families.FAMILIES
])  # fmt: skip
def test_replaying_is_running_and_computes_less(family):
    model, x = families.FAMILIES[family]()
    blocks = resect.find_blocks(model, x)
    x = torch.cat([x, x.flip(-1)])
    assert check(model, blocks, x, in_order(blocks, some_subsets(blocks.names))) < 0.75
    check(model, blocks, x, some_subsets(blocks.names, 1))  # in any order


class Plain(nn.Module):
    """Plain code between modules, writes in place before and behind branches, a shared module, a raw parameter."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.shared, self.head = nn.Linear(5, width), nn.Linear(width, width), nn.Linear(width, 3)
        self.branches = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4))
        self.position = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h += self.position
        kept = [h, h * 2]
        first = h + self.branches[0](h)
        if float(kept[1].abs().max()) > 0:
            h.mul_(0.5)  # what branch 0 has read, and what the next run begins with
        second = self.shared(first) + h
        third = second + self.branches[1](torch.cat(kept, dim=1)[:, : h.shape[1]] + second)
        third.relu_()
        fourth = third + self.branches[2](self.shared(third))
        last = fourth + self.branches[3](fourth)
        return self.head(last.sub_(kept[0]))


@pytest.fixture
def plain():
    torch.manual_seed(0)
    net = Plain()
    x = torch.randn(8, 5)
    return net, resect.find_blocks(net, x), x


@pytest.mark.core
def test_plain_code_and_writes_in_place(plain):
    net, blocks, x = plain
    assert len(blocks) >= 3
    subsets = [subset for k in range(len(blocks) + 1) for subset in itertools.combinations(blocks.names, k)]
    assert check(net, blocks, x, in_order(blocks, subsets)) < 0.9
    check(net, blocks, x, subsets)


@pytest.mark.core
@settings(max_examples=12, deadline=None, database=None)
@given(st.lists(st.sets(st.integers(0, 4)), min_size=3, max_size=8), st.booleans())
def test_any_subsets_in_any_order(chosen, ordered):
    torch.manual_seed(0)
    net, x = Net((False, True, True)), torch.randn(3, 5)
    blocks = resect.find_blocks(net, x)
    subsets = [tuple(blocks.names[place] for place in places) for places in chosen]
    check(net, blocks, x, in_order(blocks, subsets) if ordered else subsets)


class Odd(nn.Module):
    """What a run leaves behind, or draws: nothing may be left out then."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.seen = kind, [0]
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "buffer":
            self.count += 1
        if self.kind == "attribute":
            self.last = object()
        if self.kind == "list":
            self.seen[0] += 1
        if self.kind == "random":
            x = x + torch.rand(1)
        if self.kind == "inference":
            with torch.inference_mode():
                return x * 1.0
        return x


REASONS = {
    "buffer": "a run changes stem.1._buffers",
    "attribute": "a run changes stem.1.last",
    "list": "a run changes stem.1.seen",
    "random": "a run changes the random state",
    "inference": "it runs in inference mode",
}


@pytest.mark.core
@pytest.mark.parametrize("kind", REASONS)
def test_what_cannot_be_left_out_is_run_in_full_and_said(kind):
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 5)
    blocks = resect.find_blocks(net, x)
    net.odd = Odd(kind)
    net.stem = nn.Sequential(net.stem, net.odd)
    subsets = [(), *((name,) for name in blocks.names)]
    count = net.odd.count.clone()
    with running(net, blocks, lambda model, x: model(x)) as run:
        torch.manual_seed(1)
        with pytest.warns(UserWarning, match=f"run in full, from the input on: .*{REASONS[kind]}"):
            ours = list(run.each(x, subsets))
        torch.manual_seed(1)
        full = [run._full(x, frozenset(subset)) for subset in subsets]
    assert all(torch.equal(a, b) for a, b in zip(ours, full, strict=True))
    assert torch.equal(net.odd.count, count)


@pytest.mark.core
def test_hooks_and_methods_are_served_in_full():
    torch.manual_seed(0)
    net, x = Net(), torch.randn(5, 5)
    blocks = resect.find_blocks(net, x)
    subsets = [(), *((name,) for name in blocks.names)]
    fired = []
    hook = net.stem.register_forward_hook(lambda *_: fired.append(1))
    with pytest.warns(UserWarning, match="'stem' has hooks"), running(net, blocks) as run:
        list(run.each(x, subsets))
    assert len(fired) == len(subsets)
    hook.remove()
    with (
        resect.EpsilonGate(net, blocks, epsilon=0.1, muted_at_start="allow"),
        running(net, blocks) as run,
        pytest.warns(UserWarning, match="EpsilonGate acts on the model"),
    ):
        list(run.each(x, subsets))
    top = net.register_forward_hook(lambda *_: fired.append(1))  # the model itself is always called
    with running(net, blocks) as run:
        list(run.each(x, subsets))
    top.remove()
    assert run.proof.in_full == ""


@pytest.mark.core
def test_a_model_that_does_otherwise_each_time_is_run_in_full(plain):
    net, blocks, x = plain
    subsets = [(), *((name,) for name in blocks.names)]
    turn = itertools.count()

    def forward(model, x):  # outside the model, where no state is seen
        return model(x * 1.0 if next(turn) % 2 else x + 0.0)

    with running(net, blocks, forward) as run:
        with pytest.warns(UserWarning, match=r"was called where the run before called \w+\. .*the same, slower\."):
            ours = list(run.each(x, subsets))
        full = [run._full(x, frozenset(subset)) for subset in subsets]
    assert all(torch.equal(a, b) for a, b in zip(ours, full, strict=True))


@pytest.mark.core
def test_an_exception_leaves_no_trace(plain):
    net, blocks, x = plain
    call, gated = nn.Module.__call__, Intercepted.__call__
    subsets = [(), *((name,) for name in blocks.names)]

    def breaks(model, batch):
        output = model(batch)
        if len(calls) > 30:
            raise RuntimeError("mine")
        calls.append(1)
        return output

    calls: list[int] = []
    with running(net, blocks, breaks) as run:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="mine"):
                [list(run.each(x, subsets)) for _ in range(30)]
    assert (nn.Module.__call__, Intercepted.__call__) == (call, gated)
    assert not replay._one_at_a_time.locked()
    assert not any(isinstance(module, Intercepted) for module in net.modules())
    check(net, blocks, x, subsets)


def test_language_models_without_a_cache_and_with_one():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=40,
        max_position_embeddings=32,
    )  # fmt: skip
    model, tokens = LlamaForCausalLM(config).eval(), torch.randint(0, 40, (4, 6))
    blocks = resect.find_blocks(model, {"input_ids": tokens})
    subsets = in_order(blocks, some_subsets(blocks.names))
    with running(model, blocks, lambda model, x: model(x, use_cache=False).logits) as run:
        ours = list(run.each(tokens, subsets))
        full = [run._full(tokens, frozenset(subset)) for subset in subsets]
    with (
        running(model, blocks, lambda model, x: model(x).logits) as run,
        pytest.warns(UserWarning, match="LlamaDecoderLayer was called with other inputs"),
    ):
        cached = list(run.each(tokens, subsets))
    for a, b, c in zip(ours, full, cached, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
