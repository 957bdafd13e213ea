"""``resect reuse``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from resect.cli.common import Data, DataOptions, Format, Options, Out, app, err, of, out, remark, with_blocks, write_out

if TYPE_CHECKING:
    from resect import BlockResponse


@app.command()
def reuse(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="timm:NAME, torchvision:NAME, hf:NAME, cifar-resnet-110, or runs' folders, together",
        ),
    ],
    option: Options = None,
    data: Data = None,
    data_option: DataOptions = None,
    limit: Annotated[int, typer.Option(min=1, help="use this many test samples")] = 1000,
    batch: Annotated[int, typer.Option(min=1, help="samples run at once")] = 64,
    epsilon: Annotated[float, typer.Option(min=0, help="of the gate, for strict identity")] = 2.5,
    batch_sizes: Annotated[str, typer.Option(help="on which the gate decides")] = "1,16,64,256",
    gradient: Annotated[bool, typer.Option(help="also the cosine with the negative gradient of the loss")] = True,
    probes: Annotated[bool, typer.Option(help="also linear probes by depth")] = True,
    pool: Annotated[
        Literal["auto", "mean", "last"],
        typer.Option(help="a stream as one vector: mean over places, or the last token"),
    ] = "auto",
    to: Out = None,
    format: Format = "csv",
) -> None:
    """Look at what each block does to the stream: size, direction, likeness between depths, strict identity.

    Several models are laid over each other: two training methods, or before and after.

    Example: [bold]resect reuse runs/plain runs/droppath --out reuse[/bold]
    """
    import resect
    from resect.analyse.strict import closed_share
    from resect.lab.display import progress_bar
    from resect.lab.open import whole_numbers

    sizes = whole_numbers(batch_sizes)
    closed_share({}, epsilon, sizes)  # what is wrong with them is said before the work
    ready = [with_blocks(name, option, data, data_option, limit, batch) for name in models]
    nets: dict[str, BlockResponse] = {}
    for (opened, blocks, batches), net in zip(ready, net_names(models), strict=True):
        with progress_bar(err) as display:
            found = resect.block_response(
                opened.model,
                blocks,
                batches,
                gradient=gradient,
                probes=probes,
                pool=None if pool == "auto" else pool,
                progress=partial(display.steps, net),
            )
        _show(net, found, epsilon, sizes)
        nets[net] = found
    if to:
        about = of(opened, batches) | {"model": ", ".join(one.label for one, _, _ in ready)}
        write_out(nets, to, format, about, epsilon=epsilon, batch_sizes=sizes)


def net_names(models: list[str]) -> list[str]:
    """What each model is called in tables and figures: the last part of its path, or all of it where that is not one.

    A model that is named twice gets a number.
    """
    short = [Path(name).name or name for name in models]
    names = [last if short.count(last) == 1 else name for last, name in zip(short, models, strict=True)]
    return [f"{name} {names[:place].count(name) + 1}" if names.count(name) > 1 else name
            for place, name in enumerate(names)]  # fmt: skip


def _show(net: str, found: BlockResponse, epsilon: float, sizes: list[int]) -> None:
    """Print a net's table."""
    from rich.table import Table

    title = f"{net}: {found.samples} samples, {'mean over places' if found.pool == 'mean' else 'last token'}"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    table.add_column("block", overflow="fold")
    heads = ["size", "angle", "down", "turn", "probe", "max|f|", *(f"@{size}" for size in sizes)]
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    closed = found.closed_rows(epsilon, sizes)
    for place, row in enumerate(found.rows()):
        name = row["name"]
        depth = found.depths.index(name) if name in found.depths else None  # of parallel branches the last one
        turned = None if depth is None else 180 * float(found.distance[depth - 1, depth])
        probe = 100 * float(found.probes[depth]) if depth is not None and len(found.probes) else None
        shares = [f"{100 * item['closed']:.0f}" for item in closed if item["index"] == place]
        table.add_row(
            name,
            *(
                _cell(row[f"{key}_mean"], form)
                for key, form in (("ratio", ".3g"), ("angle", ".0f"), ("descent", ".3f"))
            ),
            _cell(turned, ".1f"),
            _cell(probe, ".0f"),
            f"{float(found.largest[name].max()):.3g}",
            *shares,
        )
    out.print(table)
    out.print(
        "size: of the branch, its shortcut being 1; angle: to the shortcut, in degrees; down: cosine with the negative "
        "gradient; turn: of the stream, in degrees; probe: % right after the block; @N: % of batches of N on which a "
        f"gate at ε = {epsilon:g} closes it.",
        style="dim",
    )
    for name, reason in found.left_out.items():
        remark(f"Left out: {name}: {reason}.", "yellow")


def _cell(value: float | None, form: str) -> str:
    return "—" if value is None or value != value else f"{value:{form}}"
