"""Distillation: its loss and gradient by hand, a teacher that nothing touches, and other people's loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from chains import Chain
from torch import Tensor, nn

import resect
from resect.errors import AttachError, InputError

pytestmark = pytest.mark.core


def pair(compact: bool = False) -> tuple[nn.Module, Chain, Tensor]:
    torch.manual_seed(0)
    net, x = Chain(7, 6), torch.randn(10, 3)
    small = resect.remove(net, resect.find_blocks(net, x), ["layers.1"], compact=compact)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return small.train(), net.train(), x


def test_loss_and_gradient_are_the_formula():
    small, net, x = pair(compact=True)
    with resect.Distillation(small, net, logits=0.7, temperature=3, features=["layers.0", "layers.2"], weight=0.2) as d:
        output = small(x)
        loss = d.extra_loss()
        loss.backward()
        assert not net.training
    found = {name: parameter.grad.clone() for name, parameter in small.named_parameters() if parameter.grad is not None}
    metrics = d.metrics()
    assert net.training
    assert sum(metrics.values()) == pytest.approx(loss.item())

    small.zero_grad()
    net.eval()
    with torch.no_grad():
        first = net.layers[0](net.stem(x))
        third = net.layers[2](net.layers[1](first))
        p = torch.softmax(net(x) / 3, -1)
    own = small.layers[0](small.stem(x))
    second = last = small.layers[1](own)
    for layer in small.layers[2:]:
        last = layer(last)
    z = small.head(last)
    assert torch.equal(z, output)
    q = torch.softmax(z / 3, -1)
    expected = 0.7 * 9 * (p * (p.log() - q.log())).sum() / 10
    expected = expected + 0.2 * ((own - first).square().mean() + (second - third).square().mean())
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in small.named_parameters():
        assert torch.allclose(found[name], parameter.grad, atol=1e-6), name


def test_nothing_of_the_teacher_changes_and_no_trace_stays():
    small, net, x = pair()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in small.modules()]
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    distil = resect.Distillation(small, net, features="layers.3")
    blocks = resect.find_blocks(small, x)
    with resect.StochasticDepth(small, blocks, drop_prob=0.5, optimizer=optimizer) as method, distil:
        twin = copy.deepcopy(small)
        losses = []
        for _ in range(30):
            method.begin_step()
            distil.begin_step()
            small(x)
            twin(x + 1)  # a copy is not watched
            loss = distil.extra_loss() + method.extra_loss()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        small.eval()
        assert distil.extra_loss() == 0.0
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in small.modules()] == hooks
    assert list(distil.parameters()) == []


def test_a_teacher_of_another_dtype_and_a_student_under_autocast():
    small, net, x = pair()
    exact, half = copy.deepcopy(net), net.bfloat16()
    with resect.Distillation(small, exact) as one, resect.Distillation(small, half) as other:
        small(x)
        assert other.extra_loss().item() == pytest.approx(one.extra_loss().item(), rel=0.1)
        dtypes = []
        hook = exact.register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            small(x)
        one.extra_loss()
        hook.remove()
        assert dtypes == [torch.bfloat16]
        other.extra_loss()


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        h = self.embed(input_ids)
        return {"loss": h.sum(), "logits": self.head(h)}


def test_passes_without_a_gradient_in_between_change_nothing():
    small, net, x = pair()
    with resect.Distillation(small, net, features="layers.3") as distil:
        small(x)
        expected = distil.extra_loss()
        small(x)
        with torch.no_grad():
            small(x + 1)
            small.eval()(x + 2)
        small.train()
        loss = distil.extra_loss()
        assert loss.item() == expected.item()
        loss.backward()
        assert all(parameter.grad is not None for parameter in small.layers[0].parameters())
        with pytest.raises(RuntimeError):
            small(x[:, :1])  # ends before its output
        with pytest.raises(AttachError, match="comes after a forward pass"):
            distil.extra_loss()


def test_padding_does_not_count():
    torch.manual_seed(0)
    student, teacher, ids = Tokens().train(), Tokens(), torch.randint(9, (3, 5))
    mask = torch.ones(3, 5, dtype=torch.long)
    mask[:, 3:] = 0
    with resect.Distillation(student, teacher, features=["embed"]) as distil:
        student(ids, attention_mask=mask)
        masked = distil.extra_loss().item()
        student(ids[:, :3])
        assert masked == pytest.approx(distil.extra_loss().item())
        student(ids)
        assert masked != pytest.approx(distil.extra_loss().item())


def test_misuse_is_told():
    small, net, x = pair()
    with pytest.raises(InputError, match="3 problems"):
        resect.Distillation(small, net, logits=-1, temperature=0, weight=math.nan)
    with pytest.raises(InputError, match="nothing is compared"):
        resect.Distillation(small, net, logits=0)
    with pytest.raises(InputError, match=r"Did you mean 'layers.1'"):
        resect.Distillation(small, net, features=["layer.1"])
    for gone in ("layers.1.up", "layers.1.down"):
        with pytest.raises(InputError, match=f"has no module '{gone}' any more"):
            resect.Distillation(small, net, features=["layers.2.up", gone])
    with pytest.raises(InputError, match="share weights"):
        resect.Distillation(net, net)
    distil = resect.Distillation(small, net)
    with pytest.raises(AttachError, match="comes after a forward pass"):
        distil.extra_loss()
    with distil:
        small(x)
        with pytest.raises(AttachError, match="was not called"):
            distil.begin_step()
        distil.extra_loss()
        with pytest.raises(AttachError, match="once for each"):
            distil.extra_loss()
        with pytest.raises(AttachError, match="attached already"):
            distil.attach()
        net.head = nn.Linear(6, 5)
        small(x)
        with pytest.raises(InputError, match="same classes"):
            distil.extra_loss()
    with pytest.raises(InputError, match=r"temperature was 4.0, and is 2"):
        resect.Distillation(small, net, temperature=2).load_state_dict(distil.state_dict())


def test_the_mean_over_halves_is_the_whole_as_under_ddp():
    small, net, x = pair()
    grads = []
    for rows in (x, x[:5], x[5:]):
        small.zero_grad()
        with resect.Distillation(small, net, features=["layers.3"]) as distil:
            for module in small.modules():  # samples that batch norm does not couple
                module.training = module is small
            small(rows)
            distil.extra_loss().backward()
        grads.append(small.head.weight.grad.clone())
    assert torch.allclose((grads[1] + grads[2]) / 2, grads[0], atol=1e-6)
