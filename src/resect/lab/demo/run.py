"""The main job, end to end on real data: find, train, lesion, cut, prove, report."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from torch import Tensor

import resect
from resect.blocks.plan import Plan
from resect.files import whole_folder
from resect.lab import recipe as recipes
from resect.lab import runs
from resect.lab.data import ImageData, mean_std, normalize
from resect.lab.data import load as load_data
from resect.lab.demo import story
from resect.lab.demo.findings import Display, Findings, Nets
from resect.lab.demo.speed import measure_speed
from resect.lab.demo.study import study_contrasts, study_plain
from resect.lab.demo.weigh import cut_and_prove
from resect.lab.jobs import Job, pool
from resect.lab.recipe import Recipe
from resect.lab.reuse import spiral_rows
from resect.report.html import write_data, write_report
from resect.report.provenance import provenance

OWN = ("report.*", "metrics.json", "data", "figures", "runs", "cut")
METHODS = ("plain", "stochastic-depth", "residual-droppath", "gated")
NETS = (*METHODS, "contrast-shortcuts", "contrast-none", "from-scratch")


def demo(folder: Path, display: Display, *, epochs: int = 25, seed: int = 0) -> Path:
    """Run the main job and write its report and artefacts to ``folder``; returns the report's path.

    The folder appears whole at the end, or not at all.
    """
    with whole_folder(folder, own=OWN) as work:
        found = Findings()
        display.stage("Find the blocks of a ResNet-50 and a ViT, and time them with half the blocks closed")
        measure_speed(found, display)
        nets = train_nets(work, found, display, epochs, seed)
        display.stage("Cut, prove, save, reload, measure")
        cut_and_prove(work, nets, found)
        display.stage("Draw the report")
        for name, rows in found.figures.items():
            write_data(work, name, rows)
        (work / "metrics.json").write_text(json.dumps(found.numbers, indent=1), encoding="utf-8")
        title, summary, sections, highlights = story.tell(found)
        write_report(work, title, summary, sections, provenance([seed], epochs=epochs), highlights)
    return folder / "report.html"


def train_nets(work: Path, found: Findings, display: Display, epochs: int, seed: int) -> Nets:
    """Train the nets, two at a time: four methods at equal steps, two contrasts, the cut shape from scratch.

    The plain net is studied while the last of them train.
    """
    options = [f"train.epochs={epochs}", f"train.seed={seed}", "train.tensorboard=false"]
    gated = recipes.read("digits-epsilon", options)
    plain = recipes.parse(gated.dump() | {"method": None})
    small = {"widths": [8, 16, 32]}
    contrasts = {
        name: plain.dump() | {"model": {"name": "cifar-preresnet-20", "options": small | {"shortcuts": shortcuts}}}
        for name, shortcuts in (("contrast-shortcuts", True), ("contrast-none", False))
    }
    data = load_data(plain.data.name, **plain.data.options)
    stats = mean_std(data.train)
    folders = {name: work / "runs" / name for name in NETS}
    display.stage("Train 54 blocks by four methods at equal steps, two nets of 9 blocks, the cut shape from scratch")
    with pool(2, display.steps) as jobs:
        futures = {
            name: jobs.submit(Job(name, trained.dump(), folders[name], removals=True))
            for name, trained in (("gated", gated), ("plain", plain))
        }
        figures, found.tables["spiral"] = spiral_rows(seed)
        found.figures |= figures
        futures["gated"].result()
        plan_file = folders["gated"] / "plan.json"
        if Plan.load(plan_file).blocks:
            futures["from-scratch"] = jobs.submit(Job("from-scratch", plain.dump(), folders["from-scratch"], plan_file))
        for name in ("residual-droppath", "stochastic-depth"):
            method = recipes.read(f"digits-{name}", options).dump()
            futures[name] = jobs.submit(Job(name, method, folders[name], removals=True))
        for name, contrast in contrasts.items():
            futures[name] = jobs.submit(Job(name, contrast, folders[name]))
        futures["plain"].result()
        nets = _opened(plain, data, stats, folders)
        display.stage("Lesions and paths of the plain net")
        study_plain(nets, found, display)
        for name in ("contrast-shortcuts", "contrast-none"):
            futures[name].result()
        study_contrasts(nets, found)
        display.stage("Wait for the training that is left")
        for future in futures.values():
            future.result()
    history = {name: _history(folders[name]) for name in futures}
    found.figures["training"] = [
        {"net": story.NAMES[name], "epoch": int(row["epoch"]), "train_loss": float(row["train_loss"]),
         "test_error": float(row["test_error"]) / 100, "muted": int(float(row["muted"])) if row.get("muted") else None}
        for name in (*METHODS, "from-scratch") if name in history
        for row in history[name]
    ]  # fmt: skip
    found.figures["removal"] = [
        {"net": story.NAMES[name]} | row
        for name in METHODS
        for row in json.loads((folders[name] / "removal.json").read_text(encoding="utf-8"))
    ]
    return nets


def _opened(recipe: Recipe, data: ImageData, stats: tuple[Tensor, Tensor], folders: dict[str, Path]) -> Nets:
    plain, _, _ = runs.open_run(folders["plain"])
    gated, _, _ = runs.open_run(folders["gated"])
    images = normalize(data.test.images, *stats)
    example = normalize(data.train.images[:64], *stats)
    blocks = resect.find_blocks(gated, example)
    plan = Plan.load(folders["gated"] / "plan.json")
    return Nets(recipe, data, images, data.test.labels, example, folders, plain, gated, blocks, plan)


def _history(folder: Path) -> list[dict[str, str]]:
    with (folder / "history.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
