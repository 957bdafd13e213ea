"""What cutting whole blocks buys in milliseconds, beside cutting channels: Torch-Pruning at the same FLOPs.

- latency gain over FLOPs gain, t_full/t_cut over F_full/F_cut, at 2.1 times fewer FLOPs: the mean of 5 random plans at
  least 0.85; a plan of the blocks with the most measured milliseconds per FLOP at least 1, and 1.2 times that of
  Torch-Pruning;
- a plan asked for a third less latency, for the fewest FLOPs: at least 30 % less measured; all plans within 3 % of what
  was predicted;
- a removed block is a closed block, and a reloaded model the saved one, to the bit;
- a cut model runs the operations of one that was built that small: the same, on the same shapes, in the same order.

Batch 1 and 32, eager, float32, one process, one thread, its processor time; random weights. All sides take turns in
every round; a gain is of times of one round. Medians and quartiles; a claim whose spread exceeds half its margin fails.
The last line has the medians, means over models and batch sizes.

    python benchmarks/shrink.py --quick
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from shrink_models import Case, cases, twins
from shrink_peer import pruned
from shrink_same import first_difference, operations
from timing import Work, clock, holds, in_turns, shown
from torch import Tensor, nn

import resect
import resect.blocks.cost
from resect.report.cost import count_flops

FEWER = 2.1  # times fewer FLOPs
LESS = 1 / 3  # of the latency, asked for
RANDOM, CHOSEN, OVER, CUT, OFF = 0.85, 1.0, 1.2, 0.3, 0.03
DRAWS = 5


def random_plan(blocks: resect.Blocks, flops: int, seed: int) -> list[str]:
    """Blocks in random order, until the FLOPs are ``FEWER`` times fewer."""
    names, gone = blocks.names[:], []
    random.Random(seed).shuffle(names)
    while flops / (flops - sum(blocks[name].flops for name in gone)) < FEWER:
        gone.append(names.pop())
    return gone


def work(model: nn.Module, x: Tensor, at_least: float = 0.01) -> Work:
    """Passes through a model, as many as take ``at_least`` seconds or one."""
    with torch.inference_mode():
        model(x)
        repeats = max(1, round(at_least / clock(lambda: model(x))))

    def run() -> None:
        with torch.inference_mode():
            for _ in range(repeats):
                model(x)

    run.repeats = repeats  # type: ignore[attr-defined]
    return run


def times(sides: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds per pass of every side in every round."""
    works = {name: work(model, x) for name, model in sides.items()}
    found = in_turns(works, rounds, 1, clock)
    return {name: [took / works[name].repeats for took in found[name]] for name in works}


def at_the_same_flops(blocks: resect.Blocks, flops: int, costs: resect.BlockCosts) -> list[str]:
    """The blocks with the most milliseconds per FLOP, until the FLOPs are ``FEWER`` times fewer."""
    order = sorted(blocks.names, key=lambda name: costs.gain([name]) / blocks[name].flops)
    gone: list[str] = []
    while flops / (flops - sum(blocks[name].flops for name in gone)) < FEWER:
        gone.append(order.pop())
    return gone


def by_milliseconds(blocks: resect.Blocks, model: nn.Module, costs: resect.BlockCosts) -> list[str]:
    """The blocks that give a third of the latency, at every batch size, for the fewest FLOPs."""
    paid = {block.name: float(block.flops) for block in blocks}
    ranking = resect.rank(model, blocks, by=paid, unit="block", costs=costs)
    return ranking.choose(fewer={"latency": LESS}).names


def cut(model: nn.Module, blocks: resect.Blocks, gone: list[str]) -> nn.Module:
    """The model without these blocks, and without the layers of which nothing is left, where there are any."""
    try:
        return resect.remove(model, blocks, gone, compact=True)
    except resect.ResectError:
        return resect.remove(model, blocks, gone)


def largest(one: Any, other: Any) -> float:
    """The largest difference of two outputs."""
    one, other = (getattr(output, "logits", output) for output in (one, other))
    return float((one - other).abs().max())


def proofs(case: Case, blocks: resect.Blocks, small: nn.Module, names: list[str]) -> tuple[float, float]:
    """How far the cut model is from the closed one, and the reloaded from the cut one, on a batch that is new."""
    x = case.example(4)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        with resect.closed(case.model, blocks.select(names)):
            closed = case.model(x)
        resect.save(small, Path(folder) / "cut")
        again = resect.load(Path(folder) / "cut", case.model)
        return largest(closed, small(x)), largest(again(x), small(x))


def measure(case: Case, batches: tuple[int, ...], rounds: int, tries: int) -> dict[str, Any]:
    """All claims of one model; lists are of rounds."""
    print(f"\n{case.name}", flush=True)
    blocks = resect.find_blocks(case.model, case.example(2))
    inputs = {batch: case.example(batch) for batch in batches}
    flops = count_flops(case.model, inputs[batches[0]])
    costs = resect.block_costs(case.model, blocks, inputs[batches[0]], batches, rounds=rounds)
    plans = {f"random {seed}": random_plan(blocks, blocks.flops, seed) for seed in range(DRAWS)}
    plans["chosen"] = at_the_same_flops(blocks, blocks.flops, costs)
    plans["a third"] = by_milliseconds(blocks, case.model, costs)
    sides = {name: cut(case.model, blocks, gone) for name, gone in plans.items()}
    exact = [proofs(case, blocks, sides[name], plans[name]) for name in ("random 0", "chosen", "a third")]
    sides |= {"whole": case.model, "peer": pruned(case.model, inputs[batches[0]], flops / FEWER, steps=tries)}
    fewer = {name: flops / count_flops(side, inputs[batches[0]]) for name, side in sides.items()}
    print("  fewer FLOPs: " + ", ".join(f"{name} {share:.2f} x" for name, share in fewer.items()))
    found: dict[str, Any] = {"closed": max(a for a, _ in exact), "reload": max(b for _, b in exact)}
    gains: dict[str, list[list[float]]] = {"random": [], "chosen": [], "peer": []}
    for batch, x in inputs.items():
        taken = times(sides, x, rounds)

        def gain(name: str, taken: dict[str, list[float]] = taken) -> list[float]:
            return [a / b / fewer[name] for a, b in zip(taken["whole"], taken[name], strict=True)]

        draws = [gain(name) for name in plans if name.startswith("random")]
        mean = [statistics.mean(values) for values in zip(*draws, strict=True)]
        chosen, peer = gain("chosen"), gain("peer")
        over = [a / b for a, b in zip(chosen, peer, strict=True)]
        less = [1 - b / a for a, b in zip(taken["whole"], taken["a third"], strict=True)]
        label = f"  batch {batch}: "
        shown(label + "gain of random plans over that of FLOPs", mean, "", holds(mean, RANDOM, True))
        shown(label + "of the plan chosen by milliseconds", chosen, "", holds(chosen, CHOSEN, True))
        shown(label + "of Torch-Pruning", peer, "", True)
        shown(label + "the chosen plan beside Torch-Pruning", over, "x", holds(over, OVER, True))
        shown(label + "less latency, asked for a third", less, "", holds(less, CUT, True))
        off = []
        # As shares of the whole: the blocks were timed minutes earlier, when the machine may have had another pace.
        for name, gone in plans.items():
            predicted = costs.latency(gone, batch)[0] / costs.latency((), batch)[0]
            off.append(abs(predicted * statistics.median(taken["whole"]) / statistics.median(taken[name]) - 1))
        print(f"{label}predicted latency off by {100 * statistics.mean(off):.1f} % (at most {100 * max(off):.1f} %)")
        found.setdefault("off", []).extend(off)
        for name, values in (("random", mean), ("chosen", chosen), ("peer", peer)):
            gains[name].append(values)
    return found | gains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller models, few rounds, batch 1 and 4, no ResNet-18")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", help="the models whose name begins so")
    options = parser.parse_args()
    torch.set_num_threads(1)
    resect.blocks.cost.clock = time.process_time  # what block_costs measures by
    batches, rounds = ((1, 4), 3) if options.quick else ((1, 32), options.rounds)
    for name, model, layers, built, x in twins():
        blocks = resect.find_blocks(model, x)
        gone = [block for block in blocks if block.owner in layers]
        small = resect.remove(model, blocks, [block.name for block in gone], compact=True)
        apart = first_difference(operations(small, x), operations(built, x))
        print(f"{name}: {'the same operations' if apart is None else apart + '   NOT KEPT'}", flush=True)
    found = [
        measure(case, batches, rounds, 4 if options.quick else 7)
        for case in cases(options.quick)
        if case.name.startswith(options.only or "")
    ]

    def mean(name: str) -> float:
        return round(statistics.mean(statistics.median(values) for each in found for values in each[name]), 4)

    line = {
        "latency_gain_over_flops_gain": mean("random"),
        "chosen_latency_gain_over_flops_gain": mean("chosen"),
        "torch_pruning_latency_gain_over_flops_gain": mean("peer"),
        "predicted_latency_error": round(statistics.mean(value for each in found for value in each["off"]), 4),
        "closed_vs_removed_max_abs": max(each["closed"] for each in found),
        "reload_max_abs": max(each["reload"] for each in found),
    }
    print("\n" + json.dumps(line))


if __name__ == "__main__":
    main()
