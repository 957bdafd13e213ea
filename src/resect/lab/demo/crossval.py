"""The README's statistics: 5-fold cross-validation over all 1,797 digits, in paired differences."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import resect
from resect.analyse.interval import interval
from resect.blocks.plan import Plan
from resect.files import whole_folder
from resect.lab import recipe as recipes
from resect.lab import runs
from resect.lab.config.method import EpsilonGateConfig
from resect.lab.data import mean_std, normalize
from resect.lab.demo.findings import Display
from resect.lab.evaluate import evaluate
from resect.lab.jobs import Job, pool
from resect.report.cost import count_parameters
from resect.report.html import Section, write_report
from resect.report.provenance import provenance

FOLDS = 5


def cross_validate(folder: Path, display: Display, *, epochs: int = 25, seed: int = 0) -> Path:
    """Train plain, gated and from-scratch nets on each fold; report paired differences with 95 % intervals."""
    with whole_folder(folder, own=("report.*", "metrics.json", "gated-*", "plain-*", "scratch-*")) as work:
        rows = []
        display.stage(f"Train {3 * FOLDS} nets, two at a time")
        with pool(2, display.steps) as jobs:
            started = {}
            for fold in range(FOLDS):
                gated = recipes.read("digits-epsilon", _changes(epochs, seed, fold))
                plain = gated.dump() | {"method": None}
                started[fold] = [
                    jobs.submit(Job(f"fold {fold}, gated", gated.dump(), work / f"gated-{fold}")),
                    jobs.submit(Job(f"fold {fold}, plain", plain, work / f"plain-{fold}")),
                ]
            for fold, futures in started.items():
                futures[0].result()
                plan = work / f"gated-{fold}" / "plan.json"
                if Plan.load(plan).blocks:
                    plain = recipes.read("digits-epsilon", _changes(epochs, seed, fold)).dump() | {"method": None}
                    job = Job(f"fold {fold}, from scratch", plain, work / f"scratch-{fold}", plan)
                    futures.append(jobs.submit(job))
            for fold, futures in started.items():
                for future in futures:
                    future.result()
                rows.append(_fold(work, fold))
        (work / "metrics.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        write_report(
            work,
            "Cut by the ε-gate: five folds of the digits",
            f"{FOLDS}-fold cross-validation over all 1,797 digits, {epochs} epochs each; differences paired by fold.",
            [
                Section("Every fold", "Test error in %, one row a fold.", table=rows),
                Section(
                    "Paired differences",
                    "Mean over the folds with a 95 % interval (Student's t).",
                    table=differences(rows),
                ),
            ],
            provenance([seed], epochs=epochs),
        )
    return folder / "report.html"


def _changes(epochs: int, seed: int, fold: int) -> list[str]:
    split = f"data.options={{ folds = {FOLDS}, fold = {fold} }}"
    return [f"train.epochs={epochs}", f"train.seed={seed}", "train.tensorboard=false", split]


def _fold(work: Path, fold: int) -> dict[str, Any]:
    gated, recipe, data = runs.open_run(work / f"gated-{fold}")
    stats = mean_std(data.train)
    images, labels = normalize(data.test.images, *stats), data.test.labels
    blocks = resect.find_blocks(gated, normalize(data.train.images[:64], *stats))
    plan = Plan.load(work / f"gated-{fold}" / "plan.json")
    plain, _, _ = runs.open_run(work / f"plain-{fold}")
    row: dict[str, Any] = {"fold": fold, "plain": evaluate(plain, images, labels)}
    assert isinstance(recipe.method, EpsilonGateConfig)
    with resect.EpsilonGate(gated, blocks, epsilon=recipe.method.epsilon, muted_at_start="allow"):
        row["gated (ε)"] = evaluate(gated, images, labels)
    if plan.blocks:
        cut = resect.remove(gated, blocks, plan)
        row["cut"] = evaluate(cut, images, labels)
        row["cut shape from scratch"] = _last_error(work / f"scratch-{fold}")
        row["blocks cut"] = len(plan.blocks)
        row["parameters (%)"] = 100 * count_parameters(cut) / count_parameters(plain)
    return row


def _last_error(folder: Path) -> float:
    return float(json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["test_error"])


def differences(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and 95 % interval of paired differences in test error (points), where every fold has both."""
    pairs = [
        ("gated (ε)", "plain"),
        ("cut", "plain"),
        ("cut shape from scratch", "plain"),
        ("cut shape from scratch", "cut"),
    ]
    table = []
    for a, b in pairs:
        if all(a in row and b in row for row in rows):
            values = [row[a] - row[b] for row in rows]
            low, high = interval(values)
            table.append(
                {"difference": f"{a} − {b}", "mean (points)": statistics.fmean(values), "low": low, "high": high}
            )
    return table
