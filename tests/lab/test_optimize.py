import math

import pytest
import torch
from tiny_runs import tiny
from torch import nn

from resect.errors import InputError
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
    assert rates("step") == pytest.approx([1.0] * 10 + [0.1] * 5 + [0.01] * 5)
    own = TrainConfig(lr=1.0, schedule="step", milestones=[0.3], factor=0.5)
    assert [learning_rate(step, 10, own) for step in range(10)] == [1.0] * 3 + [0.5] * 7
    cosine = rates("cosine")
    assert cosine[0] == 1.0
    assert cosine[10] == pytest.approx(0.5)
    assert cosine == sorted(cosine, reverse=True)
    assert [learning_rate(0, 1, TrainConfig(schedule="one-cycle"))] == pytest.approx([4e-7])


@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
@pytest.mark.parametrize("warmup", [0.4, 2.0, 2.5])
def test_warmup_rises_in_a_straight_line_to_the_full_rate(schedule, warmup):
    config = TrainConfig(epochs=10, lr=0.5, schedule=schedule, warmup=warmup)
    rates = [learning_rate(step, 50, config) for step in range(50)]  # 5 steps an epoch
    count = math.ceil(5 * warmup)
    assert rates[:count] == pytest.approx([0.5 * (step + 1) / (5 * warmup + 1) for step in range(count)])
    assert rates[0] <= 0.5 / 3
    after = TrainConfig(epochs=10, lr=0.5, schedule=schedule)
    if schedule == "cosine":  # the whole half wave, in the steps that are left
        left = 50 - 5 * warmup
        assert rates[count:] == pytest.approx([learning_rate(s - 5 * warmup, left, after) for s in range(count, 50)])
    else:
        assert rates[count:] == [learning_rate(step, 50, after) for step in range(count, 50)]


def test_every_option_that_does_not_fit_the_others_is_named():
    with pytest.raises(InputError) as caught:
        tiny(epochs=2, warmup=2.0, milestones=[0.7, 0.5], accumulate=300, nesterov=True, momentum=0.0)
    said = str(caught.value)
    for words in (
        "one-cycle has a warm-up of its own",
        "leaves nothing of 2",
        "rise between 0 and 1",
        "256 cannot",
        "nest",
    ):
        assert words in said
    assert len(said) < 450, "the message does not recite the whole table"


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
