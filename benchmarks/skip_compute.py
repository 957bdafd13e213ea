"""What a training step costs when blocks are left out: beside plain training, smaller nets, and other drop paths.

- ``batch_over_ideal``: half the blocks closed, beside the net from which they were taken by hand: at most 1.05.
- ``pair_over_model``: a drop and a dropped-only step of ResidualDroppath beside (5 − 2p)/6 of two plain steps, p the
  share of the net that was dropped: at most 1.10.
- ``sample_over_ideal``: drop path at 0.4 that computes only the samples kept, beside the share of a plain step that is
  left: at most 1.10. ``sample_memory``: what is kept for the backward pass, beside the same share of plain.
- ``compiled_over_eager``: a training step with every layer compiled and warmed up, beside the same uncompiled;
  ``recompiles_after_warmup`` and ``eager_fallbacks`` count what torch compiled anew, or gave up, in 200 more steps.
- ``timm_over_plain``, ``torchvision_over_plain``: the drop path of others at 0.4 beside no drop path.

A step is forward, backward and SGD with momentum. Sides take turns; medians and quartiles of at least 15 rounds, in
processor time where torch has one thread (OMP_NUM_THREADS=1). A claim whose spread exceeds half its margin fails.

    python benchmarks/skip_compute.py --quick
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import time
import warnings

import timm
import torch
import torchvision
from timing import Work, holds, in_turns, shown, step
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig

import resect
from resect.lab.models import CifarResNet
from resect.lab.registry import build
from resect.train.draws import draw_closed, draw_keys, is_dropped
from resect.train.method import Method

BATCH, PAIR, SAMPLE = 1.05, 1.10, 1.10
QUICK = 8  # images

Made = tuple[nn.Module, Tensor]


def shallow(batch: int) -> bool:
    """Whether a net of fewer blocks, alike in all else, takes the place of the one named: with ``--quick``."""
    return batch <= 2 * QUICK


def label(name: str, batch: int) -> str:
    """The name of the net that was run."""
    return {"resnet50": "resnet26", "vit_tiny": "vit_tiny_4", "resnet56": "resnet20"}[name] if shallow(batch) else name


def resnet50(batch: int) -> Made:
    name = "resnet26" if shallow(batch) else "resnet50"
    return timm.create_model(name, num_classes=10), torch.randn(batch, 3, 64, 64)


def vit_tiny(batch: int, **options: float) -> Made:
    options = {"depth": 4 if shallow(batch) else 12} | options
    model = timm.create_model("vit_tiny_patch16_224", img_size=128, num_classes=10, **options)
    return model, torch.randn(batch, 3, 128, 128)


def resnet56(batch: int) -> Made:
    name = "cifar-resnet-20" if shallow(batch) else "cifar-resnet-56"
    return build(name, num_classes=10, in_channels=3), torch.randn(batch, 3, 32, 32)


def convnext(batch: int, drop_prob: float) -> Made:
    depths = (1, 1, 3, 1) if shallow(batch) else (3, 3, 9, 3)  # of ConvNeXt-Tiny
    widths = [96, 192, 384, 768, None]
    stages = [CNBlockConfig(*shape) for shape in zip(widths, widths[1:], depths, strict=False)]
    model = torchvision.models.ConvNeXt(stages, stochastic_depth_prob=drop_prob, num_classes=10)
    return model, torch.randn(batch, 3, 64, 64)


def halved(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The physically smaller net, made by hand: every second layer that keeps its shape is taken out of its list."""
    small, gone = copy.deepcopy(model), []
    for path, stage in list(small.named_modules()):
        layers = [place for place, child in enumerate(stage.children()) if type(child).__name__.endswith("Block")]
        layers += [place for place, child in enumerate(stage.children()) if type(child).__name__ == "Bottleneck"]
        if isinstance(stage, nn.Sequential) and len(layers) > 1:
            gone += [f"{path}.{place}" for place in layers[1::2]]
            for place in reversed(layers[1::2]):
                del stage[place]
    return small, gone


def over(times: dict[str, list[float]], one: str, other: str) -> list[float]:
    return [a / b for a, b in zip(times[one], times[other], strict=True)]


def batch_mode(model: nn.Module, x: Tensor, rounds: int) -> tuple[list[float], list[float]]:
    """Half the blocks closed over the smaller net; and over that net with the ReLUs that a closed block leaves."""
    (small, gone), closing = halved(model), copy.deepcopy(model)
    blocks = resect.find_blocks(closing, x)
    shares = [float(block.owner in gone) for block in blocks]
    assert sum(shares) >= len(gone), "every layer taken out by hand is a block, or several"
    sides = {"smaller": step(small, x)}
    if isinstance(model, CifarResNet):
        with_relus = copy.deepcopy(model)
        for layer in gone:
            with_relus.set_submodule(layer, nn.ReLU())
        sides["with ReLUs"] = step(with_relus, x)
    with resect.StochasticDepth(closing, blocks, drop_prob=1.0, rule=shares) as method:
        times = in_turns(sides | {"closed": step(closing, x, method)}, rounds)
    return over(times, "closed", "smaller"), over(times, "closed", "with ReLUs") if len(sides) > 1 else []


def pair_of_steps(model: nn.Module, x: Tensor, rounds: int) -> list[float]:
    """A drop and a dropped-only step over what the model of their cost says."""
    dropping, shares = copy.deepcopy(model), []
    blocks = resect.find_blocks(dropping, x)
    with resect.ResidualDroppath(dropping, blocks, drop_prob=0.5, rule="uniform") as method:
        one, two = step(model, x), step(dropping, x, method)

        def pair() -> None:
            two()
            drawn = draw_closed(list(method.drop_probs.values()), method.seed, method.steps - 1)
            shares.append(sum(block.flops for block in itertools.compress(blocks, drawn)) / blocks.flops)
            two()

        times = in_turns({"two": lambda: (one(), one()), "pair": pair}, rounds)
    modelled = [(5 - 2 * share) / 6 for share in shares[-rounds:]]
    return [ratio / cost for ratio, cost in zip(over(times, "pair", "two"), modelled, strict=True)]


def sample_mode(model: nn.Module, x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Drop path on the kept samples alone, over the share of a plain step that they are; its memory likewise."""
    dropping, shares = copy.deepcopy(model), []
    blocks = resect.find_blocks(dropping, x)
    with resect.StochasticDepth(
        dropping, blocks, drop_prob=0.4, rule="uniform", per="sample", compute="subset"
    ) as method:
        plain, kept = step(model, x), step(dropping, x, method)

        def subset() -> None:
            kept()
            keys = draw_keys(list(method.drop_probs.values()), method.seed, method.steps - 1)
            shares.append(
                1 - float(torch.stack([is_dropped(key, torch.arange(len(x))) for key in keys]).double().mean())
            )

        times = in_turns({"plain": plain, "subset": subset}, rounds)
        memory = saved_bytes(dropping, subset) / saved_bytes(model, plain) / shares[-1]
    ratios = over(times, "subset", "plain")
    return {
        "over_ideal": [ratio / share for ratio, share in zip(ratios, shares[-rounds - 1 : -1], strict=True)],
        "over_plain": ratios,
        "memory_over_ideal": [memory] * rounds,
    }


def saved_bytes(model: nn.Module, work: Work) -> int:
    """Bytes that one step keeps for its backward pass, weights aside."""
    storages: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(size for place, size in storages.items() if place not in weights)


def methods(model: nn.Module, blocks: resect.Blocks) -> dict[str, Method]:
    half = len(blocks) // 2
    return {
        "StochasticDepth": resect.StochasticDepth(model, blocks, rule="uniform"),
        "StochasticDepth, paper's scaling": resect.StochasticDepth(model, blocks, rule="uniform", scaling="paper"),
        "drop path, masked": resect.StochasticDepth(model, blocks, per="sample", compute="mask"),
        "ResidualDroppath": resect.ResidualDroppath(model, blocks, rule="uniform"),
        "EpsilonGate": resect.EpsilonGate(model, blocks, epsilon=1.0, skip_muted_after=3, muted_at_start="allow"),
        "EffectivePaths": resect.EffectivePaths(model, blocks, keep=half),
        "RandomSubset": resect.RandomSubset(model, blocks, keep=half),
    }


def compiled_part(result: dict[str, object], batch: int, rounds: int) -> bool:
    """The first method is timed beside eager; all, or with --quick that one alone, run 200 steps after warming up."""
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    model, x = vit_tiny(batch, depth=1 if shallow(batch) else 12)
    eager, compiled = copy.deepcopy(model), copy.deepcopy(model)
    resect.compile(compiled, resect.find_blocks(compiled, x))
    begun, graphs, breaks, ratios = time.perf_counter(), 0, 0, []
    blocks = resect.find_blocks(compiled, x)[: 1 if shallow(batch) else None]  # each graph takes seconds
    chosen = methods(compiled, blocks)
    for name in list(chosen)[: 1 if shallow(batch) else None]:
        with chosen[name] as method, config.patch(fail_on_recompile_limit_hit=True):
            made = method.warmup(x)
            result.setdefault("warmup_graphs", made)
            result.setdefault("warmup_seconds", round(time.perf_counter() - begun, 1))
            before, work = counters["stats"]["unique_graphs"], step(compiled, x, method)
            if not ratios:
                with methods(eager, blocks)[name] as beside:
                    times = in_turns({"eager": step(eager, x, beside), "compiled": work}, rounds)
                ratios = over(times, "compiled", "eager")
            for _ in range(200):
                work()
            graphs += counters["stats"]["unique_graphs"] - before
            breaks += sum(counters["graph_break"].values())
    shown("vit_tiny: compiled and warmed up, over eager", ratios, "×", True)
    result["compiled_over_eager"] = round(statistics.median(ratios), 4)
    result["recompiles_after_warmup"], result["eager_fallbacks"] = graphs, breaks
    return graphs == breaks == 0


def batch_part(result: dict[str, object], batch: int, rounds: int) -> bool:
    worst: list[float] = []
    for net, make in NETS.items():
        name = label(net, batch)
        found, apart = batch_mode(*make(batch), rounds)
        quarters = shown(f"{name}: half the blocks closed, over the smaller net", found, "×", holds(found, BATCH))
        result[f"batch_over_ideal_{name}"] = quarters
        if apart:
            result[f"batch_over_relus_{name}"] = shown(
                "  over the smaller net and the ReLUs that stay", apart, "×", True
            )
        worst = max(worst, found, key=lambda values: statistics.median(values or [0.0]))
    result["batch_over_ideal"] = round(statistics.median(worst), 4)
    return holds(worst, BATCH)


def pair_part(result: dict[str, object], batch: int, rounds: int) -> bool:
    worst: list[float] = []
    for net in ("resnet56", "vit_tiny"):
        name = label(net, batch)
        found = pair_of_steps(*NETS[net](batch), rounds)
        result[f"pair_over_model_{name}"] = shown(
            f"{name}: a pair of ResidualDroppath steps, over the model", found, "×", holds(found, PAIR)
        )
        worst = max(worst, found, key=lambda values: statistics.median(values or [0.0]))
    result["pair_over_model"] = round(statistics.median(worst), 4)
    return holds(worst, PAIR)


def sample_part(result: dict[str, object], batch: int, rounds: int) -> bool:
    name, found = label("vit_tiny", 2 * batch), sample_mode(*vit_tiny(2 * batch), rounds)
    shown(f"{name}: only the samples kept at 0.4, over plain", found["over_plain"], "×", True)
    good = holds(found["over_ideal"], SAMPLE)
    shown(f"{name}: only the samples kept at 0.4, over ideal", found["over_ideal"], "×", good)
    shown(f"{name}: memory kept for the backward pass, over ideal", found["memory_over_ideal"], "×", True)
    result["sample_over_ideal"] = round(statistics.median(found["over_ideal"]), 4)
    result["sample_memory_over_ideal"] = round(found["memory_over_ideal"][0], 4)
    return good


def peers_part(result: dict[str, object], batch: int, rounds: int) -> bool:
    plain, timm_drops = vit_tiny(batch), vit_tiny(batch, drop_path_rate=0.4)
    times = in_turns({"plain": step(*plain), "drops": step(*timm_drops)}, rounds)
    ratios = over(times, "drops", "plain")
    shown("timm's DropPath at 0.4, over none", ratios, "×", True)
    result["timm_over_plain"] = round(statistics.median(ratios), 4)
    plain, drops = convnext(batch, 0.0), convnext(batch, 0.4)
    times = in_turns({"plain": step(*plain), "drops": step(*drops)}, rounds)
    ratios = over(times, "drops", "plain")
    shown("torchvision's StochasticDepth at 0.4, over none", ratios, "×", True)
    result["torchvision_over_plain"] = round(statistics.median(ratios), 4)
    return True


NETS = {"resnet50": resnet50, "vit_tiny": vit_tiny, "resnet56": resnet56}
PARTS = {"batch": batch_part, "pair": pair_part, "sample": sample_part, "peers": peers_part, "compiled": compiled_part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="15 rounds of 8 images, shallower nets; else 31 of 32")
    parser.add_argument("--only", choices=PARTS, help="one part of it")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*below 6, dropping")
    torch.manual_seed(0)
    rounds, batch = (15, QUICK) if options.quick else (31, 32)
    result: dict[str, object] = {"rounds": rounds, "batch": batch, "threads": torch.get_num_threads()}
    kept = [part(result, batch, rounds) for name, part in PARTS.items() if options.only in (None, name)]
    result["kept"] = all(kept)
    print(json.dumps(result))
    if not all(kept):
        raise SystemExit("a claim is not kept, or its spread is too wide to say")


if __name__ == "__main__":
    main()
