"""``resect shrink``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resect.cli.common import Data, DataOptions, Model, Options, app, err, need_blocks, out, warned_of_random
from resect.errors import InputError

_FEWER = typer.Option("--fewer", help="the share to lose at least: latency=0.3,flops=0.2,parameters=0.1")
_LATENCY = typer.Option(
    "--target-latency", help="the share of latency to be left, measured here at batch 1 and 32: 0.7"
)
_WORSE = typer.Option(
    "--at-most-worse",
    help="points of error (of text: of perplexity) that it may cost before recovery, measured on the images (the text) "
    "that it is ranked on, for training: on others it may cost more",
)
_BY = typer.Option(help="lesion, influence, angle, size, taylor, recoverability, random or last")
_SEARCH = typer.Option(help="once, greedy (scored again after each cut), beam, or runs of neighbours")
_UNIT = typer.Option(help="block or layer; default: layer where layers hold several blocks")


@app.command()
def shrink(
    model: Model,
    to: Annotated[Path | None, typer.Option("--out", help="folder for the cut model")] = None,
    number: Annotated[
        int | None,
        typer.Option(
            "--blocks",
            min=1,
            help="cut this many units, those missed least: blocks, or layers where layers hold several (of a ViT, 2 "
            "blocks each); see --unit",
        ),
    ] = None,
    fewer: Annotated[str, _FEWER] = "",
    target_latency: Annotated[float | None, _LATENCY] = None,
    worse: Annotated[float | None, _WORSE] = None,
    keep: Annotated[str, typer.Option(help="never cut these: layer1.0,layer2.0")] = "",
    by: Annotated[str, _BY] = "lesion",
    search: Annotated[str, _SEARCH] = "once",
    unit: Annotated[str | None, _UNIT] = None,
    names: Annotated[str | None, typer.Option(help="cut these: layer3.4,layer3.5")] = None,
    plan: Annotated[Path | None, typer.Option(help="cut what this plan.json, or that of this folder, says")] = None,
    option: Options = None,
    data: Data = None,
    data_option: DataOptions = None,
    limit: Annotated[int, typer.Option(min=1, help="rank, and fit, on this many training images")] = 1000,
    replace: Annotated[bool, typer.Option("--replace", help="fit a linear map in the place of what is cut")] = False,
    epochs: Annotated[
        int,
        typer.Option("--recover", min=0, help="then train for so many epochs, the uncut net as teacher"),
    ] = 0,
    export: Annotated[Path | None, typer.Option(help="also write the cut model as FILE.onnx or FILE.pt2")] = None,
    report: Annotated[Path | None, typer.Option(help="also write a report with figures to this folder")] = None,
    dry: Annotated[bool, typer.Option("--dry-run", help="say what to expect; cut and write nothing")] = False,
) -> None:
    """Cut blocks out of a trained model for good, prove that nothing else changed, and save it.

    Without a word on what shall go, a run trained with the ε-gate is cut by its own plan.json.

    Example: [bold]resect shrink runs/digits-epsilon --out cut[/bold]

    Four blocks, then three epochs of healing: [bold]resect shrink runs/full --blocks 4 --recover 3 --out cut[/bold]

    Faster by 30 %: [bold]resect shrink runs/vit --target-latency 0.7 --search greedy --dry-run[/bold]
    """
    import resect
    from resect.blocks.plan import Plan
    from resect.integrations.export import format_of
    from resect.lab.choosing import choose_plan, expected, read_wishes
    from resect.lab.display import progress_bar
    from resect.lab.open import open_model, save_cut
    from resect.lab.outcome import flops_told, outcome, record, told
    from resect.lab.text import TextData
    from resect.report import theme

    if export:
        format_of(export)
    wishes = read_wishes(
        fewer, target_latency, keep, number=number, names=names, plan=plan, worse=worse, by=by, search=search,
        unit=unit, limit=limit,
    )  # fmt: skip
    if to is None and not dry:
        raise InputError("Where shall the cut model go? Give --out FOLDER, or --dry-run to see what to expect.")
    opened = open_model(model, option or (), data, data_option or ())
    if report and (opened.data is None or isinstance(opened.data, TextData)):
        raise InputError("--report is of test images: name some with --data, or leave it out.")
    blocks = resect.find_blocks(opened.model, opened.example())
    need_blocks(opened.name, blocks)
    warned_of_random(opened)
    with progress_bar(err) as display:
        chosen = choose_plan(opened, blocks, wishes, display, lambda line: err.print(line, highlight=False))
    if to is None or dry:
        out.print(str(chosen), highlight=False)
        for line in expected(opened, blocks, chosen, limit):
            out.print(line, highlight=False)
        out.print("A dry run: nothing was cut or written.")
        return
    if replace:
        small = resect.replace(opened.model, blocks, chosen, opened.batches("train", limit), samples=limit)
    else:
        small = resect.remove(opened.model, blocks, chosen)
    if epochs:
        from resect.lab.recovering import recover

        with progress_bar(err) as display:
            recover(small, opened, epochs, progress=lambda done, total: display.steps("recovered", done, total))
    found = outcome(opened, small, limit)
    record(small, opened, found, epochs)
    save_cut(small, to, opened)
    out.print(str(chosen), highlight=False)
    before, after = (sum(p.numel() for p in net.parameters()) for net in (opened.model, small))
    healed = f" Then trained for {theme.plural(epochs, 'epoch')}." if epochs else ""
    proof = healed if replace else f" Proven equal to the closed model.{healed}"
    out.print(f"Parameters: {before:,} → {after:,} ({after / before - 1:+.1%}).{proof}")
    out.print(flops_told(opened, small))
    done: Plan = small.resect_plan  # type: ignore[assignment]
    for run in done.evidence.get("replaced", {}).values():
        where = f"merged into {run['merged_into']}" if run["merged_into"] else "one linear layer kept"
        distance = f"{run['error_removed']:.3g} without it, {run['error']:.3g} with it"
        out.print(f"In the place of {', '.join(run['blocks'])}: {where}; distance from the uncut net {distance}.")
    others = ["--recover 3"] * (not epochs) + ["--replace"] * (not replace) + ["resect.mimic in Python"]
    for line in told(opened, found, limit, " or ".join(others)):
        out.print(line)
    out.print(f"The cut model is in {to}.")
    if export:
        out.print(f"Exported and compared: {resect.export(small, export, example=opened.example())}.")
    if report:
        from resect.lab.choosing import costs_of
        from resect.lab.shrink_report import shrink_report

        with progress_bar(err) as display:
            costs = costs_of(opened, blocks)
            name = f"cut, then {theme.plural(epochs, 'epoch')}" if epochs else "cut"
            page = shrink_report(report, opened, blocks, chosen, {name: small}, block_costs=costs, say=display.steps)
        out.print(f"The report is {page}.")
