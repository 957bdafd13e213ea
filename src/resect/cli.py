"""The ``resect`` command."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError as missing:  # the core alone is installed
    sys.exit(f"The resect command needs the lab: pip install 'resect[lab]' ({missing}).")

from resect.errors import InputError, ResectError

app = typer.Typer(
    name="resect",
    help="Find, train, analyse and cut the residual blocks of PyTorch models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
out = Console()
err = Console(stderr=True)

Model = Annotated[
    str, typer.Argument(help="cifar-resnet-110, cifar-preresnet-56, timm:NAME, torchvision:NAME, or a run's folder")
]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", help="key=value for building a model by name; repeatable")
]
Data = Annotated[str | None, typer.Option(help="data for a model by name: digits or cifar10")]
Out = Annotated[Path | None, typer.Option("--out", help="also write the measurements as CSV to this folder")]


@app.command()
def find(
    model: Model,
    option: Options = None,
    size: Annotated[int | None, typer.Option(min=1, help="height and width of the example image")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Find the residual blocks of a model.

    Example: [bold]resect find timm:resnet50[/bold]
    """
    import resect
    from resect.lab.open import open_model

    opened = open_model(model, option or ())
    blocks = resect.find_blocks(opened.model, opened.example(size))
    if as_json:
        print(json.dumps(blocks.to_json(), indent=1))
        return
    out.print(f"[bold]{opened.name}[/bold]: {blocks.summary()}")
    table = Table("name", "shortcut", "part", "modules", box=None, pad_edge=False)
    table.add_column("parameters", justify="right")
    for block in blocks:
        inside = " ".join(name.removeprefix(f"{block.owner}.") for name in block.modules)
        table.add_row(block.name, block.shortcut, block.part, inside, f"{block.parameters:,}")
    if blocks:
        out.print(table)
    for refusal in blocks.refused:
        out.print("[yellow]refused[/yellow]", str(refusal))


@app.command()
def train(
    recipe: Annotated[
        str, typer.Argument(help="a recipe that ships (digits-plain, …), a TOML file, or a run to resume")
    ],
    changes: Annotated[list[str] | None, typer.Argument(help="key=value, for instance train.epochs=3")] = None,
    to: Annotated[Path | None, typer.Option("--out", help="the run's folder (default: runs/RECIPE)")] = None,
    resume: Annotated[bool, typer.Option(help="go on from the run's last checkpoint")] = False,
) -> None:
    """Train a net by a recipe, with or without a training method on its residual blocks.

    Example: [bold]resect train digits-epsilon train.epochs=10 --out runs/epsilon[/bold]
    """
    from resect.lab import runs
    from resect.lab.display import progress_bar
    from resect.lab.interrupt import Interrupted
    from resect.lab.jobs import write_plan
    from resect.lab.trainer import train as run

    folder, wanted = runs.wanted(recipe, changes or (), to, resume)
    again = shlex.join(["resect", "train", str(folder), "--resume"])
    with progress_bar(err) as display:
        tell = display.training(wanted.model.name, wanted.train.batch_size)
        try:
            result = run(wanted, folder, resume=resume, interruptible=True, progress=tell, say=err.print)
        except Interrupted as stopped:
            err.print(f"{stopped} Go on with:\n  {again}", soft_wrap=True, highlight=False)
            raise typer.Exit(130) from None
    write_plan(result, wanted)
    out.print(f"Test error {result.history[-1]['test_error']:.2f} %. The run is in {folder}.")


@app.command()
def lesion(
    model: Model,
    option: Options = None,
    data: Data = None,
    counts: Annotated[str, typer.Option("--random", help="numbers of blocks to close at random: 1,2,4")] = "",
    draws: Annotated[int, typer.Option(min=1, help="draws for each of them")] = 10,
    metric: Annotated[str, typer.Option(help="top1, top5 (errors in %) or cross_entropy")] = "top1",
    limit: Annotated[int | None, typer.Option(min=1, help="use this many test images")] = None,
    seed: Annotated[int, typer.Option(help="of the random draws")] = 0,
    to: Out = None,
) -> None:
    """Close each block of a trained model and measure (Veit et al. 2016).

    Example: [bold]resect lesion runs/digits-plain --random 1,2,4,8[/bold]
    """
    import resect
    from resect.lab.data import in_batches
    from resect.lab.display import progress_bar
    from resect.lab.open import whole_numbers
    from resect.report.rows import write_rows

    opened, blocks, images, labels = _with_blocks(model, option, data, limit)
    with progress_bar(err) as display:
        study = resect.lesion_study(
            opened.model,
            blocks,
            in_batches(images, labels, 128),
            metric=metric,
            random_counts=whole_numbers(counts),
            draws=draws,
            seed=seed,
            progress=partial(display.steps, "lesions"),
        )
    out.print(str(study), highlight=False)
    if to:
        out.print(f"Measurements: {write_rows(to / 'lesion.csv', study.rows())}")


@app.command()
def paths(
    model: Model,
    option: Options = None,
    data: Data = None,
    samples: Annotated[int, typer.Option(min=0, help="single paths drawn per length; 0: the exact curve alone")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="test images")] = 64,
    at: Annotated[str, typer.Option(help="where: first (what enters the first block), input, or a block")] = "first",
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    to: Out = None,
) -> None:
    """Count a model's paths by length, and split its gradient by path length (Veit et al. 2016).

    Example: [bold]resect paths runs/digits-plain --samples 50[/bold]
    """
    from torch import nn

    import resect
    from resect.lab.display import progress_bar
    from resect.report.rows import write_rows

    opened, blocks, images, labels = _with_blocks(model, option, data, batch)
    with progress_bar(err) as display:
        found = resect.path_gradients(
            opened.model,
            blocks,
            (images, labels),
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
        out.print(f"Measurements: {write_rows(to / 'paths.csv', found.rows())}")


@app.command()
def shrink(
    model: Model,
    to: Annotated[Path, typer.Option("--out", help="folder for the cut model")],
    number: Annotated[int | None, typer.Option("--blocks", min=1, help="cut this many, those missed least")] = None,
    names: Annotated[str | None, typer.Option(help="cut these: layer3.4,layer3.5")] = None,
    plan: Annotated[Path | None, typer.Option(help="cut what this plan.json says")] = None,
    option: Options = None,
    data: Data = None,
    limit: Annotated[int, typer.Option(min=1, help="rank on this many training images")] = 1000,
) -> None:
    """Cut blocks out of a trained model for good, prove that nothing else changed, and save it.

    Without --blocks, --names or --plan, a run trained with the ε-gate is cut by its own plan.json.

    Example: [bold]resect shrink runs/digits-epsilon --out cut[/bold]
    """
    import resect
    from resect.lab.display import progress_bar
    from resect.lab.evaluate import evaluate
    from resect.lab.open import choose_plan, open_model, save_cut

    opened = open_model(model, option or (), data)
    blocks = resect.find_blocks(opened.model, opened.example())
    _need_blocks(opened.name, blocks)
    with progress_bar(err) as display:
        chosen = choose_plan(opened, blocks, number, names, plan, limit, display)
    small = resect.remove(opened.model, blocks, chosen)
    save_cut(small, to, opened)
    out.print(str(chosen), highlight=False)
    before, after = (sum(p.numel() for p in net.parameters()) for net in (opened.model, small))
    out.print(f"Parameters: {before:,} → {after:,} ({after / before - 1:+.1%}). Proven equal to the closed model.")
    if opened.data is not None:
        images, labels = opened.test_images()
        a, b = evaluate(opened.model, images, labels), evaluate(small, images, labels)
        how = " with every block open, without its gate" if opened.gated else ""
        out.print(f"Test error: {a:.2f} %{how} → {b:.2f} %.")
    out.print(f"The cut model is in {to}.")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="a folder written by resect demo")]) -> None:
    """Draw a report again from its data.

    Example: [bold]resect report resect-demo[/bold]
    """
    from resect.report.html import redraw

    out.print(f"Report: {redraw(folder)}")


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
    from resect.lab.crossval import cross_validate
    from resect.lab.demo import demo as run
    from resect.lab.display import progress_bar

    with progress_bar(err) as display:
        page = (cross_validate if full else run)(to, display, epochs=epochs, seed=seed)
    out.print(f"Report: {page}")


def _with_blocks(model: str, option: list[str] | None, data: str | None, limit: int | None) -> tuple[Any, ...]:
    import resect
    from resect.lab.open import open_model

    opened = open_model(model, option or (), data)
    images, labels = opened.test_images(limit)
    blocks = resect.find_blocks(opened.model, opened.example())
    _need_blocks(opened.name, blocks)
    if opened.recipe is None:
        err.print(f"[yellow]{opened.name} has random weights: the numbers say nothing about a trained model.[/yellow]")
    elif opened.gated:
        err.print("[yellow]Trained with a gate, measured without: every block is open here.[/yellow]")
    return opened, blocks, images, labels


def _need_blocks(name: str, blocks: Any) -> None:
    if not blocks:
        raise InputError(f"No residual block of {name} can be closed." + "".join(f"\n  {r}" for r in blocks.refused))


def main() -> None:
    """Run the command; a mistake of the user's ends in one message and exit code 1, Ctrl-C in 130."""
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.showwarning = lambda message, *_: err.print("[yellow]Warning:[/yellow]", Text(str(message)))
    try:
        app()
    except ResectError as error:
        _fail(error)
    except SystemExit as leaving:
        if leaving.code == 130:  # Ctrl-C, which typer turns into this
            err.print("Interrupted.")
        raise
    except OSError as error:
        _fail(f"{error.strerror or error}: {error.filename}" if error.filename else error)


def _fail(error: object) -> None:
    err.print("[bold red]Error:[/bold red]", Text(str(error)), highlight=False, soft_wrap=True)
    sys.exit(1)
