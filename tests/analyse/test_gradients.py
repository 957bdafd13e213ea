"""Gradients by path length and through blocks against brute force over all paths, in float64."""

from __future__ import annotations

import random

import pytest
import torch
from nets import Net, gradients_by_length
from path_nets import Deep
from torch import nn

import resect
from resect.analyse import by_length
from resect.analyse.single_paths import dealt
from resect.errors import InputError

pytestmark = pytest.mark.core

NETS = [(False,), (False,) * 5, (True, False, True), (False, True, False, False)]


def summed(output, target):
    return nn.functional.cross_entropy(output, target, reduction="sum")


def setup(parallel):
    torch.manual_seed(3)
    net = Net(parallel).double().eval()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    return net, resect.find_blocks(net, x), x, y


@pytest.fixture(scope="module")
def deep():
    """A net with blocks beside and inside each other, and the gradient along every path of it."""
    torch.manual_seed(3)
    net = Deep().double().eval()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    return net, net.blocks(x), x, y, [(path, net.gradient_of(path, x, y)) for path in net.paths()]


def mean_norm(gradients):
    return torch.stack(gradients).sum(0).norm(dim=1).mean().item()


@pytest.mark.parametrize("parallel", NETS)
def test_norm_of_sum_equals_brute_force_over_all_paths(parallel):
    net, blocks, x, y = setup(parallel)
    expected = gradients_by_length(net, x, y)
    found = resect.path_gradients(net, blocks, (x, y), summed, samples=0)
    for length, gradients in expected.items():
        assert found.norm_of_sum[length].item() == pytest.approx(mean_norm(gradients), rel=1e-9)
    assert found.paths == tuple(len(expected[k]) for k in sorted(expected))


def test_blocks_inside_the_branch_of_another(deep):
    net, blocks, x, y, paths = deep
    found = resect.path_gradients(net, blocks, (x, y), summed, samples=400)
    for length in range(6):
        gradients = [gradient for path, gradient in paths if len(path) == length]
        assert found.paths[length] == len(gradients)
        if gradients:
            assert found.norm_of_sum[length].item() == pytest.approx(mean_norm(gradients), rel=1e-9)
            one = torch.stack(gradients).norm(dim=2)
            assert found.mean_norm[length].item() == pytest.approx(one.mean().item(), rel=0.2)
            assert one.min() - 1e-12 <= found.mean_norm[length] <= one.max() + 1e-12


def test_a_shift_that_never_happens_is_noticed(monkeypatch, deep):
    """The mutant: what passes a branch stays at its length. All lengths still add up to the full gradient."""
    net, blocks, x, y, paths = deep

    def pass_on(cut, branch):
        cut.cuts.branches.append(branch)
        cut.cuts.leaves.append(branch.detach().requires_grad_())
        cut.cuts.names.append(cut.name)
        return branch.clone()

    monkeypatch.setattr(by_length._Cut, "__call__", pass_on)
    found = resect.path_gradients(net, blocks, (x, y), summed, samples=0, max_length=3)
    assert found.norm_of_sum.sum().item() == pytest.approx(mean_norm([gradient for _, gradient in paths]), rel=1e-9)
    for length in range(4):
        right = mean_norm([gradient for path, gradient in paths if len(path) == length])
        assert not (
            length < len(found.norm_of_sum) and found.norm_of_sum[length].item() == pytest.approx(right, rel=0.01)
        )


@pytest.mark.parametrize("parallel", NETS)
def test_sampled_norms_come_from_single_paths(parallel):
    """Every sampled norm is the norm of some single path's gradient, and their means agree."""
    net, blocks, x, y = setup(parallel)
    expected = gradients_by_length(net, x, y)
    found = resect.path_gradients(net, blocks, (x, y), summed, samples=600, seed=1)
    for length, gradients in expected.items():
        norms = torch.stack(gradients).norm(dim=2)
        assert found.mean_norm[length].item() == pytest.approx(norms.mean().item(), rel=0.15)
        assert norms.min() - 1e-12 <= found.mean_norm[length] <= norms.max() + 1e-12
        assert found.low[length] <= found.sum_of_norms[length] <= found.high[length]
    assert found.sum_of_norms[0].item() == pytest.approx(found.norm_of_sum[0].item(), rel=0.1)


def test_one_sampled_path_equals_its_own_gradient():
    """Where a length has a single path, sampling is exact: lengths 0 and n of a net without parallel branches."""
    net, blocks, x, y = setup((False,) * 4)
    expected = gradients_by_length(net, x, y)
    found = resect.path_gradients(net, blocks, (x, y), summed, samples=4, seed=0)
    for length in (0, 4):
        per_sample = expected[length][0].norm(dim=1)
        assert per_sample.min() <= found.mean_norm[length] <= per_sample.max()
    whole = resect.path_gradients(net, blocks, (x[:1], y[:1]), summed, samples=3)
    for length in (0, 4):
        assert whole.mean_norm[length].item() == pytest.approx(expected[length][0][0].norm().item(), rel=1e-12)
        assert whole.coherence[length].item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("samples", [4, 7, 16])
def test_every_length_meets_the_samples_equally_often(samples):
    lengths, size = [0, 1, 2, 5], 5
    queues = dealt(lengths, samples, size, random.Random(0))
    for length in lengths:
        met = [queue.count(length) for queue in queues]
        assert sum(met) == samples
        assert max(met) - min(met) <= 1
    assert max(map(len, queues)) - min(map(len, queues)) <= 1


def test_where_there_is_one_path_nothing_is_estimated():
    net, blocks, x, y = setup((False,) * 4)
    with torch.no_grad():  # samples of very different size: an uneven choice of them would be seen
        x = x * torch.logspace(-2, 2, len(x), dtype=x.dtype)[:, None]
    found = resect.path_gradients(net, blocks, (x, y), summed, samples=3)
    for length in (0, 4):
        assert found.coherence[length].item() == pytest.approx(1, rel=1e-12)
        assert found.low[length] == found.high[length] == found.sum_of_norms[length]


def test_every_draw_is_made_once_whatever_the_parts():
    net, blocks, x, y = setup((False,) * 3)
    told = []
    for chunk in (1, 3, 4, 64):
        told.clear()
        found = resect.path_gradients(
            net, blocks, (x, y), summed, samples=7, chunk=chunk, progress=lambda done, total: told.append((done, total))
        )
        assert (found.high > found.low)[1:-1].all()
        assert told == [(done, len(told)) for done in range(1, len(told) + 1)]


def test_a_mean_loss_is_detected_and_rescaled():
    net, blocks, x, y = setup((False,) * 3)
    a = resect.path_gradients(net, blocks, (x, y), summed, samples=20, chunk=3)
    b = resect.path_gradients(net, blocks, (x, y), nn.functional.cross_entropy, samples=20, chunk=3)
    assert b.rescaled
    assert not a.rescaled
    assert torch.allclose(a.norm_of_sum, b.norm_of_sum)
    assert torch.allclose(a.sum_of_norms, b.sum_of_norms)
    c, d = (resect.block_gradients(net, blocks, (x, y), f, chunk=3) for f in (summed, nn.functional.cross_entropy))
    assert torch.allclose(c.through, d.through)
    assert torch.allclose(c.share, d.share)


def test_chunks_of_samples_change_nothing():
    net, blocks, x, y = setup((False, True))
    for loss in (summed, nn.functional.cross_entropy):
        a = resect.path_gradients(net, blocks, (x, y), loss, samples=0, chunk=64)
        b = resect.path_gradients(net, blocks, (x, y), loss, samples=0, chunk=3)
        assert torch.allclose(a.norm_of_sum, b.norm_of_sum, rtol=1e-12)


def test_longer_paths_come_as_one(deep):
    net, blocks, x, y, paths = deep
    whole = resect.path_gradients(net, blocks, (x, y), summed, samples=0)
    for longest in (0, 2, 5, 9):
        found = resect.path_gradients(net, blocks, (x, y), summed, samples=5, max_length=longest, chunk=3)
        shown = min(longest, 5) + 1
        assert torch.allclose(found.norm_of_sum[:shown], whole.norm_of_sum[:shown], rtol=1e-9)
        rest = [gradient for path, gradient in paths if len(path) > longest]
        assert found.paths == whole.paths[:shown] + ((len(rest),) if rest else ())
        assert len(found.sum_of_norms) == shown
        assert len(found.rows()) == len(found.paths)
        if rest:
            assert found.norm_of_sum[-1].item() == pytest.approx(mean_norm(rest), rel=1e-9)
            assert found.rows()[-1]["longer"]
            with pytest.raises(InputError, match="without max_length"):
                found.effective()


def test_through_and_past_every_block_equal_brute_force(deep):
    net, blocks, x, y, paths = deep
    found = resect.block_gradients(net, blocks, (x, y), summed, chunk=3)
    full = torch.stack([gradient for _, gradient in paths]).sum(0)
    assert found.full == pytest.approx(full.norm(dim=1).mean().item(), rel=1e-9)
    taken = {"one": ("first", 1), "two": ("first", 2), "outer": ("outer", 1), "outer/inner": ("inner", 1),
             "outer/left": ("pair", 1), "outer/right": ("pair", 2), "last": ("last", 1)}  # fmt: skip
    assert set(found.names) == set(taken)
    for row in found.rows():
        name, way = taken[row["name"]]
        inside = name in ("inner", "pair")
        through = [g for path, g in paths if path[name] == way and (path["outer"] or not inside)]
        assert row["through"] == pytest.approx(mean_norm(through), rel=1e-9)
        via = torch.stack(through).sum(0)
        assert row["past"] == pytest.approx((full - via).norm(dim=1).mean().item(), rel=1e-9)
        assert row["share"] == pytest.approx(((via * full).sum() / full.square().sum()).item(), rel=1e-9)


def test_at_the_input_and_at_a_block():
    net, blocks, x, y = setup((False,) * 3)
    at_input = resect.path_gradients(net, blocks, (x, y), summed, at="input", samples=0)
    at_first = gradients_by_length(net, x, y)
    for length, gradients in at_first.items():
        pulled = (torch.stack(gradients).sum(0) @ net.stem.weight).norm(dim=1).mean()
        assert at_input.norm_of_sum[length].item() == pytest.approx(pulled.item(), rel=1e-9)
    # Only the last block lies above what enters it: two paths, one of them through it.
    at_last = resect.path_gradients(net, blocks, (x, y), summed, at="layers.2", samples=50)
    assert at_last.paths == (1, 1)
    assert (at_last.norm_of_sum > 0).all()
    assert at_last.coherence.tolist() == pytest.approx([1, 1], rel=0.3)
    with pytest.raises(InputError, match="at= also takes 'first' and 'input'"):
        resect.path_gradients(net, blocks, (x, y), summed, at="frist")
    assert resect.block_gradients(net, blocks, (x, y), summed, at="layers.1").names == (
        "layers.1/a",
        "layers.2/a",
    )


def test_at_a_block_inside_a_branch(deep):
    net, blocks, x, y, _ = deep
    found = resect.path_gradients(net, blocks, (x, y), summed, at="outer/left", samples=20)
    # The pair, then on through the outer branch, then the last block or past it.
    assert found.paths == (0, 1, 3, 2)
    assert found.norm_of_sum[0] == 0
    assert (found.norm_of_sum[1:] > 0).all()
    assert found.sum_of_norms[0] == 0


def test_the_model_is_left_alone(monkeypatch):
    net, blocks, x, y = setup((False,) * 2)
    net.train()
    net.head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}

    def unchanged():
        assert net.training
        assert not net.head.weight.requires_grad
        assert net.stem.weight.requires_grad
        assert not x.requires_grad
        assert all(parameter.grad is None for parameter in net.parameters())
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
        assert all("_resect_port" not in module.__dict__ for module in net.modules())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())

    resect.path_gradients(net, blocks, (x, y), summed, samples=5)
    resect.block_gradients(net, blocks, (x, y), summed)
    unchanged()

    def broken(*_):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(by_length, "_shift", broken)
    with pytest.raises(RuntimeError, match="in the middle"):
        resect.path_gradients(net, blocks, (x, y), summed, samples=5)
    unchanged()


def test_moments_of_a_training():
    net, blocks, x, y = setup((False,) * 2)
    first = {name: value.clone() for name, value in net.state_dict().items()}
    later = {name: 1.1 * value for name, value in first.items()}
    found = resect.path_gradients_by_state(net, blocks, (x, y), {"first": first, "later": later}, summed, samples=0)
    for when, state in (("first", first), ("later", later)):
        net.load_state_dict(state)
        alone = resect.path_gradients(net, blocks, (x, y), summed, samples=0)
        assert torch.equal(found[when].norm_of_sum, alone.norm_of_sum)
