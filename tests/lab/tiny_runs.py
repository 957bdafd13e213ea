"""What the lab's tests share: a tiny recipe, and a method that draws, adds a loss and keeps state."""

from __future__ import annotations

import torch

from resect.lab import recipe
from resect.lab.models import PreBlock
from resect.train import draws

TINY = {
    "model": {"name": "cifar-preresnet-8", "options": {"widths": [4, 4, 8]}},
    "data": {"name": "digits", "options": {"folds": 4}},
    "train": {"epochs": 3, "batch_size": 256, "shift": 1, "weight_decay": 1e-3, "tensorboard": False},
}


def tiny(method: bool = False, **train: object) -> recipe.Recipe:
    tables = {**TINY, "train": {**TINY["train"], **train}}
    return recipe.parse({**tables, "method": {"name": "epsilon-gate", "epsilon": 0.5}} if method else tables)


class FakeMethod:
    """Scales every branch by a number drawn from (seed, step), and pulls the scale's mean square down."""

    def __init__(self, config, model, optimizer, example):
        self.convs = [module.conv2 for module in model.modules() if isinstance(module, PreBlock)]
        self.epsilon, self.steps, self.scale = config.epsilon, 0, 1.0
        self.total = torch.zeros(len(self.convs))
        self.handles = []

    def __enter__(self):
        self.handles = [conv.register_forward_hook(self.hook) for conv in self.convs]
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

    def hook(self, module, inputs, output):
        return output * self.scale if module.training else output

    def begin_step(self):
        self.scale = float(torch.rand((), generator=draws.generator("fake", 0, self.steps)))
        self.steps += 1
        self.total += self.scale

    def parameters(self):
        return iter(())

    def extra_loss(self, target=None):
        return 1e-3 * self.convs[0].weight.square().sum()

    def metrics(self):
        return {"muted": float(self.total[0])}

    def state_dict(self):
        return {"steps": self.steps, "total": {"sum": self.total, "list": [1, (2.5, None)]}}

    def load_state_dict(self, state):
        assert state["total"]["list"] == [1, (2.5, None)]
        self.steps, self.total = state["steps"], state["total"]["sum"]


class Stop(Exception):
    """Stands for Ctrl-C."""


def stop_after(epoch: int):
    def progress(now):
        if now.row and now.row["epoch"] == epoch:
            raise Stop

    return progress
