"""Deleting the layers that a removal emptied: what goes, what is repaired, what stays and why."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from nets import Block, Net
from torch import nn

import resect
from resect.errors import InputError
from resect.shrink.history import original

pytestmark = pytest.mark.core


class Numbered(nn.Module):
    """A layer that knows its own index."""

    def __init__(self, index, after=None):
        super().__init__()
        self.layer_idx = index
        self.norm, self.f = nn.LayerNorm(6), nn.Linear(6, 6)
        self.after = after or nn.Identity()

    def forward(self, x):
        return self.after(x + self.f(self.norm(x)))


class Model(nn.Module):
    """Reads a scale per layer (exact powers of two) by the layer's own index, and counts its layers."""

    def __init__(self, after=None, n=4):
        super().__init__()
        self.layers = nn.ModuleList(Numbered(index, after) for index in range(n))
        self.num_layers, self.scales, self.width_list = n, [1.0, 2.0, 4.0, 8.0][:n], [6, 6]

    def forward(self, x):
        for place in range(self.num_layers):
            layer = self.layers[place]
            x = layer(x * self.scales[layer.layer_idx]) / self.scales[layer.layer_idx]
        return x


def cut(model, x, *layers, **options):
    blocks = resect.find_blocks(model, x)
    return resect.remove(model, blocks, [b for b in blocks if b.owner in layers], compact=True, **options)


def test_a_layer_is_deleted_and_what_counts_or_numbers_the_others_is_repaired():
    model, x = Model(), torch.randn(3, 6)
    blocks = resect.find_blocks(model, x)
    with resect.closed(model, blocks[1]):
        expected = model(x)
    keys = list(model.state_dict())
    small = resect.remove(model, blocks, [blocks[1].name], compact=True)
    assert [layer.layer_idx for layer in small.layers] == [0, 1, 2]
    assert (small.num_layers, small.scales, small.width_list) == (3, [1.0, 4.0, 8.0], [6, 6])
    assert torch.equal(small(x), expected)
    assert [layer.layer_idx for layer in model.layers] == [0, 1, 2, 3]
    assert model.num_layers == 4
    assert list(model.state_dict()) == keys


def test_the_key_map_says_where_every_weight_was():
    model, x = Model(), torch.randn(3, 6)
    small = cut(model, x, "layers.0", "layers.2")
    evidence = small.resect_plan.evidence["compact"]
    assert evidence["layers"] == ["layers.0", "layers.2"]
    assert set(evidence["keys"]) == set(small.state_dict())
    assert evidence["keys"]["layers.1.f.weight"] == "layers.3.f.weight"
    for new, old in evidence["keys"].items():
        assert torch.equal(small.state_dict()[new], model.state_dict()[old])


def test_saved_and_loaded_into_the_uncut_model(tmp_path):
    x = torch.randn(3, 6)
    small = cut(Model(), x, "layers.1")
    resect.save(small, tmp_path / "cut")
    again = resect.load(tmp_path / "cut", Model())
    assert len(again.layers) == 3
    assert torch.equal(again(x), small(x))


def test_cut_again_and_again_in_the_names_of_the_uncut_model(tmp_path):
    x = torch.randn(3, 6)
    once = cut(Model(), x, "layers.0")
    twice = cut(once, x, "layers.1")
    blocks = resect.find_blocks(twice, x)
    thrice = resect.remove(twice, blocks, blocks[1].name)
    assert [block.owner for block in thrice.resect_plan.blocks] == ["layers.0", "layers.2", "layers.3"]
    assert twice.resect_plan.evidence["compact"]["keys"]["layers.1.f.bias"] == "layers.3.f.bias"
    resect.save(thrice, tmp_path / "cut")
    assert torch.equal(resect.load(tmp_path / "cut", Model())(x), thrice(x))


def test_a_sequential_is_renumbered_and_named_children_keep_their_names():
    x = torch.randn(2, 6)
    layers = [Block(6), Block(6), Block(6)]
    plain = cut(nn.Sequential(*layers), x, "1")
    assert list(plain._modules) == ["0", "1"]
    named = cut(nn.Sequential(OrderedDict((f"layer_{i}", layer) for i, layer in enumerate(layers))), x, "layer_1")
    assert list(named._modules) == ["layer_0", "layer_2"]
    assert torch.equal(plain(x), named(x))
    assert torch.equal(plain(x), layers[2](layers[0](x)))


def test_parallel_branches_go_together_or_the_layer_stays():
    net, x = Net((False, True, False)).eval(), torch.randn(2, 5)
    blocks = resect.find_blocks(net, x)
    assert len(resect.remove(net, blocks, ["layers.1/a", "layers.1/b"], compact=True).layers) == 2
    small = resect.remove(net, blocks, ["layers.0", "layers.1/a"], compact=True)
    kept = small.resect_plan.evidence["compact"]["kept"]
    assert len(small.layers) == 2
    assert list(kept) == ["layers.1"]
    assert kept["layers.1"].endswith("it still has weights: b.norm.weight, b.norm.bias, b.up.weight …")


@pytest.mark.parametrize(
    ("after", "reason"), [(nn.Tanh(), "in eval mode"), (nn.Dropout(0.5), "in train mode"), (nn.LayerNorm(6), "weights")]
)
def test_a_layer_that_changes_what_goes_through_it_stays(after, reason):
    model, x = Model(after), torch.randn(3, 6)
    with pytest.raises(InputError, match=rf"layers\.1: .*{reason}"):
        cut(model, x, "layers.1", in_place=True)
    assert len(model.layers) == 4
    assert len(list(model.layers[1].f.parameters())) == 2, "an in-place model is whole again"


def test_the_only_layer_of_its_kind_stays_with_that_reason():
    net, x = nn.Sequential(nn.Linear(6, 6), Numbered(0), nn.Linear(6, 3)).eval(), torch.randn(2, 6)
    blocks = resect.find_blocks(net, x)
    with pytest.raises(InputError, match="1: it is the only one of its class there"):
        resect.remove(net, blocks, blocks.names, compact=True)


def test_relu_after_relu_may_go():
    x = torch.randn(3, 6)
    assert len(cut(Model(nn.ReLU()), x, "layers.1").layers) == 3


class ByNumber(nn.Module):
    """Addresses its layers one by one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block(6) for _ in range(3))

    def forward(self, x):
        return self.layers[2](self.layers[1](self.layers[0](x)))


class Divided(ByNumber):
    """Goes by the number of its layers."""

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x / len(self.layers)


@pytest.mark.parametrize(
    ("kind", "reason"), [(ByNumber, "does not run without it: IndexError"), (Divided, "differs by")]
)
def test_what_does_not_give_the_same_is_put_back_with_the_reason(kind, reason):
    model, x = kind(), torch.randn(3, 6)
    blocks, keys = resect.find_blocks(model, x), list(model.state_dict())
    with pytest.raises(InputError, match=reason):
        resect.remove(model, blocks, "layers.1", compact=True, in_place=True)
    assert list(model.state_dict()) == keys
    assert [block.name for block in resect.find_blocks(model, x)] == blocks.names


def test_names_are_translated_by_whole_parts():
    moved = {"layers.1": "layers.2"}
    assert original("layers.1.f.weight", moved) == "layers.2.f.weight"
    assert original("layers.1/f", moved) == "layers.2/f"
    assert original("layers.1", moved) == "layers.2"
    assert original("layers.10.f", moved) == "layers.10.f"


def test_a_wrapper_that_its_config_alone_does_not_build_is_no_hindrance():
    class Adapted(nn.Module):
        """As adapters around a model are: they save themselves and show the config of the model inside."""

        def __init__(self, inner, adapters):
            super().__init__()
            self.inner, self.adapters, self.config = inner, adapters, {"layers": 4}

        def save_pretrained(self):
            raise NotImplementedError

        def forward(self, x):
            return self.inner(x)

    torch.manual_seed(0)
    model, x = Adapted(Model(), ()), torch.randn(3, 6)
    small = cut(model, x, "inner.layers.1")
    assert len(small.inner.layers) == 3
    blocks = resect.find_blocks(model, x)
    with resect.closed(model, [block for block in blocks if block.owner == "inner.layers.1"]):
        assert torch.equal(small(x), model(x))


def test_layers_that_share_a_module_stay_with_that_reason():
    class Shared(nn.Module):
        def __init__(self, mlp):
            super().__init__()
            self.norm, self.mlp = nn.LayerNorm(6), mlp

        def forward(self, x):
            return x + self.mlp(self.norm(x))

    mlp, x = nn.Linear(6, 6), torch.randn(3, 6)
    model = nn.Sequential(*(Shared(mlp) for _ in range(3))).eval()
    blocks = resect.find_blocks(model, x)
    with pytest.raises(InputError, match="shares modules with other layers"):
        resect.remove(model, blocks, blocks.names[1], compact=True)
