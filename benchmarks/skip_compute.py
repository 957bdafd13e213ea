"""What a training step costs when blocks are left out: beside plain training, smaller nets, and other drop paths.

python benchmarks/skip_compute.py --quick
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
import torchvision
from timing import in_turns, shown
from torch import Tensor, nn

from resect.lab.registry import build

Made = tuple[nn.Module, Tensor]


def resnet50(batch: int) -> Made:
    return timm.create_model("resnet50", num_classes=10), torch.randn(batch, 3, 64, 64)


def vit_tiny(batch: int, **options: float) -> Made:
    model = timm.create_model("vit_tiny_patch16_224", img_size=128, num_classes=10, **options)
    return model, torch.randn(batch, 3, 128, 128)


def resnet56(batch: int) -> Made:
    return build("cifar-resnet-56", num_classes=10, in_channels=3), torch.randn(batch, 3, 32, 32)


def convnext(batch: int, **options: float) -> Made:
    return torchvision.models.convnext_tiny(num_classes=10, **options), torch.randn(batch, 3, 64, 64)


def halved(name: str, model: nn.Module) -> nn.Module:
    """The physically smaller net, made by hand: every second layer that keeps its shape is taken out of its list."""
    small = copy.deepcopy(model)
    if name == "vit_tiny":
        del small.blocks[1::2]
        return small
    for stage in [module for module in small.modules() if isinstance(module, nn.Sequential)]:
        blocks = [place for place, child in enumerate(stage) if type(child).__name__.endswith(("Bottleneck", "Block"))]
        for place in reversed(blocks[1::2]):
            del stage[place]
    return small


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """One ordinary training step: forward, backward, SGD with momentum."""
    model.train()
    y = torch.randint(0, 10, (len(x),))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)

    def work() -> None:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="15 rounds of small batches")
    rounds = 15 if parser.parse_args().quick else 31
    torch.manual_seed(0)
    result: dict[str, object] = {"rounds": rounds, "threads": torch.get_num_threads()}
    for name, make in (("resnet50", resnet50), ("vit_tiny", vit_tiny), ("resnet56", resnet56)):
        model, x = make(8)
        times = in_turns({"plain": step(model, x), "smaller": step(halved(name, model), x)}, rounds)
        ratios = [small / plain for plain, small in zip(times["plain"], times["smaller"], strict=True)]
        result[f"{name}_smaller_over_plain"] = shown(f"{name}: half of it, by hand, over plain", ratios, "×", True)
    plain, timm_drops = vit_tiny(8), vit_tiny(8, drop_path_rate=0.4)
    times = in_turns({"plain": step(*plain), "timm": step(*timm_drops)}, rounds)
    ratios = [drops / plain for plain, drops in zip(times["plain"], times["timm"], strict=True)]
    result["timm_over_plain"] = shown("timm DropPath at 0.4 over plain", ratios, "×", True)
    plain, drops = convnext(8, stochastic_depth_prob=0.0), convnext(8, stochastic_depth_prob=0.4)
    times = in_turns({"plain": step(*plain), "torchvision": step(*drops)}, rounds)
    ratios = [drops / plain for plain, drops in zip(times["plain"], times["torchvision"], strict=True)]
    result["torchvision_over_plain"] = shown("torchvision StochasticDepth at 0.4 over plain", ratios, "×", True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
