"""One recipe trained by every method with several seeds, and what came of it in one table and one figure.

    python -m resect.lab.reproduce cifar10-resnet20 --seeds 0,1,2 --out cifar10 data.options.path=FOLDER

Runs that are there already are kept, those that were cut off go on: start it again until all are done.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from resect.analyse.interval import interval
from resect.blocks.plan import Plan
from resect.errors import ResectError
from resect.files import write_text
from resect.lab import recipe as recipes
from resect.lab.display import progress_bar
from resect.lab.jobs import Job, pool
from resect.lab.open import whole_numbers
from resect.report.figures import save
from resect.report.removal import removal
from resect.report.rows import write_rows

METHODS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "stochastic depth": {"name": "stochastic-depth", "blocks": "identity", "recalibrate": 100},
    "ResidualDroppath": {"name": "residual-droppath", "blocks": "identity", "recalibrate": 100},
    "ε-ResNet": {"name": "epsilon-gate", "epsilon": 2.5, "side": 0.1},
}


def jobs(recipe: str, changes: list[str], seeds: list[int], out: Path) -> list[Job]:
    """One job per seed and method, seed by seed, so that a part of them is a comparison already."""
    plain = recipes.read(recipe, changes).dump()
    return [
        Job(f"{name}, seed {seed}", plain | {"method": method, "train": plain["train"] | {"seed": seed}},
            out / f"{name.replace(' ', '-')}-{seed}", removals=True)
        for seed in seeds for name, method in METHODS.items()
    ]  # fmt: skip


def collect(out: Path) -> list[dict[str, Any]]:
    """A row per finished run in ``out``: method, seed, error in %, images/s of its fastest epoch, blocks muted.

    The fastest epoch, because others may have shared the machine with something else.
    """
    rows = []
    for file in sorted(out.glob("*/metrics.json")):
        recipe = json.loads((file.parent / "recipe.json").read_text())
        chosen = (recipe["method"] or {}).get("name")
        name = next(name for name, table in METHODS.items() if (table or {}).get("name") == chosen)
        removed = json.loads((file.parent / "removal.json").read_text())
        plan = file.parent / "plan.json"
        row = {"method": name, "seed": recipe["train"]["seed"], "error": 100 * removed[0]["error"]}
        row |= {"images_per_second": _fastest(file.parent / "history.csv"), "removal": removed}
        rows.append(row | {"muted": len(Plan.load(plan).blocks) if plan.is_file() else None})
    order = list(METHODS)
    return sorted(rows, key=lambda row: (order.index(row["method"]), row["seed"]))


def _fastest(history: Path) -> float:
    with history.open(newline="", encoding="utf-8") as file:
        return max(float(row["images_per_second"]) for row in csv.DictReader(file))


def table(rows: list[dict[str, Any]]) -> str:
    """The runs as a Markdown table: a row per method, its seeds, their mean and standard deviation."""
    head = (
        "method",
        "test error, % by seed",
        "mean ± s.d.",
        "minus plain, paired (95 %)",
        "images/s, fastest epoch",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    plain = {row["seed"]: row for row in rows if row["method"] == "plain"}
    for name in METHODS:
        mine = [row for row in rows if row["method"] == name]
        if not mine:
            continue
        errors = [row["error"] for row in mine]
        spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
        pairs = [row["error"] - plain[row["seed"]]["error"] for row in mine if row["seed"] in plain and name != "plain"]
        low, high = interval(pairs) if len(pairs) > 1 else (0.0, 0.0)
        difference = f"{statistics.fmean(pairs):+.2f}" if pairs else ""
        difference += f" ({low:+.2f} … {high:+.2f})" if len(pairs) > 1 else ""
        speed = max(row["images_per_second"] for row in mine)
        each = ", ".join(f"{row['error']:.2f}" for row in mine)
        lines.append(f"| {name} | {each} | {statistics.fmean(errors):.2f}{spread} | {difference} | {speed:.0f} |")
    return "\n".join(lines) + "\n"


def write(out: Path) -> str:
    """Write table.md, runs.csv and the figure of the finished runs in ``out``; returns the table."""
    rows = collect(out)
    text = table(rows)
    curves = [{"net": row["method"], "removed": point["removed"], "draw": 100 * row["seed"] + point["draw"],
               "error": point["error"]} for row in rows for point in row["removal"]]  # fmt: skip
    write_text(out / "table.md", text)
    write_rows(out / "runs.csv", [{key: row[key] for key in row if key != "removal"} for row in rows])
    write_rows(out / "removal.csv", curves)
    save(removal(curves), out, "removal")
    return text


def main(
    recipe: Annotated[str, typer.Argument(help="a recipe without a method")],
    changes: Annotated[list[str] | None, typer.Argument(help="key=value")] = None,
    seeds: Annotated[str, typer.Option(help="0,1,2")] = "0,1,2",
    out: Annotated[Path, typer.Option(help="folder of all runs")] = Path("reproduced"),
    workers: Annotated[int, typer.Option(min=1, help="trainings at a time, one thread each")] = 2,
) -> None:
    """Train a recipe by every method with several seeds, two at a time, and tabulate what came of it."""
    wanted = jobs(recipe, changes or [], whole_numbers(seeds), out)
    waiting = [job for job in wanted if not (job.folder / "removal.json").is_file()]
    with progress_bar(Console(stderr=True)) as display, pool(workers, display.steps) as running:
        for future in [running.submit(job) for job in waiting]:
            future.result()
    print(write(out))


if __name__ == "__main__":
    try:
        typer.run(main)
    except ResectError as error:
        sys.exit(f"Error: {error}")
