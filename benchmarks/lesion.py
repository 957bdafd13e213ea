"""All single lesions of a trained ResNet-56, the naive way: a hook that zeroes a branch, and the whole net again.

python benchmarks/lesion.py --data FOLDER        # CIFAR-10 as parquet files: train.parquet, test.parquet
python benchmarks/lesion.py --quick              # enlarged digits, a net that is fitted rather than trained
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from lesion_net import Images, batches, cifar10, digits, trained
from timing import in_turns, shown
from torch import nn


def accuracy(net: nn.Module, data: list[Images], dtype: torch.dtype) -> float:
    """Accuracy in %."""
    right = sum(int((net(x.to(dtype)).argmax(dim=1) == y).sum()) for x, y in data)
    return 100 * right / sum(len(y) for _, y in data)


@torch.no_grad()
def naive(net: nn.Module, names: list[str], data: list[Images], dtype: torch.dtype = torch.float32) -> list[float]:
    """Accuracy of the whole net, then with each block's branch replaced by zeros; the shortcut stays."""
    found = [accuracy(net, data, dtype)]
    for name in names:
        last = net.get_submodule(name).bn2
        hook = last.register_forward_hook(lambda _, args, output: torch.zeros_like(output))
        found.append(accuracy(net, data, dtype))
        hook.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, few rounds")
    parser.add_argument("--data", type=Path, help="a folder with CIFAR-10 as train.parquet and test.parquet")
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--cache", type=Path, default=Path("lesion-cache"), help="where the trained net is kept")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = digits if options.data is None else lambda split, count: cifar10(options.data, split, count)
    net = trained(load("train", 300 if options.quick else 20000), 0 if options.quick else options.steps, options.cache)
    data = batches(load("test", 20 if options.quick else 200), options.batch)
    names = [name for name, module in net.named_modules() if hasattr(module, "conv2")]
    times = in_turns({"naive fp32": lambda: naive(net, names, data)}, options.rounds or (3 if options.quick else 5), 0)
    print(json.dumps({name: shown(name, seconds, "s", True) for name, seconds in times.items()}))


if __name__ == "__main__":
    main()
