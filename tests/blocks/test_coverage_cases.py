"""What real models were found to do, in miniature: each of these once failed in the coverage run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import resect

WIDTH = 6


def chain(layer: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, WIDTH), layer(), layer(), nn.Linear(WIDTH, 3)).eval()


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))


@torch.no_grad()
def closed_is_zeroed(model: nn.Module, x: Tensor, name: str, end: str) -> None:
    """Closing a block gives the same bits as its branch end replaced by zeros."""
    hook = model.get_submodule(end).register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    expected = model(x)
    hook.remove()
    assert not torch.equal(expected, model(x)), "the test would prove nothing"
    blocks = resect.find_blocks(model, x)
    with resect.closed(model, [name]):
        assert torch.equal(model(x), expected)
    assert torch.equal(resect.remove(model, blocks, [name])(x), expected)


class AddsByKeyword(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(input=x, other=self.f(x))


class AddsInto(Layer):
    def forward(self, x: Tensor) -> Tensor:
        total = torch.empty_like(x)
        torch.add(x, self.f(x), out=total)
        return total


@pytest.mark.parametrize("layer", [AddsByKeyword, AddsInto])
@torch.no_grad()
def test_an_addition_may_name_its_operands_and_its_result(layer: type[Layer]) -> None:
    model, x = chain(layer), torch.randn(4, 5)
    blocks = resect.find_blocks(model, x)
    assert [block.owner for block in blocks] == ["1", "2"]
    assert all(block.scalable for block in blocks)
    closed_is_zeroed(model, x, blocks[1].name, "2.f")
    whole = model(x)
    with resect.gates(model, blocks) as gates:
        assert torch.equal(model(x), whole)
        gates[0].apply(torch.zeros_like)
        scaled = model(x)
        gates[0].close()
        assert torch.equal(model(x), scaled)


class Versioned(Layer):
    """Refuses weights that do not say in which form they were saved, as torchvision's MNASNet does."""

    _version = 2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)

    def _load_from_state_dict(self, state, prefix, metadata, *others):  # type: ignore[no-untyped-def]
        if metadata.get("version") != 2:
            raise ValueError("version should be 2")
        super()._load_from_state_dict(state, prefix, metadata, *others)


def test_a_cut_model_loads_where_the_class_wants_to_know_the_version(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, x = chain(Versioned), torch.randn(4, 5)
    small = resect.remove(model, resect.find_blocks(model, x), ["2"])
    resect.save(small, tmp_path / "cut")
    again = resect.load(tmp_path / "cut", chain(Versioned))
    assert torch.equal(again(x), small(x))


class HandsOn(nn.Module):
    """A branch whose module returns, beside its result, an argument that later layers use (T5's position bias)."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, *, bias: Tensor) -> tuple[Tensor, Tensor]:
            return self.f(torch.tanh(x) + bias), bias

    def __init__(self) -> None:
        super().__init__()
        self.inner = self.Inner()

    def forward(self, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, bias = pair
        out, bias = self.inner(x, bias=bias)
        return x + out, bias


class WithBias(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = nn.Linear(5, WIDTH), nn.Sequential(HandsOn(), HandsOn(), HandsOn())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers((self.stem(x), x.sum(-1, keepdim=True)))[0]


@torch.no_grad()
def test_what_a_closed_module_only_hands_on_goes_on() -> None:
    torch.manual_seed(0)
    model, x = WithBias().eval(), torch.randn(4, 5)
    blocks = resect.find_blocks(model, x)
    assert not blocks.refused
    assert [block.modules for block in blocks] == [(f"layers.{place}.inner",) for place in range(3)]
    assert resect.Blocks.from_json(blocks.to_json())[0] == blocks[0]
    closed_is_zeroed(model, x, "layers.0", "layers.0.inner.f")
    closed_is_zeroed(model, x, "layers.1", "layers.1.inner.f")
