"""What all commands share: the app, the two consoles, arguments, opening a model with its blocks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import typer
    from rich.console import Console
except ModuleNotFoundError as missing:  # the core alone is installed
    sys.exit(f"The resect command needs the lab: pip install 'resect[lab]' ({missing}).")

from resect.cli.words import Commands
from resect.errors import InputError

app = typer.Typer(
    name="resect",
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console()
err = Console(stderr=True)


def say(text: str) -> None:
    """Print a part of the result as it is: for files and pipes its lines are whole, and brackets are no markup."""
    out.print(text, highlight=False, soft_wrap=True, markup=False)


def remark(text: str, style: str | None = None) -> None:
    """Print on stderr, as it is, what is not part of the result."""
    err.print(text, style=style, highlight=False, soft_wrap=True, markup=False)


Model = Annotated[
    str,
    typer.Argument(
        help="timm:NAME, torchvision:NAME, hf:NAME, cifar-resnet-110, cifar-preresnet-56, or a run's folder"
    ),
]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="key=value for building a model by name; repeatable")
]
Data = Annotated[
    str | None,
    typer.Option(
        help="digits, cifar10, cifar100, svhn, a parquet file, a folder of images, OWNER/NAME on the hub, or text:FILE "
        "for a language model; by default those a run was trained on"
    ),
]
DataOptions = Annotated[
    list[str] | None, typer.Option("--data-option", "-d", help="key=value for opening the data, size=32; repeatable")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="also write the measurements, and what is drawn, to this folder")
]
Format = Annotated[Literal["csv", "json", "parquet"], typer.Option("--format", help="of the measurements in --out")]


def with_blocks(
    model: str,
    option: list[str] | None,
    data: str | None,
    data_option: list[str] | None,
    limit: int | None,
    size: int = 128,
) -> tuple[Any, ...]:
    """Open a model, find its blocks, and read ``limit`` samples to test on in batches: (opened, blocks, batches)."""
    import resect
    from resect.lab.open import open_model
    from resect.lab.text import TextData

    opened = open_model(model, option or (), data, data_option or ())
    batches = opened.batches("test", limit, size)
    blocks = resect.find_blocks(opened.model, opened.example())
    need_blocks(opened.name, blocks)
    if not warned_of_random(opened) and opened.gated:
        remark("Trained with a gate, measured without: every block is open here.", "yellow")
    if isinstance(opened.data, TextData):
        count, length = opened.data.sequences.shape
        remark(f"{opened.data.name}: {count} sequences of {length} {opened.data.tokens}.")
    return opened, blocks, batches


def warned_of_random(opened: Any) -> bool:
    """Warn where a model's weights are random; returns whether they are."""
    random = opened.recipe is None and not opened.pretrained
    if random:
        remark(f"{opened.name} has random weights: the numbers say nothing about a trained model.", "yellow")
    return random


def need_blocks(name: str, blocks: Any) -> None:
    """Raise ``InputError``, with the reasons, if there is no block to work with."""
    if not blocks:
        reasons = "".join(f"\n  {refusal}" for refusal in blocks.refused)
        without = "" if reasons else " Of a net without shortcuts, resect lesion --layers deletes the layers."
        raise InputError(f"No residual block of {name} can be closed.{without}{reasons}")


def write_out(found: Any, folder: Path, format: str, about: dict[str, Any], seeds: Any = (), **options: Any) -> None:
    """Write what was found, with what is known ``about`` it, draw its figures, and say where they are."""
    from resect.report.draw import draw

    for path in draw(found, folder, format=format, seeds=seeds, about=about, **options):
        say(f"{'Figure' if path.suffix == '.png' else 'Measurements'}: {path}")


def of(opened: Any, batches: list[Any]) -> dict[str, Any]:
    """What provenance and figures say of a measurement: the model and the number of samples."""
    from resect.analyse.streams import samples_of

    return {"model": opened.label, "samples": sum(map(samples_of, batches))}
