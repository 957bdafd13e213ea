"""Models on the meta device: what is executed is compared, as there are no values; and nobody takes it for more."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from nets import Net
from torch import nn

import resect
from resect.blocks.block import Blocks
from resect.blocks.example import Example
from resect.blocks.outline import OutlineCheck, difference, outline
from resect.blocks.trace import quiet, trace
from resect.errors import InputError, ProofError

X = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))


def on_meta(build, x):
    with torch.device("meta"):
        net = build()
    return net, resect.find_blocks(net, x)


class Joined(nn.Module):
    """Every way of adding: in place, the branch first, weighed, through views, with what is written later."""

    def __init__(self):
        super().__init__()
        self.f = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        y = self.f[0](x)
        y += x
        x = torch.relu_(y)
        x = self.f[1](x) + x
        x = torch.add(x, self.f[2](x), alpha=0.5)
        x = x + self.f[3](x).view(-1, 2, 2).transpose(1, 2).transpose(1, 2).reshape(x.shape)
        x = x + self.scale * self.f[4](x)
        x = self.f[6](x) + self.f[7](x) + x
        return x - self.f[5](x)


@pytest.mark.core
@pytest.mark.parametrize(("build", "x"), [(lambda: Net((False, True, True)), X), (Joined, torch.randn(2, 4))])
def test_blocks_on_meta_are_those_of_the_real_model(build, x):
    net, blocks = on_meta(build, x)
    assert all(parameter.is_meta for parameter in net.parameters()), "nothing was computed"
    torch.manual_seed(0)
    real = build().eval()
    found = resect.find_blocks(real, x)
    assert [dataclasses.replace(block, verified="values") for block in blocks] == list(found)
    assert not blocks.refused
    assert all(block.scalable for block in blocks)
    with torch.no_grad():
        for block in blocks:
            with resect.closed(real, Blocks([block])):
                closed = real(x)
            with resect.closed(real, block.name):
                assert torch.equal(real(x), closed)
        assert torch.equal(resect.remove(real, blocks, block.name)(x), closed)


@pytest.mark.core
def test_blocks_verified_by_structure_say_so():
    _, blocks = on_meta(Net, X)
    assert {block.verified for block in blocks} == {"structure"}
    assert "Verified by structure alone" in str(blocks)
    assert "verified by structure alone" in str(blocks[0])
    again = Blocks.from_json(json.loads(json.dumps(blocks.to_json())))
    assert [block.verified for block in again] == ["structure"] * 3
    found = resect.find_blocks(Net(), X)
    assert "structure" not in str(found)
    assert "2 of 3 verified by structure alone" in str(Blocks([found[0], *blocks[1:]]))


@pytest.mark.core
def test_nothing_is_proven_on_meta():
    net, blocks = on_meta(Net, X)
    with pytest.raises(ProofError, match="no values to prove a removal on"):
        resect.remove(net, blocks, blocks.names[:1])


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.other = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = x + self.b(torch.relu(self.a(x)))
        return x + torch.tanh(self.other(x))


@pytest.mark.core
@pytest.mark.parametrize(
    ("changes", "closes", "acts"),
    [
        ({}, True, True),
        ({"modules": ("a", "other")}, False, False),
        ({"modules": ("a", "b", "other"), "calls": (None,) * 3, "templates": ("absent",) * 3, "pending": (0, 0, 0)},
         False, True),
        ({"end": 0}, True, False),
        ({"pending": (1, 1)}, False, True),
    ],
)  # fmt: skip
def test_a_block_described_wrongly_is_caught(changes, closes, acts):
    with torch.device("meta"):
        net = Nested().eval()
    example = Example.of(torch.randn(2, 4))
    block = dataclasses.replace(resect.find_blocks(net, example)[0], **changes)
    with quiet(net):
        check = OutlineCheck(net, example, trace(net, example))
        assert (not check.closing_differs([block])) == closes, check.closing_differs([block])
        assert (not check.acting_differs([block])) == acts, check.acting_differs([block])


@pytest.mark.core
def test_outlines_tell_values_apart_not_only_operations():
    class Order(nn.Module):
        def __init__(self, swapped):
            super().__init__()
            self.a, self.b, self.swapped = nn.Linear(4, 4), nn.Linear(4, 4), swapped

        def forward(self, x):
            y, z = self.a(x), self.b(x)
            return z @ y.T if self.swapped else y @ z.T

    outlines = []
    for swapped in (False, False, True):
        with torch.device("meta"):
            net = Order(swapped)
        with quiet(net):
            outlines.append(outline(trace(net, Example.of(torch.randn(4, 4)))))
    assert not difference(outlines[0], outlines[1])
    assert "on other values" in difference(outlines[0], outlines[2])
    assert "matter for the output" in difference(outlines[0], outlines[0][:-1])


@pytest.mark.core
def test_a_model_that_reads_a_value_is_told_what_to_do():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x):
            return x + self.f(x) if x.sum().item() > 0 else x

    with pytest.raises(InputError, match="on the meta device, where nothing has a value"):
        on_meta(Reads, torch.randn(2, 4))


def llama(layers, width):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=3 * width, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def test_a_llama_too_large_to_hold_and_a_small_one_with_weights():
    example = {"input_ids": torch.randint(64, (1, 5))}
    large, blocks = on_meta(lambda: llama(24, 8192), example)
    assert sum(parameter.numel() for parameter in large.parameters()) > 10**10
    assert blocks.summary() == "48 residual blocks in 24 layers of LlamaForCausalLM: attention, MLP"
    assert not blocks.refused
    assert all(block.scalable for block in blocks)
    small = llama(24, 16).eval()
    found = resect.find_blocks(small, example)
    assert blocks.names == found.names
    with torch.no_grad():
        with resect.closed(small, found[5:30]):
            expected = small(**example).logits
        with resect.closed(small, blocks[5:30]):
            assert torch.equal(small(**example).logits, expected)
    cut = resect.remove(small, found, blocks[5:30].names)
    assert torch.equal(cut(**example).logits, expected)
