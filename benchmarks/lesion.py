"""All single lesions of a trained ResNet-56: a hook that zeroes a branch and the whole net again, beside Resect.

Sides take turns in every round, on one thread, in processor time, on the same batches: the naive way in float32 and
bfloat16; `lesion_study` in both; of `resect.folded` copies in both. A ratio is of the two times of one round; medians
and quartiles; a claim whose spread exceeds half its margin fails. Accuracies are compared lesion by lesion. At the end
other tools, where they are installed: see `lesion_peers.py`.

    python benchmarks/lesion.py --data FOLDER        # CIFAR-10 as parquet files: train.parquet, test.parquet
    python benchmarks/lesion.py --data FOLDER --only peers
    python benchmarks/lesion.py --quick              # enlarged digits, a net that is fitted rather than trained
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from lesion_net import Images, batches, cifar10, digits, trained
from lesion_peers import beside
from timing import clock, holds, in_turns, quartiles, shown
from torch import nn

import resect

HALF = torch.bfloat16
LIMITS = {"gain_fp32": 2.3, "gain_fp32_folded": 2.8, "gain_bf16": 2.3, "gain_bf16_folded": 2.8, "all_on": 7.0}
GAP = 0.5  # points of accuracy that bfloat16 may move any lesion by


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


def lesions(net: nn.Module, blocks: resect.Blocks, data: list[Images], dtype: torch.dtype) -> list[float]:
    """The same, by `lesion_study` of the net as it is; in bfloat16 the batches are cast, as on the naive side."""
    study = resect.lesion_study(net, blocks, data, forward=lambda model, batch: model(batch[0].to(dtype)))
    return [100 - error for error in (study.baseline, *(lesion.value for lesion in study.each))]


def folded_lesions(net: nn.Module, blocks: resect.Blocks, data: list[Images], dtype: torch.dtype) -> list[float]:
    """The same, of a folded copy, which is made each time."""
    fast = resect.folded(net, data[0][0][:2], dtype=None if dtype is torch.float32 else dtype)
    return lesions(fast, blocks, data, torch.float32)


def largest(one: list[float], other: list[float]) -> float:
    """The largest difference of two lists, pair by pair."""
    return round(max(abs(a - b) for a, b in zip(one, other, strict=True)), 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, few rounds")
    parser.add_argument("--data", type=Path, help="a folder with CIFAR-10 as train.parquet and test.parquet")
    parser.add_argument("--steps", type=int, default=500, help="training steps")
    parser.add_argument("--cache", type=Path, default=Path("build/lesion"), help="where the trained net is kept")
    parser.add_argument("--images", type=int, default=500, help="of the timed rounds")
    parser.add_argument("--judged", type=int, default=2000, help="images for the comparison of accuracies")
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3, help="few, since one takes up to a minute a side")
    parser.add_argument("--only", choices=["peers"], help="the comparison with other tools alone")
    options = parser.parse_args()
    if options.quick:
        options.images, options.judged, options.rounds, options.batch = 100, 50, 2, 100
    torch.set_num_threads(1)
    load: Callable[[str, int], Images] = functools.partial(cifar10, options.data) if options.data else digits
    net = trained(load("train", 300 if options.quick else 20000), 0 if options.quick else options.steps, options.cache)
    images = load("test", options.judged)
    judged = batches(images, options.batch)
    data = batches((images[0][: options.images], images[1][: options.images]), options.batch)
    blocks = resect.find_blocks(net, images[0][:2])[:: 3 if options.quick else 1]
    names = [block.owner for block in blocks]
    few = 20 if options.quick else 200
    own = {
        "by hook": functools.partial(naive, net, names),
        "lesion_study": lambda on: lesions(net, blocks, on, torch.float32),
    }
    if options.only:
        beside(own, net, names, batches((images[0][:few], images[1][:few]), few), options.rounds)
        return
    half = trained(load("train", 300), 0, None).to(HALF)
    half.load_state_dict(net.state_dict())

    sides = {
        "naive fp32": lambda on: naive(net, names, on),
        "naive bf16": lambda on: naive(half, names, on, HALF),
        "fp32": lambda on: lesions(net, blocks, on, torch.float32),
        "fp32 folded": lambda on: folded_lesions(net, blocks, on, torch.float32),
        "bf16": lambda on: lesions(half, blocks, on, HALF),
        "bf16 folded": lambda on: folded_lesions(net, blocks, on, HALF),
    }
    times = in_turns({name: functools.partial(side, data) for name, side in sides.items()}, options.rounds, 0, clock)
    for name, seconds in times.items():
        shown(name, seconds, "s", True)
    ratios = {
        "gain_fp32": ("naive fp32", "fp32"),
        "gain_fp32_folded": ("naive fp32", "fp32 folded"),
        "gain_bf16": ("naive bf16", "bf16"),
        "gain_bf16_folded": ("naive bf16", "bf16 folded"),
        "all_on": ("naive fp32", "bf16 folded"),
    }
    kept, result = [], {}
    for name, (slow, fast) in ratios.items():
        values = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
        kept.append(holds(values, LIMITS[name], at_least=True))
        shown(name, values, f"× (limit {LIMITS[name]})", kept[-1])
        result["all_on_over_naive_fp32" if name == "all_on" else name] = round(quartiles(values)[1], 2)

    truth = sides["naive fp32"](judged)
    gaps = {name: largest(truth, sides[name](judged)) for name in ("fp32 folded", "bf16 folded")}
    gaps["fp32"] = largest(naive(net, names, data[:1]), lesions(net, blocks, data[:1], torch.float32))
    span = f"{min(truth[1:]):.2f} … {max(truth[1:]):.2f} %"
    print(f"accuracy of the whole net {truth[0]:.2f} %, with one block closed {span}")
    print(f"largest gap to the naive side over {len(images[1])} images, in points: {gaps}")
    beside(own, net, names, batches((images[0][:few], images[1][:few]), few), options.rounds)
    kept += [gaps["fp32"] == 0, gaps["fp32 folded"] == 0, options.quick or gaps["bf16 folded"] <= GAP]
    result |= {
        "max_accuracy_gap_fp32": max(gaps["fp32"], gaps["fp32 folded"]),
        "max_accuracy_gap_bf16": gaps["bf16 folded"],
    }
    print(json.dumps(result))
    if not all(kept) and not options.quick:
        raise SystemExit("a claim is not kept, or its spread is too wide to say")


if __name__ == "__main__":
    main()
