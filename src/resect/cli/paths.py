"""``resect paths``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from resect.cli.common import Data, DataOptions, Format, Model, Options, Out, app, err, out, with_blocks, write_out


@app.command()
def paths(
    model: Model,
    option: Options = None,
    data: Data = None,
    data_option: DataOptions = None,
    samples: Annotated[int, typer.Option(min=0, help="single paths drawn per length; 0: the exact curve alone")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="test images")] = 64,
    at: Annotated[str, typer.Option(help="where: first (what enters the first block), input, or a block")] = "first",
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    to: Out = None,
    format: Format = "csv",
) -> None:
    """Count a model's paths by length, and split its gradient by path length (Veit et al. 2016).

    Example: [bold]resect paths runs/digits-plain --samples 50[/bold]
    """
    from rich.table import Table
    from torch import nn

    import resect
    from resect.lab.display import progress_bar

    opened, blocks, batches = with_blocks(model, option, data, data_option, batch, batch)
    with progress_bar(err) as display:
        found = resect.path_gradients(
            opened.model,
            blocks,
            batches[0],
            nn.functional.cross_entropy,
            at=at,
            samples=samples,
            seed=seed,
            progress=partial(display.steps, "paths"),
        )
    table = Table(box=None, pad_edge=False)
    for column in ("branches", "paths", "norm of sum (exact)", "sum of norms (sampled)", "95 % interval"):
        table.add_column(column, justify="right")
    for row in found.rows():
        sampled = (f"{row['sum_of_norms']:.4g}", f"{row['low']:.4g} … {row['high']:.4g}") if samples else ("", "")
        table.add_row(f"{row['length']:g}", f"{row['paths']:.4g}", f"{row['norm_of_sum']:.4g}", *sampled)
    out.print(table)
    if to:
        write_out(to, "paths", found.rows(), format, [seed], model=opened.name)
