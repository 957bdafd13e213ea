"""A training step with half of ResNet-50's blocks dropped: Composer's block-wise stochastic depth beside Resect's.

Composer (mosaicml 0.32.1) replaces torchvision's Bottleneck, and no other class, by one that skips its branch. It needs
torch below 2.7.1, so this script has an environment of its own:

    pip install "mosaicml==0.32.1" resect
    python benchmarks/skip_composer.py
"""

from __future__ import annotations

import copy
import json

import composer.functional as cf
import torch
import torch.nn.functional as F
import torchvision
from timing import Work, in_turns, shown
from torch import Tensor, nn

import resect


def step(model: nn.Module, x: Tensor, method: resect.StochasticDepth | None = None) -> Work:
    model.train()
    y = torch.randint(0, 10, (len(x),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def work() -> None:
        if method is not None:
            method.begin_step()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def main() -> None:
    torch.manual_seed(0)
    plain, x = torchvision.models.resnet50(num_classes=10), torch.randn(16, 3, 64, 64)
    theirs, ours = copy.deepcopy(plain), copy.deepcopy(plain)
    cf.apply_stochastic_depth(
        theirs, "ResNetBottleneck", stochastic_method="block", drop_rate=0.5, drop_distribution="uniform"
    )
    with resect.StochasticDepth(ours, resect.find_blocks(ours, x), drop_prob=0.5, rule="uniform") as method:
        sides = {"plain": step(plain, x), "composer": step(theirs, x), "resect": step(ours, x, method)}
        times = in_turns(sides, rounds=60)
    result: dict[str, object] = {"rounds": 60, "torch": torch.__version__, "threads": torch.get_num_threads()}
    for name in ("composer", "resect"):
        ratios = [a / b for a, b in zip(times[name], times["plain"], strict=True)]
        result[f"{name}_over_plain"] = shown(f"{name}, half the blocks dropped, over plain", ratios, "×", True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
