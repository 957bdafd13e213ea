"""A trained CIFAR-10 ResNet at 2.1 times fewer FLOPs: cut by blocks, chosen in several ways, beside Torch-Pruning.

Every row starts from the same trained net, loses FLOPs, and is fine-tuned by the net's own recipe, for `--epochs`
epochs at `--lr`, with `--teacher` distilled from the uncut net meanwhile; `trained on` is the uncut net with the same
epochs and no teacher; `from scratch` is the shape that recoverability leaves, with new weights, for as many epochs as
the whole net had. `as fast as Torch-Pruning` loses only as many blocks, by recoverability, as bring it down to the time
that Torch-Pruning's net takes at batch 32, measured in turns.
`few: …` rows see 500 training images and no labels instead, as in PRACTISE: `resect.mimic` of the features before the
last layer; of the logits for Torch-Pruning, which changes the width of features. Images are
those of the run's recipe. Test accuracies are of the last epoch; no test image is used to choose anything.

Rows that are there already are kept, and one that was cut off goes on after its last epoch: start it again until all
are done. Latency is measured at the end, all nets in turns. Output: OUT/rows.json, OUT/table.md.

    python benchmarks/shrink_cifar.py RUN --out OUT      # RUN: the folder of a finished `resect train`
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shrink_peer import pruned
from torch import nn

import resect
from resect.blocks.cost import count_flops
from resect.files import write_text
from resect.lab import recipe as recipes
from resect.lab.evaluate import evaluate
from resect.lab.open import Opened, open_model
from resect.lab.recipe import Recipe
from resect.lab.runs import initial_state
from resect.lab.trainer import train
from resect.report.cost import count_parameters, latency

FEWER = 2.1
FEW = 500  # images


class Nets:
    """What every row starts from, and how it is cut."""

    def __init__(self, opened: Opened, images: int, steps: int, out: Path) -> None:
        self.as_fast = out / "as-fast.json"
        self.model, self.recipe, self.steps = opened.model, opened.recipe, steps
        self.data = opened.batches("train", images)
        self.few = opened.batches("train", FEW)
        self.test = opened.images("test")
        self.x = self.few[0][0][:1]
        self.blocks = resect.find_blocks(self.model, self.data[0][0][:32])
        self.flops = count_flops(self.model, self.x)
        self.plans: dict[str, resect.Plan] = {}
        self.costs = resect.block_costs(self.model, self.blocks, batches=())

    def plan(self, by: str, **options: Any) -> resect.Plan:
        """The blocks to go by a score; recoverability, PRACTISE's, sees 500 images and no labels."""
        key = f"{by} {options}"
        if key not in self.plans:
            data = self.few if by == "recoverability" else self.data
            given = {"metric": "cross_entropy"} if by == "lesion" else {}
            ranking = resect.rank(self.model, self.blocks, data, by=by, **given, **options)
            self.plans[key] = ranking.choose(fewer={"flops": 1 - 1 / FEWER}, costs=self.costs)
        print("  gone: " + ", ".join(block.owner for block in self.plans[key].blocks), flush=True)
        return self.plans[key]

    def cut(self, by: str, **options: Any) -> nn.Module:
        """The net without the blocks that a score names."""
        return resect.remove(self.model, self.blocks, self.plan(by, **options))

    def scratch(self) -> nn.Module:
        """The shape of `recoverability` with the weights that the training began with."""
        fresh = copy.deepcopy(self.model)
        fresh.load_state_dict(initial_state(self.recipe))
        return resect.remove(fresh, self.blocks, self.plan("recoverability").names)

    def as_fast_as_peer(self) -> nn.Module:
        """The net that loses the fewest blocks, by recoverability, of those that take at most the peer's time."""
        if self.as_fast.exists():  # a second measurement may end elsewhere, and the training could not go on
            return resect.remove(self.model, self.blocks, json.loads(self.as_fast.read_text()))
        ranking = resect.rank(self.model, self.blocks, self.few, by="recoverability")
        cuts = {str(n): resect.remove(self.model, self.blocks, ranking.choose(n)) for n in range(1, len(self.blocks))}
        nets = {"peer": self.peer(), **cuts}
        timed = latency({name: (net, self.test[0][:32]) for name, net in nets.items()}, batches=(32,))
        ms = {row["variant"]: row["median_ms"] for row in timed}
        print("  ms: " + ", ".join(f"{name} {took:.1f}" for name, took in ms.items()), flush=True)
        chosen = next(net for name, net in cuts.items() if ms[name] <= ms["peer"])
        write_text(self.as_fast, json.dumps(chosen.resect_plan.names))
        return chosen

    def peer(self) -> nn.Module:
        """The net that Torch-Pruning makes; the stream keeps its width where shortcuts pad it, as in the lab's nets.

        Its dependency graph cannot follow padded channels, so there the channels inside the branches go.
        """
        padded = any(block.shortcut == "reshape" for block in self.blocks)
        wide = [name for name, module in self.model.named_modules() if isinstance(module, nn.Conv2d)]
        inside = {name for name in wide if name.endswith("conv1") and name.startswith("layer")}
        keep = [name for name in wide if name not in inside] if padded else []
        return pruned(self.model, self.x, self.flops / FEWER, steps=12, keep=keep, round_to=None)

    def mimicked(self, small: nn.Module, at: str | None = None) -> nn.Module:
        """A cut net that has learnt the whole one's features on the few images."""
        resect.mimic(small, self.model, self.few, steps=self.steps, at=at)
        return small.eval()

    def rows(self, draws: int) -> dict[str, Callable[[], nn.Module]]:
        """How the net of each row is made."""
        partial = functools.partial
        return {
            "uncut": lambda: copy.deepcopy(self.model),
            "greedy lesion": partial(self.cut, "lesion", search="greedy"),
            "Torch-Pruning": self.peer,
            "recoverability": partial(self.cut, "recoverability"),
            "as fast as Torch-Pruning": self.as_fast_as_peer,
            "trained on": lambda: copy.deepcopy(self.model),
            "from scratch": self.scratch,
            "last": partial(self.cut, "last"),
            **{f"random {seed}": partial(self.cut, "random", seed=seed) for seed in range(draws)},
            "few: recoverability": lambda: self.mimicked(self.cut("recoverability")),
            "few: greedy lesion": lambda: self.mimicked(self.cut("lesion", search="greedy")),
            "few: as fast as Torch-Pruning": lambda: self.mimicked(self.as_fast_as_peer()),
            "few: Torch-Pruning": lambda: self.mimicked(self.peer(), at=last_linear(self.model)),
        }


def last_linear(model: nn.Module) -> str:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]


def finished(name: str, nets: Nets, make: Callable[[], nn.Module], tuning: Recipe, out: Path) -> dict[str, Any]:
    """One row: cut, tested, fine-tuned unless it is `uncut` or of few images, tested again; kept in ``out``."""
    folder = out / name.replace(":", "").replace(" ", "-")
    if (folder / "row.json").exists():
        return json.loads((folder / "row.json").read_text())
    print(name, flush=True)
    net = make()
    plan = getattr(net, "resect_plan", None)
    gone = None if name.removeprefix("few: ") == "Torch-Pruning" else plan.names if plan is not None else []
    row = {"row": name, "gone": gone, "parameters": count_parameters(net), "FLOPs": count_flops(net, nets.x),
           "before": 100 - evaluate(net, *nets.test)}  # fmt: skip
    row["after"] = row["before"]
    if name != "uncut" and not name.startswith("few"):
        recipe = nets.recipe if name == "from scratch" else tuning
        if name == "trained on":
            recipe = tuning.model_copy(update={"distill": None})
        done = train(
            recipe, folder, model=net, resume=True, progress=lambda now: now.row and print(now.row, flush=True)
        )
        row["after"] = 100 - done.history[-1]["test_error"]
    elif name.startswith("few"):
        row["before"] = None  # the net is made and mimicked in one go
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "row.json", json.dumps(row))
    print(json.dumps(row), flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", help="the folder of a trained net")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=8, help="of fine-tuning")
    parser.add_argument("--scratch-epochs", type=int, help="of `from scratch`; as many as the net had by default")
    parser.add_argument("--lr", type=float, default=0.02, help="of fine-tuning, at its height")
    parser.add_argument("--teacher", action="store_true", help="distil from the uncut net while fine-tuning")
    parser.add_argument("--draws", type=int, default=3, help="of random choice")
    parser.add_argument("--images", type=int, default=2000, help="of the training images, to choose by")
    parser.add_argument("--steps", type=int, default=1000, help="of mimicking, with 500 images")
    parser.add_argument("--rows", help="only these: greedy lesion,Torch-Pruning")
    options = parser.parse_args()
    torch.set_num_threads(1)
    opened = open_model(options.run)
    changed = opened.recipe.dump()
    changed["train"] |= {"epochs": options.epochs, "lr": options.lr}
    if options.teacher:
        changed["distill"] = {"teacher": options.run}
        changed["train"]["compile"] = False
    nets = Nets(opened, options.images, options.steps, options.out)
    if options.scratch_epochs:
        whole = opened.recipe.dump()
        whole["train"]["epochs"] = options.scratch_epochs
        nets.recipe = recipes.parse(whole)
    makers = nets.rows(options.draws)
    wanted = options.rows.split(",") if options.rows else list(makers)
    rows = [finished(name, nets, makers[name], recipes.parse(changed), options.out) for name in wanted]
    tell(rows, nets, options.out)


def shape(row: dict[str, Any], nets: Nets) -> nn.Module:
    """A net of a row's shape; its weights do not matter to its speed."""
    if row["gone"] is None:
        return nets.peer()
    return resect.remove(nets.model, nets.blocks, row["gone"]) if row["gone"] else nets.model


def tell(rows: list[dict[str, Any]], nets: Nets, out: Path) -> None:
    """Time the shapes in turns, and write the table."""
    shapes = {row["row"]: shape(row, nets).eval() for row in rows if not row["row"].startswith("few")}
    timed = latency({name: (net, nets.test[0][:32]) for name, net in shapes.items()}, batches=(1, 32))
    for row in rows:
        for time in timed:
            if time["variant"] == row["row"].removeprefix("few: "):
                row[f"ms, batch {time['batch']}"] = [round(time[key], 2) for key in ("median_ms", "low_ms", "high_ms")]
    write_text(out / "rows.json", json.dumps(rows, indent=1))
    lines = [
        "| | FLOPs | parameters | accuracy (%) | before recovery | ms, batch 1 | ms, batch 32 |",
        "|---|" + "---:|" * 6,
    ]
    for row in rows:
        times = [f"{row[key][0]} ({row[key][1]} … {row[key][2]})" if key in row else "–"
                 for key in ("ms, batch 1", "ms, batch 32")]  # fmt: skip
        before = "–" if row["before"] is None else f"{row['before']:.2f}"
        share = f"{nets.flops / row['FLOPs']:.2f} × fewer"
        lines.append(
            f"| {row['row']} | {share} | {row['parameters']:,} | {row['after']:.2f} | {before} | {' | '.join(times)} |"
        )
    write_text(out / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
