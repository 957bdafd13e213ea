import pytest
import torch
from torch import nn

from resect.lab.config.train import TrainConfig
from resect.lab.optimize import learning_rate, make_optimizer


@pytest.mark.parametrize("steps", [7, 40, 331])
def test_one_cycle_is_torchs(steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=steps, cycle_momentum=False)
    config = TrainConfig(lr=0.3)
    for step in range(steps):
        assert learning_rate(step, steps, config) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if step < steps - 1:
            theirs.step()


def test_the_other_schedules():
    def rates(schedule):
        return [learning_rate(step, 20, TrainConfig(lr=1.0, schedule=schedule)) for step in range(20)]

    assert rates("constant") == [1.0] * 20
    assert rates("step") == [1.0] * 10 + [0.1] * 5 + [0.01] * 5
    cosine = rates("cosine")
    assert cosine[0] == 1.0
    assert cosine[10] == pytest.approx(0.5)
    assert cosine == sorted(cosine, reverse=True)
    assert [learning_rate(0, 1, TrainConfig(schedule="one-cycle"))] == pytest.approx([4e-7])


@pytest.mark.parametrize("decay", ["weights", "all"])
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_what_decays(kind, decay):
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    optimizer = make_optimizer(net, TrainConfig(optimizer=kind, lr=0.1, weight_decay=0.5, decay=decay))
    before = {name: p.clone() for name, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p, before[name] * (0.95 if p.ndim > 1 or decay == "all" else 1))
