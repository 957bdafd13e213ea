"""One optimizer step: its draws, micro-batches, clipping, and who sets the learning rate."""

import pytest
import torch
from tiny_runs import FakeMethod, Stop, stop_after, tiny
from torch import nn

from resect.errors import ResectError
from resect.lab import session
from resect.lab.data import source
from resect.lab.trainer import train


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def test_every_step_draws_anew_and_the_same_again(tmp_path, monkeypatch):
    def draws(folder):
        seen = []

        def augment(images, *, generator, **_):
            seen.append(torch.rand((), generator=generator).item())
            return images

        monkeypatch.setattr(source, "augment", augment)
        train(tiny(epochs=2, accumulate=2), tmp_path / folder, model=net())
        return seen

    first = draws("a")
    assert len(set(first)) == len(first) == 10
    assert draws("b") == first


@pytest.mark.parametrize("parts", [3, 1347])
def test_micro_batches_add_up_to_the_batch(tmp_path, parts):
    options = {"epochs": 2, "batch_size": 1347, "shift": 0, "schedule": "constant"}
    whole = train(tiny(**options), tmp_path / "whole", model=net())
    made = []

    def factory(*arguments):
        assert len(arguments[3]) == -(-1347 // parts), "the example is one micro-batch"
        made.append(NoEffect())
        return made[-1]

    split = train(
        tiny(method=True, **options, accumulate=parts), tmp_path / "split", model=net(), method_factory=factory
    )
    torch.testing.assert_close(split.model[1].weight, whole.model[1].weight)
    assert split.history[0]["train_loss"] == pytest.approx(whole.history[0]["train_loss"], rel=1e-5)
    assert made[0].steps == 2, "one draw an optimizer step"


class NoEffect(FakeMethod):
    def __init__(self):
        self.convs, self.handles, self.steps, self.scale, self.total = [], [], 0, 1.0, torch.zeros(1)

    def extra_loss(self, target=None):
        return 0.0


def test_the_gradient_is_clipped_as_a_whole(tmp_path):
    options = {"epochs": 1, "batch_size": 1347, "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant", "lr": 0.5}
    before = net().state_dict()
    moved = {}
    for clip in (None, 0.01, 1e6):
        trained = train(tiny(**options, clip=clip), tmp_path / str(clip), model=net()).model.state_dict()
        moved[clip] = torch.cat([(trained[name] - before[name]).flatten() for name in before])
    assert moved[0.01].norm() == pytest.approx(0.5 * 0.01, rel=1e-3)
    torch.testing.assert_close(moved[0.01] / moved[0.01].norm(), moved[None] / moved[None].norm())
    assert torch.equal(moved[1e6], moved[None])


class Beside(NoEffect):
    """Brings along a layer and a loss of its own."""

    def __init__(self, factor=1.0):
        super().__init__()
        self.layer, self.factor = net()[1], factor

    def parameters(self):
        return self.layer.parameters()

    def extra_loss(self, target=None):
        return self.factor * sum(parameter.square().sum() for parameter in self.parameters())


def train_beside(folder, method, **options):
    """One step of the net with the method; returns how far the weights of both moved."""
    model = net()
    before = [weight.detach().clone() for weight in (*model.parameters(), *method.parameters())]
    same = {"epochs": 1, "batch_size": 1347, "shift": 0, "momentum": 0.0, "schedule": "constant", "lr": 0.5} | options
    train(tiny(method=True, **same), folder, model=model, method_factory=lambda *_: method)
    after = (*model.parameters(), *method.parameters())
    return [(one - other).detach() for one, other in zip(after, before, strict=True)]


def test_what_a_method_brings_along_is_clipped_with_the_net(tmp_path):
    moved = train_beside(tmp_path, Beside(), clip=0.01, weight_decay=0.0)
    assert all(part.abs().max() > 0 for part in moved)
    assert torch.cat([part.flatten() for part in moved]).norm() == pytest.approx(0.5 * 0.01, rel=1e-3)


@pytest.mark.parametrize("decay", ["weights", "all"])
def test_what_a_method_brings_along_decays_like_the_net(tmp_path, decay):
    *_, weight, bias = train_beside(tmp_path, Beside(factor=0.0), weight_decay=0.2, decay=decay)
    first = dict(net()[1].named_parameters())
    torch.testing.assert_close(weight, -0.1 * first["weight"].detach())
    torch.testing.assert_close(bias, (-0.1 if decay == "all" else 0.0) * first["bias"].detach())


def test_weights_of_a_method_that_are_not_finite_are_never_written(tmp_path):
    with pytest.raises(ResectError, match=r"a weight that is not finite in epoch 1, step 1 of 1.*no checkpoint"):
        train_beside(tmp_path, Beside(factor=1e37), lr=1e3, weight_decay=0.0)


def test_a_scheduler_takes_the_place_of_the_schedule_and_is_kept(tmp_path, monkeypatch):
    real = session.start

    def start(*arguments):
        begun = real(*arguments)
        begun.scheduler = torch.optim.lr_scheduler.StepLR(begun.optimizer, 2, 0.5)
        return begun

    monkeypatch.setattr("resect.lab.trainer.start", start)
    with pytest.raises(Stop):
        train(tiny(epochs=4, lr=0.1), tmp_path, progress=stop_after(3))
    resumed = train(tiny(epochs=4, lr=0.1), tmp_path, resume=True)
    assert [row["lr"] for row in resumed.history] == pytest.approx([0.1, 0.1, 0.05, 0.05])
