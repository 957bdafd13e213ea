"""What others do to a model beside the training step: hooks, extra passes, transforms, buffers, values left behind."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import resect

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore:.*below 6, dropping")]
RECENT = "isolate_recompiles" in inspect.signature(torch.compile).parameters


class Layer(nn.Module):
    def __init__(self, counts: bool = False, leaves: bool = False) -> None:
        super().__init__()
        self.f, self.leaves, self.counts = Gated() if leaves else nn.Linear(5, 5), leaves, counts
        self.register_buffer("n", torch.zeros(()))

    def forward(self, x):
        if self.counts and self.training:
            self.n = self.n + 1
        return x + self.f(x)


class Gated(nn.Linear):
    """Leaves a value for a loss of the user's own."""

    def __init__(self) -> None:
        super().__init__(5, 5)

    def forward(self, x):
        out = super().forward(x)
        self.share = out.mean()
        return out


def made(**options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 5), *(Layer(**options) for _ in range(4)))
    return net, resect.find_blocks(net, torch.randn(4, 5)), torch.randn(8, 5)


def dropping(net, blocks, **options):
    return resect.StochasticDepth(net, blocks, per="sample", drop_prob=0.5, rule="uniform", **options)


@pytest.mark.parametrize("compute", ["auto", "mask"])
def test_attaching_puts_back_buffers_that_the_model_replaces(compute):
    net, blocks, _ = made(counts=True)
    with dropping(net, blocks, compute=compute):
        assert all(layer.n == 0 for layer in net[1:])
    with resect.ResidualDroppath(net, blocks, per="sample"):
        assert all(layer.n == 0 for layer in net[1:])


def test_a_branch_that_leaves_a_value_behind_is_masked():
    net, blocks, _ = made(leaves=True)
    with dropping(net, blocks) as method:
        assert all("share" in how for how in method.computes.values()), method.computes


def test_a_branch_with_a_hook_is_masked_and_its_hook_sees_the_batch():
    net, blocks, x = made()
    seen = []
    net[2].f.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with dropping(net.train(), blocks) as method:
        assert [how.startswith("mask") for how in method.computes.values()] == [False, True, False, False]
        seen.clear()
        method.begin_step()
        net(x)
    assert seen == [8]


@pytest.mark.parametrize("compute", ["subset", "mask"])
def test_passes_without_gradients_do_not_count(compute):
    """A step's frozen blocks are those that all *learning* samples dropped."""
    results = []
    for extra in (False, True):
        net, blocks, x = made()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        method = resect.ResidualDroppath(net, blocks, per="sample", compute=compute, drop_prob=0.7, rule="uniform")
        with method:
            for _ in range(6):
                method.begin_step()
                if extra:
                    with torch.no_grad():
                        net(torch.cat([x, x, x]))
                net(x[:1]).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append([p.detach() for p in net.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("compute", ["subset", "mask"])
def test_transforms_and_inference_before_a_training_pass(compute):
    net, blocks, x = made()
    with dropping(net.train(), blocks, compute=compute) as method:
        method.begin_step()
        with torch.inference_mode():
            net(x)
        expected = torch.autograd.grad(net(x).square().sum(), list(net.parameters()))
        parameters = dict(net.named_parameters())

        def loss(parameters):
            return torch.func.functional_call(net, parameters, (x,)).square().sum()

        found = torch.func.grad(loss)(parameters)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, found.values(), strict=True))


@pytest.mark.skipif(not RECENT, reason="torch.compile cannot isolate recompilations here")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_warm_up_does_not_run_hooks_in_which_an_optimizer_steps():
    net, blocks, x = made()
    net.train()

    def update(parameter):
        parameter.data.add_(parameter.grad, alpha=-0.1)
        parameter.grad = None

    for parameter in net.parameters():
        parameter.register_post_accumulate_grad_hook(update)
    before = copy.deepcopy(net.state_dict())
    resect.compile(net, blocks, backend="eager")
    with resect.StochasticDepth(net, blocks) as method:
        method.warmup(x)
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
        method.begin_step()
        net(x).sum().backward()
        assert not torch.equal(net[0].weight, before["0.weight"])
