"""A folded copy computes the same but for rounding, with any blocks closed; what cannot be folded stays."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from torch import Tensor, nn

import resect
from resect.errors import InputError
from resect.lab.models import cifar_resnet

pytestmark = pytest.mark.core


def net_of(preactivation=False):
    torch.manual_seed(0)
    return families.visible(cifar_resnet(8, preactivation=preactivation, widths=(4, 8, 16), shortcut="B")).eval()


def norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("preactivation", [False, True])
def test_lesions_of_the_copy_are_those_of_the_model(preactivation):
    net, x = net_of(preactivation), torch.randn(6, 3, 16, 16)
    blocks = resect.find_blocks(net, x)
    before, hooks = copy.deepcopy(net.state_dict()), len(net._forward_pre_hooks)
    fast = resect.folded(net.train(), x)
    assert net.training
    assert not any(module.training for module in fast.modules())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert len(net._forward_pre_hooks) == hooks
    net.eval()
    # In a pre-activation net those in front of a block, and the last, read a sum.
    assert norms(fast) == (["layer2.0.bn1", "layer3.0.bn1", "bn_last"] if preactivation else [])
    data = [(x, torch.randint(0, 10, (6,)))]
    one, other = (resect.lesion_study(model, blocks, data, metric="cross_entropy") for model in (net, fast))
    assert [lesion.closed for lesion in one.each] == [lesion.closed for lesion in other.each]
    torch.testing.assert_close(
        [one.baseline, *(lesion.value for lesion in one.each)],
        [other.baseline, *(lesion.value for lesion in other.each)], rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def test_another_dtype_takes_and_gives_floats():
    net, x = net_of(), torch.randn(6, 3, 16, 16)
    blocks = resect.find_blocks(net, x)
    fast = resect.folded(net, x, dtype=torch.bfloat16)
    assert all(p.dtype is torch.bfloat16 for p in fast.parameters())
    assert fast(x).dtype is torch.float32
    torch.testing.assert_close(fast(x), net(x), rtol=0.1, atol=0.1)
    study = resect.lesion_study(fast, blocks, [(x, torch.randint(0, 10, (6,)))], metric="cross_entropy")
    assert len(study.each) == 3
    with pytest.raises(InputError, match=r"floating-point type such as torch.bfloat16, not torch.int8"):
        resect.folded(net, x, dtype=torch.int8)


class Hard(nn.Module):
    """Pairs that must not be folded, each for its own reason, and two that may be."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("used", "twice", "returned", "shared", "hooked", "fine", "batch"):
            self.add_module(name, nn.Conv2d(3, 3, 1))
            self.add_module(f"{name}_norm", nn.BatchNorm2d(3))
        self.twin = nn.Conv2d(3, 3, 1)
        self.twin.weight = self.shared.weight
        self.tokens, self.tokens_norm = nn.Linear(3, 16), nn.BatchNorm1d(5)
        self.flat, self.flat_norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.hooked.register_forward_hook(lambda module, args, output: output * 2)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        used = self.used(x)
        x = self.used_norm(used) + used
        x = self.twice_norm(self.twice(self.twice_norm(self.twice(x))))
        returned = self.returned(x)
        x = self.returned_norm(returned)
        x = self.shared_norm(self.shared(x)) + self.twin(x)
        x = self.batch_norm(self.batch(self.fine_norm(self.fine(self.hooked_norm(self.hooked(x))))))
        tokens = self.tokens_norm(self.tokens(x.mean(3)[:, :, :1].expand(-1, -1, 5).transpose(1, 2)))
        return returned, tokens, self.flat_norm(self.flat(x.mean((2, 3))))


def test_what_cannot_be_folded_stays():
    torch.manual_seed(0)
    net, x = families.visible(Hard()), torch.randn(2, 3, 4, 4)
    net.batch_norm = nn.BatchNorm2d(3, track_running_stats=False)
    net.eval()
    fast = resect.folded(net, x)
    assert set(norms(net)) - set(norms(fast)) == {"fine_norm", "flat_norm"}
    for ours, theirs in zip(fast(x), net(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).view(len(x), -1))


def test_a_view_keeps_the_layout():
    net, x = Views().eval(), torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(resect.folded(net, x)(x), net(x))


def test_wrapped_and_compiled_models_are_refused_and_gates_stay_behind():
    net, x = net_of(), torch.randn(2, 3, 16, 16)
    with pytest.raises(InputError, match="wrapped, sharded or compiled"):
        resect.folded(nn.DataParallel(net), x)
    blocks = resect.find_blocks(net, x)
    with resect.closed(net, blocks):
        fast = resect.folded(net, x)
    torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-4)
