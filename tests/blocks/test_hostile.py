"""Models written to break it: state, memory and values in places where nobody keeps them."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import resect

pytestmark = pytest.mark.core


class Keeps(nn.Module):
    """A branch that goes through memory of its own, and leaves its mean in a buffer of the model's."""

    def __init__(self, always):
        super().__init__()
        self.f, self.g, self.always = nn.Linear(4, 4), nn.Linear(4, 4), always
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        h = self.f(x)
        if self.always or self.training:
            self.mean.copy_(h.detach().mean(0))
        own = torch.zeros_like(x)
        own[:, 1:] = h[:, 1:]
        return x + self.g(own).relu()


@pytest.mark.parametrize("always", [True, False])
def test_a_buffer_that_a_closed_branch_would_write_stays_a_buffer(always, tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(Keeps(always), Keeps(always)).eval(), torch.randn(2, 4)
    whole = model(x)
    blocks = resect.find_blocks(model, x)
    assert len(blocks) == 2
    kept = copy.deepcopy(model.state_dict())
    for mode in (model.eval, model.train):
        with resect.closed(mode(), blocks):
            assert torch.equal(model(x), x)
        assert all(type(buffer) is torch.Tensor for buffer in model.buffers())
        assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())
    assert torch.equal(model.eval()(x), whole)
    small = resect.remove(model, blocks, blocks.names)
    resect.save(small, tmp_path / "cut")
    for cut in (small, resect.load(tmp_path / "cut", model)):
        assert torch.equal(cut.train()(x), x)
        assert all(type(buffer) is torch.Tensor for buffer in cut.buffers())


class Rotated(nn.Module):
    """Positions are computed once for all layers; here one layer alone attends."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(4, 4)

        def forward(self, x, angles):
            return self.f(x) * angles.cos()

    class Layer(nn.Module):
        def __init__(self, attends):
            super().__init__()
            self.attn = Rotated.Attention() if attends else None
            self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU())

        def forward(self, x, angles):
            if self.attn is not None:
                x = x + self.attn(x, angles)
            return x + self.mlp(x)

    class Angles(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("steps", torch.arange(1.0, 5.0))

        def forward(self, x):
            return x.detach().mean() * self.steps

    def __init__(self):
        super().__init__()
        self.angles, self.layers = self.Angles(), nn.ModuleList(self.Layer(place == 1) for place in range(3))

    def forward(self, x):
        angles = self.angles(x)
        for layer in self.layers:
            x = layer(x, angles)
        return x


def test_a_helper_far_above_does_not_take_a_block_out_of_its_layer():
    torch.manual_seed(0)
    model, x = Rotated().eval(), torch.randn(2, 4)
    blocks = resect.find_blocks(model, x)
    assert blocks.names == ["layers.0/mlp", "layers.1/attn", "layers.1/mlp", "layers.2/mlp"]
    assert list(blocks.layers()) == ["layers.0", "layers.1", "layers.2"]
    small = resect.remove(model, blocks, blocks.layers()["layers.1"], compact=True)
    assert len(small.layers) == 2
    with torch.no_grad(), resect.closed(model, blocks.layers()["layers.1"]):
        assert torch.equal(small(x), model(x))


class Accumulates(nn.Module):
    """A branch that is changed in place by additions of its own, whose results nobody keeps."""

    def __init__(self, how):
        super().__init__()
        self.f, self.bias, self.how = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), how

    def forward(self, x):
        return x + getattr(self, self.how)(x, self.f(x)).tanh()

    def method(self, x, h):
        h = h.clone()
        h.add_(self.bias)
        h.sub_(0.5 * self.bias).mul_(2.0)
        return h

    def other(self, x, h):
        h = h.clone()
        h.add_(h.relu() + self.bias)
        return h

    def item(self, x, h):
        h = h.clone()
        h[:, :2] = h[:, :2] + self.bias[:2]
        h[:, :2] += self.bias[2:]
        return h

    def scan(self, x, h):
        out = torch.empty_like(x)
        state = torch.zeros_like(x[:, 0])
        for place in range(x.shape[1]):
            state = 0.9 * state + h[:, place]
            out[:, place] = state
        return out


@pytest.mark.parametrize("how", ["method", "other", "item", "scan"])
def test_additions_in_place_inside_a_branch_are_counted(how):
    torch.manual_seed(0)
    model, x = nn.Sequential(Accumulates(how), Accumulates(how)).eval(), torch.randn(2, 4)
    blocks = resect.find_blocks(model, x)
    assert blocks.names == ["0/f", "1/f"]
    with torch.no_grad():
        with resect.closed(model, "0/f"):
            assert torch.equal(model(x), model[1](x))
        small = resect.remove(model, blocks, ["1/f"])
        assert torch.equal(small(x), model[0](x))


def test_a_cut_model_with_memory_of_its_own_serves_several_threads():
    torch.manual_seed(0)
    model, x = nn.Sequential(Keeps(False), Keeps(False)).eval(), torch.randn(2, 4)
    blocks = resect.find_blocks(model, x)
    small = resect.remove(model, blocks, blocks.names)
    inside = threading.Barrier(3)
    small[1].register_forward_pre_hook(lambda *_: (inside.wait(10), None)[1])
    with ThreadPoolExecutor(3) as pool:
        assert all(torch.equal(y, x) for y in pool.map(small, [x] * 3))
