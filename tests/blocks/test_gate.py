"""Gates: stacking, undo after exceptions, names, recomputation; and what is refused."""

from __future__ import annotations

import pytest
import torch
from nets import Net
from torch import nn
from torch.utils.checkpoint import checkpoint

import resect
from resect.blocks.gate import Gates
from resect.blocks.intercept import Intercepted
from resect.errors import AttachError, BlocksError, InputError

pytestmark = pytest.mark.core


@pytest.fixture
def found():
    torch.manual_seed(0)
    net, x = Net((False, True, False)).eval(), torch.randn(2, 5)
    return net, x, resect.find_blocks(net, x)


def test_names_places_and_owners_mean_the_same_block(found):
    _, _, blocks = found
    assert blocks["layers.0/a"] is blocks["layers.0"] is blocks[0]
    assert blocks[1:3].names == ["layers.1/a", "layers.1/b"]
    assert blocks.select(["layers.2", 0]).names == ["layers.0/a", "layers.2/a"]
    assert list(blocks.layers()) == ["layers.0", "layers.1", "layers.2"]
    assert blocks.matching("layers.1").names == ["layers.1/a", "layers.1/b"]
    with pytest.raises(InputError, match="holds 2 residual blocks"):
        blocks["layers.1"]
    with pytest.raises(InputError, match=r"Did you mean 'layers.2/a'"):
        blocks["layers.2/aa"]


def test_blocks_survive_json(found):
    import json

    _, _, blocks = found
    again = resect.Blocks.from_json(json.loads(json.dumps(blocks.to_json())))
    assert list(again) == list(blocks)
    with pytest.raises(InputError, match="not a residual block"):
        resect.ResidualBlock.from_json({"name": "x"})


def test_a_name_alone_is_enough_once_the_blocks_were_found(found):
    net, x, blocks = found
    with resect.closed(net, "layers.0"):
        by_name = net(x)
    with resect.closed(net, blocks[:1]):
        assert torch.equal(net(x), by_name)
    with pytest.raises(BlocksError, match="find_blocks"), resect.closed(Net(), "layers.0"):
        pass


def test_blocks_of_another_model_are_refused_before_anything_is_attached(found):
    _, _, blocks = found
    other = nn.Sequential(nn.Linear(5, 5))
    with pytest.raises(BlocksError, match="4 problems"), resect.closed(other, blocks):
        pass
    assert not any(isinstance(module, Intercepted) for module in other.modules())


def test_a_closed_gate_wins_and_leaving_undoes_exactly_ones_own(found):
    net, x, blocks = found
    with resect.gates(net, blocks) as outer:
        outer[0].scale(0.5)
        scaled = net(x)
        with resect.closed(net, blocks[:1]):
            assert not torch.equal(net(x), scaled)
        assert torch.equal(net(x), scaled)
    assert not any(isinstance(module, Intercepted) for module in net.modules())


def test_everything_is_undone_after_an_exception(found):
    net, x, blocks = found
    expected = net(x)
    with pytest.raises(ZeroDivisionError), resect.closed(net, blocks):
        raise ZeroDivisionError
    assert torch.equal(net(x), expected)
    assert not any(isinstance(module, Intercepted) for module in net.modules())


def test_one_block_belongs_to_one_method(found):
    net, _, blocks = found
    first = Gates(net, blocks[:2], holder="A", exclusive=True)
    with pytest.raises(AttachError, match="already has a A"):
        Gates(net, blocks, holder="B", exclusive=True)
    first.detach()
    first.detach()
    assert not any(isinstance(module, Intercepted) for module in net.modules())


def test_undo_keeps_a_class_swap_made_on_top_of_ours(found):
    """Sharding swaps classes too: detaching must take out our part and leave theirs."""
    net, x, blocks = found
    expected = net(x)
    handle = Gates(net, blocks[:1])
    module = net.layers[0].a

    class Marker:
        pass

    module.__class__ = type(f"FSDP{type(module).__name__}", (Marker, type(module)), {})
    handle.detach()
    assert isinstance(module, Marker)
    assert not isinstance(module, Intercepted)
    assert torch.equal(net(x), expected)


def test_users_hooks_stay_silent_on_a_closed_branch_and_run_on_an_open_one(found):
    net, x, _ = found
    calls = []
    net.layers[0].a.register_forward_hook(lambda *_: calls.append("branch"))
    net.layers[0].register_forward_hook(lambda *_: calls.append("block"))
    with resect.closed(net, "layers.0"):
        net(x)
    assert calls == ["block"]
    net(x)
    assert calls == ["block", "branch", "block"]


def test_scaling_by_a_tensor_gives_it_a_gradient(found):
    net, x, blocks = found
    factor = torch.ones((), requires_grad=True)
    with resect.gates(net, blocks) as g:
        g[0].scale(factor)
        net(x).sum().backward()
        step = 1e-3
        g[0].scale(1 + step)
        high = net(x).sum().item()
        g[0].scale(1 - step)
        low = net(x).sum().item()
    assert factor.grad.item() == pytest.approx((high - low) / (2 * step), rel=1e-2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_gate_that_changes_before_recomputation_raises(found, reentrant):
    net, x, blocks = found
    x = x.requires_grad_()
    with resect.gates(net, blocks) as g:
        output = checkpoint(net, x, use_reentrant=reentrant)
        g[0].close()
        with pytest.raises(Exception, match=r"changed between a forward pass|different number of tensors|saved"):
            output.sum().backward()
    with resect.gates(net, blocks) as g:
        g[0].close()
        checkpoint(net, x, use_reentrant=reentrant).sum().backward()


def test_compiled_whole_without_a_graph_break(found):
    net, x, blocks = found
    for state in ("open", "close"):
        with resect.gates(net, blocks) as g:
            getattr(g[0], state)()
            g[1].scale(0.5)
            expected = net(x)
            torch._dynamo.reset()
            assert torch.allclose(torch.compile(net, backend="eager", fullgraph=True)(x), expected)


class WrittenLater(nn.Module):
    """In train mode alone the sum is written, while the shortcut is needed once more."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.f = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x):
        x = self.stem(x)
        y = x + self.f(x)
        return nn.functional.dropout(y, 0.5, self.training, inplace=True) + x


def test_a_closed_block_that_trains_copies_nothing_unless_its_sum_is_written(monkeypatch):
    copies, clone = [], torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda self, **kw: copies.append(1) or clone(self, **kw))
    net, x = Net((False, True, False)), torch.randn(2, 5, requires_grad=True)
    blocks = resect.find_blocks(net.eval(), x.detach())
    net.train()
    copies.clear()
    with resect.closed(net, blocks):
        net(x * 1).sum().backward()
    assert not copies

    net, x = WrittenLater(), torch.randn(2, 5)
    blocks = resect.find_blocks(net.eval(), x)
    torch.manual_seed(0)
    with resect.closed(net.train(), blocks):
        output = net(x)
    torch.manual_seed(0)
    h = net.stem(x)
    expected = nn.functional.dropout(h, 0.5) + h
    assert torch.equal(output, expected)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            torch.autograd.grad(output.sum(), net.stem.parameters()),
            torch.autograd.grad(expected.sum(), net.stem.parameters()),
            strict=True,
        )
    )


def test_a_closed_block_copies_memory_that_others_may_hold():
    net = nn.Sequential(Identity(), Identity())
    blocks = resect.find_blocks(net.eval(), torch.randn(4, 8))
    shared, array = torch.randn(4, 8).share_memory_(), torch.randn(4, 8)
    with resect.closed(net.train(), blocks):
        assert torch.equal(net(shared), shared)
        view = array.numpy()
        output = net(array)
        before = output.detach().clone()
        view[:] = 7
    assert torch.equal(output, before)
    assert (array == 7).all()


class Identity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.f(x)
