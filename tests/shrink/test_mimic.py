"""Feature mimicking: against the closed form, on every kind of model, and without a trace on anything else."""

from __future__ import annotations

import copy

import pytest
import torch
from chains import Chain
from torch import Tensor, nn

import resect
from resect.errors import InputError
from resect.shrink.mimic import feature_distance
from resect.shrink.recoverability import recoverability

pytestmark = pytest.mark.core


class Linear(nn.Module):
    """``head(x + a(x) + …)``: without its second branch a linear layer must do the work of both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.a(x)
        x = x + torch.tanh(self.b(x))
        return self.head(x)


def chain() -> tuple[Chain, list[tuple[Tensor, Tensor]], resect.Blocks]:
    torch.manual_seed(0)
    net = Chain(4, 6)
    for _ in range(20):
        net(torch.randn(32, 3))
    data = [(torch.randn(24, 3), torch.zeros(24)) for _ in range(3)]
    return net.eval(), data, resect.find_blocks(net, data[0][0])


def state(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_one_linear_layer_reaches_the_closed_form():
    torch.manual_seed(0)
    net, x = Linear().eval(), torch.randn(128, 4)
    small = resect.remove(net, resect.find_blocks(net, x), ["b"])
    losses = resect.mimic(small, net, [x], steps=300, lr=0.05, batch_size=32)
    with torch.no_grad():
        wanted = x + net.a(x)
        wanted = wanted + torch.tanh(net.b(wanted))
        full = torch.cat([x, torch.ones(128, 1)], dim=1)
        solution = torch.linalg.lstsq(full.double(), (wanted - x).double()).solution
        least = (full.double() @ solution - (wanted - x)).square().mean()
        unrecovered = (net.a(x) - (wanted - x)).square().mean()
    assert losses[0] == pytest.approx(float(unrecovered), rel=0.5)  # on 32 of the samples
    assert feature_distance(small, net, [x]) == pytest.approx(float(least), rel=1e-3)
    found = torch.cat([small.a.weight.T, small.a.bias[None]])
    assert torch.allclose(found, solution.float(), atol=5e-3)  # weight decay pulls a little
    assert torch.equal(small.head.weight, net.head.weight)


def test_only_the_cut_model_changes_and_the_seed_decides_how():
    net, data, blocks = chain()
    small = resect.remove(net, blocks, ["layers.1", "layers.2"])
    net.layers[0].train()
    before, modes = state(net), [module.training for module in net.modules()]
    random = torch.get_rng_state()
    twins = [copy.deepcopy(small) for _ in range(3)]
    losses = [
        resect.mimic(twin, net, data, steps=30, lr=0.01, batch_size=16, seed=seed)
        for twin, seed in zip(twins, (1, 1, 2), strict=True)
    ]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert not any(module.training for module in twins[0].modules())
    assert all(parameter.grad is None for parameter in twins[0].parameters())
    assert losses[0] == losses[1] != losses[2]
    assert sum(losses[0][-5:]) < 0.5 * sum(losses[0][:5])
    one, other, third = map(state, twins)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["stem.0.weight"], third["stem.0.weight"])
    assert not torch.equal(one["stem.1.running_mean"], before["stem.1.running_mean"])
    assert feature_distance(twins[0], net, data) < 0.5 * feature_distance(small, net, data)


def test_features_where_they_are_asked_for_also_after_layers_moved():
    net, data, blocks = chain()
    small = resect.remove(net, blocks, ["layers.1"], compact=True)
    x = data[0][0]
    with torch.no_grad():
        h, g = net.stem(x), small.stem(x)
        for layer in net.layers[:3]:
            h = layer(h)
        for layer in small.layers[:2]:
            g = layer(g)
    assert feature_distance(small, net, [x], at="layers.2") == pytest.approx(float((h - g).square().mean()), rel=1e-5)
    with pytest.raises(InputError, match=r"no module 'layers.1' any more"):
        resect.mimic(small, net, data, at="layers.1")
    with pytest.raises(InputError, match=r"Unknown module 'layer.2'. Did you mean 'layers.2'"):
        resect.mimic(small, net, data, at="layer.2")


def test_what_cannot_be_done_is_refused_and_leaves_the_model_as_it_was():
    net, data, blocks = chain()
    small = resect.remove(net, blocks, ["layers.1"])
    before = state(small)
    for wrong, message in [
        ({"data": []}, "gave no samples"),
        ({"data": [torch.zeros(0, 3)]}, "gave no samples"),
        ({"data": [torch.zeros(0, 3)], "batch_size": None}, "gave no samples"),
        ({"data": iter(data), "batch_size": None, "steps": 9}, "ran dry"),
        ({"lr": 1e30}, "Lower lr"),
        ({"steps": 0, "lr": -1}, "2 problems"),
        ({"seed": 2**64}, r"seed must be a whole number from 0 to 2\*\*64 - 1, not 18446744073709551616"),
        ({"data": [torch.randn(4, 3), torch.randn(4, 2, 3)]}, "batch_size=None"),
    ]:
        with pytest.raises(InputError, match=message):
            resect.mimic(small, net, **{"data": data, "steps": 5} | wrong)
        assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    with pytest.raises(InputError, match="share weights"):
        resect.mimic(net, net, data)
    for parameter in small.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(InputError, match="No weight"):
        resect.mimic(small, net, data)


def test_batches_as_they_come():
    net, data, blocks = chain()
    small = resect.remove(net, blocks, ["layers.1"])
    seen: list[int] = []

    def forward(model: nn.Module, batch: object) -> Tensor:
        seen.append(len(batch[0]))
        return model(batch[0])

    lengths = [data[0], (data[1][0][:10], None)]
    losses = resect.mimic(small, net, lengths, steps=3, batch_size=None, forward=forward)
    assert len(losses) == 3
    assert seen == [24, 24, 24, 10, 10, 24, 24]  # the first once more, to find the head


def test_recoverability_is_a_short_fit_and_a_measurement():
    net, data, blocks = chain()
    before = state(net)
    small = resect.remove(net, blocks, ["layers.2"])
    found = recoverability(net, blocks, ["layers.2"], data, steps=20, batch_size=16)
    resect.mimic(small, net, data, steps=20, batch_size=16)
    pool = torch.cat([x for x, _ in data])
    assert found == pytest.approx(feature_distance(small, net, [pool]), rel=1e-4)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
