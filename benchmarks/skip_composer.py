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
import torchvision
from timing import in_turns, shown, step

import resect


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
