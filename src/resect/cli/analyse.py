"""``resect lesion``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from resect.cli.common import Data, DataOptions, Format, Model, Options, Out, app, err, out, with_blocks, write_out


@app.command()
def lesion(
    model: Model,
    option: Options = None,
    data: Data = None,
    data_option: DataOptions = None,
    counts: Annotated[str, typer.Option("--random", help="numbers of blocks to close at random: 1,2,4")] = "",
    draws: Annotated[int, typer.Option(min=1, help="draws for each of them")] = 10,
    metric: Annotated[str, typer.Option(help="top1, top5 (errors in %) or cross_entropy")] = "top1",
    limit: Annotated[int | None, typer.Option(min=1, help="use this many test images")] = None,
    seed: Annotated[int, typer.Option(help="of the random draws")] = 0,
    to: Out = None,
    format: Format = "csv",
) -> None:
    """Close each block of a trained model and measure (Veit et al. 2016).

    Example: [bold]resect lesion runs/digits-plain --random 1,2,4,8[/bold]
    """
    import resect
    from resect.lab.display import progress_bar
    from resect.lab.open import whole_numbers

    opened, blocks, batches = with_blocks(model, option, data, data_option, limit)
    with progress_bar(err) as display:
        study = resect.lesion_study(
            opened.model,
            blocks,
            batches,
            metric=metric,
            random_counts=whole_numbers(counts),
            draws=draws,
            seed=seed,
            progress=partial(display.steps, "lesions"),
        )
    out.print(str(study), highlight=False)
    if to:
        write_out(to, "lesion", study.rows(), format, [seed], model=opened.name)
