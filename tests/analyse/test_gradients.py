"""Gradients by path length against brute force over all paths, in float64."""

from __future__ import annotations

import pytest
import torch
from nets import Net, gradients_by_length
from torch import nn

import resect
from resect.analyse import by_length
from resect.errors import InputError

NETS = [(False,), (False,) * 5, (True, False, True), (False, True, False, False)]


def summed(output, target):
    return nn.functional.cross_entropy(output, target, reduction="sum")


def setup(parallel):
    torch.manual_seed(3)
    net = Net(parallel).double().eval()
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    return net, resect.find_blocks(net, x), x, y


@pytest.mark.core
@pytest.mark.parametrize("parallel", NETS)
def test_norm_of_sum_equals_brute_force_over_all_paths(parallel):
    net, blocks, x, y = setup(parallel)
    expected = gradients_by_length(net, x, y)
    found = resect.path_gradients(net, blocks, (x, y), summed, samples=0)
    for length, gradients in expected.items():
        brute = torch.stack(gradients).sum(0).norm(dim=1).mean()
        assert found.norm_of_sum[length].item() == pytest.approx(brute.item(), rel=1e-9)
    assert found.paths == tuple(len(expected[k]) for k in sorted(expected))


@pytest.mark.core
def test_a_shift_that_never_happens_is_noticed(monkeypatch):
    """The mutant: without the shift the slots still add up to the full gradient."""
    net, blocks, x, y = setup((False, True, False))
    monkeypatch.setattr(by_length._Shift, "vmap", staticmethod(lambda info, in_dims, g: (g.clone(), in_dims[0])))
    found = resect.path_gradients(net, blocks, (x, y), summed, samples=0)
    expected = torch.stack(gradients_by_length(net, x, y)[1]).sum(0).norm(dim=1).mean()
    assert found.norm_of_sum[1].item() != pytest.approx(expected.item(), rel=1e-2)


@pytest.mark.core
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


@pytest.mark.core
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


@pytest.mark.core
def test_a_mean_loss_is_detected_and_rescaled():
    net, blocks, x, y = setup((False,) * 3)
    a = resect.path_gradients(net, blocks, (x, y), summed, samples=20)
    b = resect.path_gradients(net, blocks, (x, y), nn.functional.cross_entropy, samples=20)
    assert b.rescaled
    assert not a.rescaled
    assert torch.allclose(a.norm_of_sum, b.norm_of_sum)
    assert torch.allclose(a.sum_of_norms, b.sum_of_norms)


@pytest.mark.core
def test_chunks_of_samples_change_nothing():
    net, blocks, x, y = setup((False, True))
    for loss in (summed, nn.functional.cross_entropy):
        a = resect.path_gradients(net, blocks, (x, y), loss, samples=0, chunk=64)
        b = resect.path_gradients(net, blocks, (x, y), loss, samples=0, chunk=3)
        assert torch.allclose(a.norm_of_sum, b.norm_of_sum, rtol=1e-12)


@pytest.mark.core
def test_at_the_input_and_at_a_block():
    net, blocks, x, y = setup((False,) * 3)
    at_input = resect.path_gradients(net, blocks, (x, y), summed, at="input", samples=0)
    assert at_input.norm_of_sum.shape == (4,)
    at_last = resect.path_gradients(net, blocks, (x, y), summed, at="layers.2", samples=0)
    # Only the last block lies above what enters it: no path longer than 1.
    assert (at_last.norm_of_sum[2:] == 0).all()
    assert (at_last.norm_of_sum[:2] > 0).all()


@pytest.mark.core
def test_the_model_is_left_alone():
    net, blocks, x, y = setup((False,) * 2)
    net.train()
    net.head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    resect.path_gradients(net, blocks, (x, y), summed, samples=5)
    assert net.training
    assert not net.head.weight.requires_grad
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(
        type(module).__mro__[1] is not None and "_resect_port" not in module.__dict__ for module in net.modules()
    )


@pytest.mark.core
def test_a_loss_that_is_not_a_scalar_is_refused():
    net, blocks, x, y = setup((False,))
    with pytest.raises(InputError, match="must return a scalar"):
        resect.path_gradients(net, blocks, (x, y), lambda output, target: output.sum(dim=1))


@pytest.mark.core
def test_a_place_that_cannot_be_seen_is_refused_and_the_input_works():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.f, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.f(torch.relu(x)))

    torch.manual_seed(0)
    net, x, y = Functional(), torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    blocks = resect.find_blocks(net, x)
    with pytest.raises(InputError, match="cannot be seen"):
        resect.path_gradients(net, blocks, (x, y), summed, samples=0)
    assert (resect.path_gradients(net, blocks, (x, y), summed, samples=5, at="input").norm_of_sum > 0).all()


@pytest.mark.core
def test_sums_written_in_place_into_the_branch():
    """``y = f(x); y += x`` adds into the branch's own tensor, of which the counted one must be a copy."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.f, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)

        def forward(self, x):
            x = self.stem(x)
            y = self.f(x)
            y += x
            return self.head(y)

    torch.manual_seed(0)
    net, x, y = InPlace().double(), torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    found = resect.path_gradients(net, resect.find_blocks(net, x), (x, y), summed, samples=0)
    logits = net(x)
    upper = (torch.softmax(logits, 1) - nn.functional.one_hot(y, 4)) @ net.head.weight
    expected = [upper.norm(dim=1).mean().item(), (upper @ net.f.weight).norm(dim=1).mean().item()]
    assert found.norm_of_sum.tolist() == pytest.approx(expected, rel=1e-9)
