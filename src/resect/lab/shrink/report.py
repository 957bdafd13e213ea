"""The report of a cut: what it costs and buys, beside a random choice and the last blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import resect
from resect.blocks.block import Blocks
from resect.blocks.modes import kept_modes
from resect.blocks.plan import Plan
from resect.files import whole_folder
from resect.lab.evaluate import evaluate
from resect.lab.open import Opened
from resect.lab.shrink.ways import usable
from resect.report.chain import chain_rows
from resect.report.cost import count_flops
from resect.report.costs import costs
from resect.report.html import Section, write_data, write_report
from resect.report.provenance import provenance
from resect.shrink.costs import BlockCosts
from resect.shrink.ranking import Ranking

OWN = ("report.*", "data", "figures")
DRAWS = 3
"""Of random choice."""
STEPS = 8
"""Points of a curve, at most."""
Report = Callable[[str, int, int], None]


def shrink_report(
    folder: Path,
    opened: Opened,
    blocks: Blocks,
    plan: Plan,
    nets: Mapping[str, nn.Module],
    *,
    ranking: Ranking | None = None,
    block_costs: BlockCosts | None = None,
    batch: int = 32,
    limit: int | None = None,
    say: Report = lambda name, done, total: None,
) -> Path:
    """Measure a cut on test images and write the report to ``folder``; returns the path of its page.

    Args:
        opened: the uncut net, with images.
        plan: what was cut.
        nets: what came of it, in the order to show: "from scratch", "cut", "recovered". Titles are about the last.
        ranking: the choice, for its curve; without it the curve is of the plan's blocks, by and by, lowest score first.
        block_costs: measured milliseconds of blocks; without them the curves are against FLOPs alone.
        batch: of the milliseconds of the curves, one that ``block_costs`` holds.
        limit: test images, all without it.
    """
    images, labels = opened.images("test", limit)
    named = {"uncut": opened.model} | dict(nets)
    curves = _curves(opened.model, blocks, plan, ranking)
    rows = _trade(opened.model, blocks, curves, images, labels, block_costs, batch, say)
    say("ways to run tried", 0, 1)
    ways, missing = usable(opened.model, images[:1])
    say("ways to run tried", 1, 1)
    table = costs(named, images[:1], batches=(1, batch), ways=ways)
    count = len(opened.data.classes)  # type: ignore[union-attr]
    errors = {name: class_errors(net, images, labels, count) for name, net in named.items()}
    whole = count_flops(opened.model, images[:1])
    scale = block_costs.latency((), batch)[0] / _of(table, "uncut", batch)["median_ms"] if block_costs else 0.0
    for name, net in nets.items():
        time = _of(table, name, batch)
        rows.append({"choice": name, "removed": len(plan.blocks), "draw": 0, "error": errors[name][0],
                     "ms": scale * time["median_ms"] if block_costs else None,
                     "flops": count_flops(net, images[:1]) / 1e6})  # fmt: skip
    gone = set(plan.names)
    chain = [row | {"gone": row["name"] in gone} for row in chain_rows(opened.name, blocks)]
    latency = [{key: row[key] for key in ("net", "way", "batch", "median_ms", "low_ms", "high_ms")} for row in table]
    classes = [
        {"label": label, "net": name, "error": error}
        for place, label in enumerate(opened.data.classes)  # type: ignore[union-attr]
        for name, (_, each) in errors.items()
        if (error := each[place]) is not None
    ]
    summary = [
        {"net": name, "error (%)": 100 * errors[name][0], "parameters": mine["parameters"],
         "FLOPs (M)": mine["flops"] / 1e6, "activations (kB)": mine["activation_bytes"] / 1e3,
         "latency, batch 1 (ms)": mine["median_ms"],
         f"throughput, batch {batch} (images/s)": _of(table, name, batch)["per_second"]}
        for name in named for mine in [_of(table, name, 1)]
    ]  # fmt: skip
    with whole_folder(folder, own=OWN) as work:
        figures = {"cut_trade": rows, "chain": chain, "cut_classes": classes, "cut_latency": latency}
        for name, data in figures.items():
            write_data(work, name, data)
        last = list(nets)[-1]
        share = 1 - _of(table, last, 1)["median_ms"] / _of(table, "uncut", 1)["median_ms"]
        highlights = [
            (f"{-100 * share:+.0f} %".replace("-", "−"), "latency at batch 1"),
            (f"−{100 * (1 - count_flops(nets[last], images[:1]) / whole):.0f} %", "FLOPs"),
            (f"{100 * (errors[last][0] - errors['uncut'][0]):+.2f} points".replace("-", "−"), "test error"),
        ]
        title = f"{opened.name} without {len(gone)} of its {len(blocks)} blocks"
        sections = _sections(summary, list(nets), missing, batch)
        write_report(work, title, _told(plan), sections, provenance(images=len(labels)), highlights)
    return folder / "report.html"


def class_errors(model: nn.Module, images: Tensor, labels: Tensor, count: int) -> tuple[float, list[float | None]]:
    """Top-1 error as a fraction, over all images and of each of ``count`` classes; None for one without images."""
    device = next(model.parameters()).device
    with kept_modes(model), torch.no_grad():
        model.eval()
        found = torch.cat([model(part.to(device)).argmax(1).cpu() for part in images.split(256)])
    wrong = (found != labels).double()
    classes = [wrong[labels == label] for label in range(count)]
    return float(wrong.mean()), [float(part.mean()) if len(part) else None for part in classes]


def _of(table: list[dict[str, Any]], net: str, batch: int) -> dict[str, Any]:
    return next(row for row in table if (row["net"], row["batch"], row["way"]) == (net, batch, "eager"))


def _curves(model: nn.Module, blocks: Blocks, plan: Plan, ranking: Ranking | None) -> dict[str, list[list[Any]]]:
    """Per choice its draws, each a list of sets of names that grow: ours, the last, random ones."""
    unit = ranking.unit if ranking is not None else plan.evidence.get("unit", "block")
    rankings = {} if ranking is None else {_name(ranking): [ranking]}
    rankings["last"] = [resect.rank(model, blocks, by="last", unit=unit)]  # type: ignore[arg-type]
    rankings["random"] = [resect.rank(model, blocks, by="random", unit=unit, seed=seed) for seed in range(DRAWS)]  # type: ignore[arg-type]
    curves: dict[str, list[list[Any]]] = {}
    if ranking is None:
        names = sorted(plan.names, key=lambda name: plan.scores.get(name, 0.0))
        curves[f"this plan, by {plan.by}"] = [[names[:n] for n in sorted({0, *_counts(len(names))})]]
    for name, several in rankings.items():
        longest = min(len(several[0].ladder), max(2, round(1.5 * len(plan.blocks))))
        curves[name] = [[[], *(one.names(one.ladder[n - 1].units) for n in _counts(longest))] for one in several]
    return curves


def _counts(most: int) -> list[int]:
    """Whole numbers from 1 to ``most``, evenly spread."""
    return sorted({max(1, round(step * most / STEPS)) for step in range(1, STEPS + 1)})


def _name(ranking: Ranking) -> str:
    return ranking.by if ranking.search == "once" else f"{ranking.by}, {ranking.search}"


def _trade(
    model: nn.Module, blocks: Blocks, curves: Mapping[str, list[list[Any]]], images: Tensor, labels: Tensor,
    block_costs: BlockCosts | None, batch: int, say: Report,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of error against cost: every set of every curve closed, and tested."""
    sets = [
        (name, draw, gone) for name, draws in curves.items() for draw, several in enumerate(draws) for gone in several
    ]
    whole, known, rows = count_flops(model, images[:1]), dict[frozenset[str], float](), []
    share = {block.name: block.flops / max(1, blocks.flops) for block in blocks}
    for done, (name, draw, gone) in enumerate(sets):
        say("nets tested", done, len(sets))
        key = frozenset(gone)
        if key not in known:
            with resect.closed(model, blocks.select(gone)):
                known[key] = evaluate(model, images, labels) / 100
        rows.append({"choice": name, "removed": len(gone), "draw": draw, "error": known[key],
                     "ms": block_costs.latency(gone, batch)[0] if block_costs else None,
                     "flops": whole * (1 - sum(share[block] for block in gone)) / 1e6})  # fmt: skip
    say("nets tested", len(sets), len(sets))
    return rows


def _told(plan: Plan) -> str:
    return (
        f"Cut out, chosen by {plan.by}: {', '.join(plan.names)}. The shortcuts stay. "
        "Errors are on test images; nothing was chosen on them."
    )


def _sections(summary: list[dict[str, Any]], nets: list[str], missing: Mapping[str, str], batch: int) -> list[Section]:
    best = {name: "low" for name in summary[0] if name != "net"}
    best = {name: "high" if name.startswith("throughput") else "low" for name in best}
    return [
        Section("What it costs and buys", "", table=summary, best=best,
                note="Activations: the most memory that results take at once during a pass of one image."
                + " No cut shape was trained from scratch, which is often as good." * ("from scratch" not in nets)),
        Section("Error against speed", f"Milliseconds are of batches of {batch}: on the lines predicted from "
                "measured blocks; single nets stand at their measured share of the uncut one. Nothing on lines is "
                "retrained.", figure="cut_trade"),
        Section("What went", "", figure="chain"),
        Section("Class by class", "", figure="cut_classes"),
        Section("Measured latency", "", figure="cut_latency",
                note=" ".join(f"Not measured {name}: {reason.rstrip('.')}." for name, reason in missing.items())),
    ]  # fmt: skip
