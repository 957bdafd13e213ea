"""``resect report`` and ``resect demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resect.cli.common import app, err, say


@app.command()
def report(
    source: Annotated[
        Path, typer.Argument(help="a folder of resect demo, or measurements that --out wrote: a file or their folder")
    ],
) -> None:
    """Draw a report, or the figures of measurements, again from their data.

    Example: [bold]resect report resect-demo[/bold]
    """
    from resect.report.figures import redraw_measurements
    from resect.report.html import redraw

    if source.is_dir() and (source / "report.json").is_file():
        say(f"Report: {redraw(source)}")
        return
    for picture in redraw_measurements(source):
        say(f"Figure: {picture}")


@app.command()
def demo(
    to: Annotated[Path, typer.Option("--out", help="folder for the report")] = Path("resect-demo"),
    epochs: Annotated[int, typer.Option(min=1, help="of training")] = 25,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    full: Annotated[bool, typer.Option(help="5-fold cross-validation over all digits instead")] = False,
) -> None:
    """Run the main job on real data: find, train, lesion, cut, prove, report. About 3 minutes on 2 cores.

    Example: [bold]resect demo --out my-report[/bold]
    """
    from resect.lab.demo.crossval import cross_validate
    from resect.lab.demo.run import demo as run
    from resect.lab.display import progress_bar

    with progress_bar(err) as display:
        page = (cross_validate if full else run)(to, display, epochs=epochs, seed=seed)
    say(f"Report: {page}")
