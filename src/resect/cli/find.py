"""``resect find``."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from resect.cli.common import Model, Options, app, out, remark, say
from resect.errors import InputError, unknown

if TYPE_CHECKING:
    from resect.blocks.block import Blocks

KINDS = ("identity", "projection", "reshape")
PICTURES = (".svg", ".png", ".html")


@app.command()
def find(
    model: Model,
    option: Options = None,
    size: Annotated[int | None, typer.Option(min=1, help="height and width of the example image")] = None,
    kind: Annotated[str | None, typer.Option(help="only blocks with this shortcut: " + ", ".join(KINDS))] = None,
    part: Annotated[str | None, typer.Option(help="only blocks whose branch is attention, mlp or conv")] = None,
    stage: Annotated[int | None, typer.Option(min=1, help="only blocks of this stage, counted from 1")] = None,
    match: Annotated[str | None, typer.Option(help="only blocks whose name matches, for instance 'layer3.*'")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    graph: Annotated[Path | None, typer.Option(help="draw the chain of blocks: FILE.svg, .png or .html")] = None,
) -> None:
    """Find the residual blocks of a model.

    Example: [bold]resect find timm:resnet50 --kind identity --graph chain.svg[/bold]
    """
    if kind is not None and kind not in KINDS:
        raise unknown("kind of shortcut", kind, KINDS)
    if graph is not None and graph.suffix not in PICTURES:
        raise InputError(f"--graph {str(graph)!r} must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}.")
    import resect
    from resect.lab.open import open_model

    opened = open_model(model, option or ())
    found = resect.find_blocks(opened.model, opened.example(size))
    blocks = _chosen(found, kind, part, stage, match)
    if as_json:
        print(json.dumps(blocks.to_json(), indent=1))
    else:
        _show(opened.name, blocks, len(found))
    if graph is not None:
        _draw(opened.name, blocks, graph)
        (remark if as_json else say)(f"Picture: {graph}")


def _chosen(blocks: Blocks, kind: str | None, part: str | None, stage: int | None, match: str | None) -> Blocks:
    """Return the blocks that every filter lets through."""
    if stage is not None:
        blocks = blocks.stage(stage)
    if part is not None:
        blocks = blocks.part(part)
    if kind is not None:
        blocks = blocks.kind(kind)  # type: ignore[arg-type]
    return blocks if match is None else blocks.matching(match)


def _show(name: str, blocks: Blocks, of: int) -> None:
    """Print the table, as wide as the terminal; into a pipe whole, so that names can be searched for."""
    from resect.blocks import show

    if of and not blocks:
        say(f"{name}: none of its {show.count(of, 'residual block')} is meant.")
        return
    width = shutil.get_terminal_size().columns if out.is_terminal or "COLUMNS" in os.environ else 0
    chosen = f" ({len(blocks)} of {of} shown)" if len(blocks) < of else ""
    text = show.table(blocks, width, rows=None, heading=f"{name}: {show.summary(blocks)}{chosen}")
    for line in text.splitlines():
        style = "bold" if line.split()[:1] == ["#"] else "yellow" if line.endswith("refused:") else ""
        out.print(Text(line, style), soft_wrap=True)


def _draw(name: str, blocks: Blocks, to: Path) -> None:
    """Draw the chain of blocks into a file."""
    from resect.report.chain import chain, chain_rows
    from resect.report.figures import save_as

    if not blocks:
        raise InputError(f"There is no block of {name} to draw.")
    save_as(chain(chain_rows(name, blocks)), to)
