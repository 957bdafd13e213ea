"""What is found, what is refused with its reason, and what bad input gets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nets import Branch, Net
from torch import nn

import resect
from resect.blocks import verify
from resect.blocks.example import Example
from resect.blocks.trace import quiet
from resect.errors import InputError

pytestmark = pytest.mark.core


class OneBlock(nn.Module):
    """A block whose forward is given by the test."""

    def __init__(self, forward, **modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self._forward = forward

    def forward(self, *args, **kwargs):
        return self._forward(self, *args, **kwargs)


def inplace(net, x):
    y = net.f(x)
    y += x
    return torch.relu_(y)


def forms():
    linear = lambda: nn.Linear(4, 4)  # noqa: E731
    return {
        "x + f(x)": (OneBlock(lambda m, x: x + m.f(x), f=linear()), "identity"),
        "f(x) + x": (OneBlock(lambda m, x: m.f(x) + x, f=linear()), "identity"),
        "y = f(x); y += x; relu_(y)": (OneBlock(inplace, f=linear()), "identity"),
        "torch.add": (OneBlock(lambda m, x: torch.add(x, m.f(x)), f=linear()), "identity"),
        "x.add(f(x))": (OneBlock(lambda m, x: x.add(m.f(x)), f=linear()), "identity"),
        "projection": (
            OneBlock(lambda m, x: m.s(x) + m.g(torch.relu(m.f(x))), s=linear(), f=linear(), g=linear()),
            "projection",
        ),
        "keyword": (OneBlock(lambda m, x: x + m.f(input=x), f=linear()), "identity"),
        "tuple": (
            OneBlock(lambda m, x: (x + m.f(x)[0], x), f=OneBlock(lambda m, x: (m.g(x), None), g=linear())),
            "identity",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("form", forms())
def test_every_way_to_write_a_block(form):
    torch.manual_seed(0)
    net, kind = forms()[form]
    x = torch.randn(3, 4)
    before = x.clone()
    blocks = resect.find_blocks(net, x)
    assert [block.shortcut for block in blocks] == [kind]
    assert blocks[0].scalable
    with torch.no_grad(), resect.closed(net, blocks):
        output = net(x)
    output = output[0] if isinstance(output, tuple) else output
    expected = net.s(before) if kind == "projection" else torch.relu(before) if "relu_" in form else before
    assert torch.equal(output, expected)
    assert torch.equal(x, before), "the shortcut's own tensor was written"


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), 0),
        # Two branches side by side, no shortcut: not residual.
        (lambda: OneBlock(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)), 0),
        # Nor with two linear maps on one side: a re-parametrised convolution.
        (
            lambda: OneBlock(
                lambda m, x: m.a(x) + m.c(m.b(x)), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4)
            ),
            0,
        ),
        # A position table is no branch.
        (lambda: OneBlock(lambda m, x: x + m.table.weight[: len(x)], table=nn.Embedding(9, 4)), 0),
        # A sum without weights of its own is no branch.
        (lambda: OneBlock(lambda m, x: m.f(x + torch.tanh(x)), f=nn.Linear(4, 4)), 0),
        (lambda: Net((False, True)), 3),
    ],
)
def test_what_is_and_is_not_a_residual_block(build, count):
    torch.manual_seed(0)
    assert len(resect.find_blocks(build(), torch.randn(3, 5 if count else 4))) == count


def signed(value):
    return value if value.sum() > 0 else -value


def refusals():
    return {
        "used elsewhere": (
            OneBlock(lambda m, x: (lambda y: torch.cat([x + y, y], 1))(m.f(x)), f=nn.Linear(4, 4)),
            "also used outside",
        ),
        "a parameter used outside too": (
            OneBlock(lambda m, x: m.w.weight.sum() * x + torch.relu(x @ m.w.weight), w=nn.Linear(4, 4)),
            "",
        ),
        "control flow": (
            OneBlock(lambda m, x: x + m.g(signed(m.f(x))), f=nn.Linear(4, 4), g=nn.Linear(4, 4)),
            "decides by it",
        ),
    }  # fmt: skip


@pytest.mark.parametrize("case", refusals())
def test_what_cannot_be_controlled_is_refused_with_its_reason(case):
    net, reason = refusals()[case]
    blocks = resect.find_blocks(net, torch.randn(3, 4))
    assert not blocks
    assert len(blocks.refused) >= 1
    assert reason in blocks.refused[0].reason


# ruff: noqa: E501
def after_the_last_module():
    return {
        "a function": (OneBlock(lambda m, x: x + torch.tanh(m.f(x)), f=nn.Linear(4, 4)), lambda m, x, g: x + g(torch.tanh(m.f(x)))),
        "an addition": (
            OneBlock(lambda m, x: x + torch.relu(m.f(x) + 0.5 * x), f=nn.Linear(4, 4)),
            lambda m, x, g: x + g(torch.relu(m.f(x) + 0.5 * x)),
        ),
        "a difference": (OneBlock(lambda m, x: x + 0.5 * (m.f(x) - x), f=nn.Linear(4, 4)), lambda m, x, g: x + g(0.5 * (m.f(x) - x))),
        "subtracted": (OneBlock(lambda m, x: x - m.f(x), f=nn.Linear(4, 4)), lambda m, x, g: x - g(m.f(x))),
        "subtracted in place": (OneBlock(lambda m, x: (x * 1.0).sub_(m.f(x).tanh()), f=nn.Linear(4, 4)), lambda m, x, g: x - g(m.f(x).tanh())),
        "highway": (
            OneBlock(lambda m, x: (lambda t: t * m.f(x) + (1 - t) * x)(torch.sigmoid(m.t(x))), f=nn.Linear(4, 4), t=nn.Linear(4, 4)),
            lambda m, x, g: (lambda t: g(t * m.f(x)) + (1 - t) * x)(torch.sigmoid(m.t(x))),
        ),
        "weights alone": (OneBlock(lambda m, x: x + torch.relu(nn.functional.linear(x, m.w.weight, m.w.bias)), w=nn.Linear(4, 4)),
                          lambda m, x, g: x + g(torch.relu(m.w(x)))),
        "weights and bias added": (OneBlock(lambda m, x: x + (x @ m.w.weight + m.w.bias), w=nn.Linear(4, 4)),
                                   lambda m, x, g: x + g(x @ m.w.weight + m.w.bias)),
        "shapes asked": (OneBlock(lambda m, x: x + m.f(x).reshape(m.f(x).shape[0], 2, -1).flatten(1), f=nn.Linear(4, 4)),
                         lambda m, x, g: x + g(m.f(x))),
        "unpacked": (OneBlock(lambda m, x: x + (lambda a, b: m.o(a * b.sigmoid()))(*m.f(x).chunk(2, -1)), f=nn.Linear(4, 8), o=nn.Linear(4, 4)),
                     lambda m, x, g: x + g(m.o(m.f(x)[:, :4] * m.f(x)[:, 4:].sigmoid()))),
        "a dict": (OneBlock(lambda m, x: x + m.f(x)["out"], f=OneBlock(lambda m, x: {"out": m.g(x), "n": 3}, g=nn.Linear(4, 4))),
                   lambda m, x, g: x + g(m.f.g(x))),
        "y.add_(x)": (OneBlock(dropped_result, f=nn.Linear(4, 4)), lambda m, x, g: g(m.f(x)) + x),
        "part of the channels": (
            OneBlock(lambda m, x: (lambda y: torch.cat([y[:, :4] + x, y[:, 4:]], 1))(m.f(x)), f=nn.Linear(4, 6)),
            lambda m, x, g: (lambda y: torch.cat([y[:, :4] + x, y[:, 4:]], 1))(g(m.f(x))),
        ),
    }  # fmt: skip


def dropped_result(net, x):
    y = net.f(x)
    y.add_(x)
    return y


@torch.no_grad()
@pytest.mark.parametrize("form", after_the_last_module())
def test_a_branch_in_any_form_is_closed_scaled_and_removed(form):
    torch.manual_seed(0)
    net, formula = after_the_last_module()[form]
    x = torch.randn(3, 4)
    before = x.clone()
    blocks = resect.find_blocks(net, x)
    assert not blocks.refused
    (block,) = blocks
    whole, expected = formula(net, before, lambda f: f), formula(net, before, torch.zeros_like)
    quarter = formula(net, before, lambda f: f * 0.25)
    with resect.gates(net, blocks) as g:
        assert torch.equal(net(x), whole)
        g[0].close()
        assert torch.equal(net(x), expected)
        if block.scalable:
            g[0].scale(0.25)
            assert torch.equal(net(x), quarter)
    assert block.scalable or form == "shapes asked"  # its module runs twice
    assert torch.equal(x, before)
    small = resect.remove(net, blocks, block.name)
    assert torch.equal(small(x), expected)
    assert torch.equal(small(torch.cat([x, x])), torch.cat([expected, expected]))


def test_a_shared_module_is_a_block_at_each_of_its_calls():
    torch.manual_seed(0)
    branch = Branch(4)
    net = OneBlock(lambda m, x: (lambda y: y + m.f(y))(x + m.f(x)), f=branch)
    x = torch.randn(3, 4)
    blocks = resect.find_blocks(net, x)
    assert blocks.names == ["f", "f@1"]
    assert [block.calls for block in blocks] == [(0,), (1,)]
    with torch.no_grad(), resect.gates(net, blocks) as g:
        for first, second in ((1, 1), (0, 1), (1, 0), (0, 0), (1, 1)):
            g[0].scale(0.5) if first else g[0].close()
            g[1].open() if second else g[1].close()
            y = x + 0.5 * branch(x) if first else x
            count = len(branch.__dict__)
            assert torch.allclose(net(x), y + nn.Module.__call__(branch, y) if second else y)
            assert len(branch.__dict__) == count
    small = resect.remove(net, blocks, "f@1")
    with torch.no_grad():
        assert torch.equal(small(x), x + branch(x))
    assert list(small.state_dict()) == list(net.state_dict())


def test_a_wrong_choice_of_modules_is_caught_by_the_oracle():
    """Verification must refuse a candidate that names another branch's modules."""
    torch.manual_seed(0)
    net, x = Net((False, False, False)), Example.of(torch.randn(2, 5))
    blocks = resect.find_blocks(net, x)
    right = list(blocks)
    wrong = replace(blocks[0], modules=blocks[1].modules)
    with quiet(net):
        good, bad = verify.verify(verify.ValueCheck(net, x, right), right)
        assert (len(good), bad) == (3, [])
        mixed = [wrong, right[2]]
        good, bad = verify.verify(verify.ValueCheck(net, x, mixed), mixed)
    assert [block.name for block in good] == [right[2].name]
    assert "without it" in bad[0].reason


def test_a_wrong_branch_end_is_caught_by_the_oracle():
    net = OneBlock(lambda m, x: x + 2 * m.f(x), f=nn.Linear(4, 4))
    x = torch.randn(3, 4)
    (block,) = resect.find_blocks(net, x)
    with quiet(net):
        wrong = [replace(block, exact=True)]
        good, bad = verify.verify(verify.ValueCheck(net, Example.of(x), wrong), wrong)
    assert not bad
    assert good[0].scalable
    assert not good[0].exact, "it is not the branch end; the gate acts at the addition"


def test_the_example_may_be_a_tuple_a_mapping_or_an_example():
    net = OneBlock(lambda m, x, scale: x + m.f(x) * scale, f=nn.Linear(4, 4))
    x, s = torch.randn(2, 4), torch.tensor(2.0)
    for example in ((x, s), {"x": x, "scale": s}, resect.Example((x,), {"scale": s})):
        assert len(resect.find_blocks(net, example)) == 1


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (nn.Linear(3, 3), torch.randn(2, 4), r"cannot run on this example \(\(2, 4\) float32\)"),
        (nn.Linear(3, 3), torch.zeros(2, 3, dtype=torch.long), "cannot run on this example"),
        (nn.Linear(3, 3), "image.png", "must be a tensor"),
        (lambda x: x, torch.randn(2, 3), "needs a torch.nn.Module"),
    ],
)
def test_bad_input_gets_one_clear_message(model, example, message):
    with pytest.raises(InputError, match=message):
        resect.find_blocks(model, example)


def test_an_unknown_way_to_verify_is_refused():
    with pytest.raises(InputError, match="Did you mean 'joint'"):
        resect.find_blocks(nn.Linear(3, 3), torch.randn(2, 3), verify="join")
    assert len(resect.find_blocks(Net(), torch.randn(2, 5), verify="each")) == 3


def test_values_are_compared_nan_by_nan():
    nan, zero = torch.full((2,), float("nan")), torch.zeros(2)
    assert verify.compare(zero, nan)
    assert verify.compare(torch.tensor([float("inf")]), torch.tensor([torch.finfo(torch.float32).max]))
    assert not verify.compare(nan, nan.clone())


def or_ones(value, x):
    return value if isinstance(value, torch.Tensor) else torch.ones_like(x)


def test_a_zero_initialised_head_hides_nothing():
    """Closing this block leaves ones behind, which only shows before the head."""
    net = OneBlock(lambda m, x: m.h(x + or_ones(m.f(x), x)), f=nn.Linear(4, 4), h=nn.Linear(4, 4))
    nn.init.zeros_(net.h.weight)
    assert not resect.find_blocks(net, torch.randn(3, 4))


def test_an_output_kept_in_a_buffer_of_the_models_own_is_not_mistaken_for_a_result():
    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)
            self.register_buffer("last", torch.zeros(3, 4))

        def forward(self, x):
            return self.last.copy_(x + or_ones(self.f(x), x))

    assert not resect.find_blocks(Buffered(), torch.randn(3, 4))


def test_in_place_dropout_on_the_sum_does_not_reach_the_shortcut_in_train_mode():
    net = OneBlock(
        lambda m, x: (lambda h: m.drop(h + m.f(h)) + h)(x * 1.0), f=nn.Linear(4, 4), drop=nn.Dropout(0.5, inplace=True)
    )
    x = torch.randn(64, 4)
    blocks = resect.find_blocks(net, x)
    net.train()
    with resect.closed(net, blocks.select([blocks.names[0]])):
        torch.manual_seed(0)
        output = net(x)
    torch.manual_seed(0)
    assert torch.allclose(output, nn.functional.dropout(x, 0.5) + x)


def test_a_module_made_in_forward_is_passed_through():
    net = OneBlock(lambda m, x: x + m.g(nn.ReLU()(m.f(x))), f=nn.Linear(4, 4), g=nn.Linear(4, 4))
    (block,) = resect.find_blocks(net, torch.randn(3, 4))
    assert block.modules == ("f", "g")


def test_a_model_with_gates_attached_is_refused():
    net, x = Net(), torch.randn(2, 5)
    blocks = resect.find_blocks(net, x)
    with resect.closed(net, blocks[:1]), pytest.raises(resect.ResectError, match="still has gates attached"):
        resect.find_blocks(net, x)
