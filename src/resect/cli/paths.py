"""``resect paths``."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import typer

from resect.cli.common import (
    Data,
    DataOptions,
    Format,
    Model,
    Options,
    Out,
    app,
    err,
    of,
    out,
    say,
    with_blocks,
    write_out,
)


@app.command()
def paths(
    model: Model,
    option: Options = None,
    data: Data = None,
    data_option: DataOptions = None,
    samples: Annotated[int | None, typer.Option(min=0, help="single paths drawn per length; default: 1000")] = None,
    exact_only: Annotated[bool, typer.Option("--exact-only", help="draw none: the exact curve alone")] = False,
    max_length: Annotated[int | None, typer.Option(min=0, help="tell lengths apart up to this one")] = None,
    carriers: Annotated[bool, typer.Option("--blocks", help="also: which blocks carry the gradient")] = False,
    initial: Annotated[bool, typer.Option("--initial", help="also with the weights the run began with")] = False,
    batch: Annotated[int, typer.Option(min=1, help="test samples")] = 64,
    at: Annotated[str, typer.Option(help="where: first (what enters the first block), input, or a block")] = "first",
    seed: Annotated[int | None, typer.Option(help="of the draws; default: 0")] = None,
    to: Out = None,
    format: Format = "csv",
) -> None:
    """Count a model's paths by length, and split its gradient by path length (Veit et al. 2016).

    Example: [bold]resect paths runs/digits-plain --samples 50 --blocks[/bold]
    """
    from torch import nn

    import resect
    from resect.errors import InputError
    from resect.lab.display import progress_bar
    from resect.lab.runs import initial_state

    if exact_only and (samples or seed is not None):
        raise InputError("--exact-only draws no paths: leave out --samples and --seed.")
    samples, seed = 0 if exact_only else 1000 if samples is None else samples, seed or 0
    opened, blocks, batches = with_blocks(model, option, data, data_option, batch, batch)
    if initial and (opened.recipe is None or hasattr(opened.model, "resect_plan")):
        raise InputError("--initial needs the folder of a run, of a net that is whole: its recipe draws the weights.")
    states = {"initialisation": initial_state(opened.recipe)} if initial else {}
    states |= {"as it is": opened.model.state_dict()}
    # Mappings are text: the model computes the loss from its labels.
    loss_fn = None if isinstance(batches[0], dict) else nn.functional.cross_entropy
    with progress_bar(err) as display:
        found = resect.path_gradients_by_state(
            opened.model,
            blocks,
            batches[0],
            states,
            loss_fn,
            at=at,
            samples=samples,
            max_length=max_length,
            seed=seed,
            progress=partial(display.steps, "paths"),
        )
        through = None
        if carriers:
            steps = partial(display.steps, "blocks")
            through = resect.block_gradients(opened.model, blocks, batches[0], loss_fn, at=at, progress=steps)
    for when, one in found.items():
        if initial:
            say(f"\n{when}:")
        _print_lengths(one)
    if through is not None:
        _print_blocks(through)
    if to:
        about = of(opened, batches) | {"at": at}
        write_out(found, to, format, about, [seed])
        if through is not None:
            write_out(through, to, format, about, [seed])


def _print_lengths(found: Any) -> None:
    """Print a table by path length, and the effective lengths in a sentence."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    sampled = len(found.sum_of_norms) > 0
    columns = ["branches", "paths", "norm of sum (exact)"]
    for column in [*columns, *(["sum of norms (sampled)", "95 % interval", "coherence"] if sampled else [])]:
        table.add_column(column, justify="right", no_wrap=column == "95 % interval")
    for row in found.rows():
        cells = [
            f"{'≥ ' * row.get('longer', False)}{row['length']}",
            f"{row['paths']:.4g}",
            f"{row['norm_of_sum']:.4g}",
        ]
        if "sum_of_norms" in row:
            cells += [f"{row['sum_of_norms']:.4g}", f"{row['low']:.3g} … {row['high']:.3g}", f"{row['coherence']:.3g}"]
        table.add_row(*cells)
    out.print(table)
    if found.max_length is None:
        wanted = [("norm_of_sum", "Norm of the sum"), ("sum_of_norms", "Sum of the norms")]
        for quantity, name in wanted[: 1 + sampled]:
            say(f"{name}: {_said(found.effective(quantity))}")


def _said(effective: Any) -> str:
    text = str(effective)
    return text[0].lower() + text[1:]


def _print_blocks(through: Any) -> None:
    """Print what comes through each block's branch and past it."""
    from rich.table import Table

    say("\nThe gradient through each branch, and past it:")
    table = Table(box=None, pad_edge=False)
    table.add_column("block")
    for column in ("through", "past", "share"):
        table.add_column(column, justify="right")
    for row in through.rows():
        table.add_row(row["name"], *(f"{row[column]:.4g}" for column in ("through", "past", "share")))
    out.print(table)
