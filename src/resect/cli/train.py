"""``resect train``."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from resect.cli.common import app, err, remark, say


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="a recipe that ships (digits-plain, …), a TOML file, or a run to resume")
    ],
    changes: Annotated[list[str] | None, typer.Argument(help="key=value, for instance train.epochs=3")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="the run's folder (default: runs/RECIPE)")] = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="begin with the model in this folder: a run, or a cut model")
    ] = None,
    resume: Annotated[bool, typer.Option(help="go on from the run's last checkpoint")] = False,
) -> None:
    """Train a net by a recipe, with or without a training method on its residual blocks.

    Example: [bold]resect train digits-epsilon train.epochs=10 --out runs/epsilon[/bold]

    A cut net, taught by the uncut one: [bold]resect train digits-plain --from cut distill.teacher=runs/full[/bold]
    """
    from resect.lab import runs
    from resect.lab.display import progress_bar
    from resect.lab.interrupt import Interrupted
    from resect.lab.jobs import write_plan
    from resect.lab.memory import keep_freed_memory
    from resect.lab.trainer import train as run

    keep_freed_memory()
    first = os.environ.get("RANK", "0") == "0"  # of several processes one speaks
    told = remark if first else lambda _: None
    folder, wanted = runs.wanted(recipe, changes or (), to, resume, start)
    again = shlex.join(["resect", "train", str(folder), "--resume"])
    with progress_bar(err if first else Console(quiet=True)) as display:
        tell = display.training(wanted.model.name, wanted.train.batch_size)
        try:
            result = run(wanted, folder, resume=resume, interruptible=True, progress=tell, say=told)
        except Interrupted as stopped:
            told(f"{stopped} Go on with:\n  {again}")
            raise typer.Exit(130) from None
    if first:
        write_plan(result, wanted)
        say(f"Test error {result.history[-1]['test_error']:.2f} %. The run is in {folder}.")
