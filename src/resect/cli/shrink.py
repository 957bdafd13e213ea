"""``resect shrink``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from resect.cli.common import Data, DataOptions, Model, Options, app, err, need_blocks, remark, say, warned_of_random
from resect.errors import FileError, InputError, ResectError

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
_COMPACT = typer.Option(
    "--compact",
    help="also delete the layers of which nothing is left, and renumber the others: less to run, and the model's own "
    "class, built with fewer layers, loads it",
)
_RECOVER_BY = typer.Option(
    "--recover-by",
    help="distil: all training data, its labels and the uncut net's logits (the default); mimic: the uncut net's "
    "features on --limit samples, no labels",
)
_ROUNDS = typer.Option("--rounds", min=1, help="cut --blocks in so many rounds, and recover after each")
_SCRATCH = typer.Option(
    "--from-scratch",
    help="for the report, also train the shape that is left from new weights, by the run's recipe and for as long, "
    "into OUT-from-scratch",
)
_RESUME = typer.Option("--resume", help="with the rest of a command whose recovery was stopped: go on from there")
_UNIT = typer.Option(help="block or layer; default: layer where layers hold several blocks")


@app.command()
def shrink(
    model: Model,
    to: Annotated[Path | None, typer.Option("--out", help="folder for the cut model")] = None,
    n: Annotated[
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
    at_most_worse: Annotated[float | None, _WORSE] = None,
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
    compact: Annotated[bool, _COMPACT] = False,
    recover: Annotated[
        int,
        typer.Option("--recover", min=0, help="then train for so many epochs, the uncut net as teacher"),
    ] = 0,
    recover_by: Annotated[Literal["distil", "mimic"] | None, _RECOVER_BY] = None,
    rounds: Annotated[int, _ROUNDS] = 1,
    resume: Annotated[bool, _RESUME] = False,
    export: Annotated[Path | None, typer.Option(help="also write the cut model as FILE.onnx or FILE.pt2")] = None,
    report: Annotated[Path | None, typer.Option(help="also write a report with figures to this folder")] = None,
    scratch: Annotated[bool, _SCRATCH] = False,
    dry: Annotated[bool, typer.Option("--dry-run", help="say what to expect; cut and write nothing")] = False,
) -> None:
    """Cut blocks out of a trained model for good, prove that nothing else changed, and save it.

    Without a word on what shall go, a run trained with the ε-gate is cut by its own plan.json.

    Example: [bold]resect shrink runs/digits-epsilon --out cut[/bold]

    Four blocks, then three epochs of healing: [bold]resect shrink runs/full --blocks 4 --recover 3 --out cut[/bold]

    A little at a time: [bold]resect shrink runs/full --blocks 4 --rounds 2 --recover 3 --out cut[/bold]

    Faster by 30 %: [bold]resect shrink runs/vit --target-latency 0.7 --search greedy --dry-run[/bold]
    """
    import resect
    from resect.lab.display import progress_bar
    from resect.lab.interrupt import Interrupted
    from resect.lab.open import open_model, save_cut
    from resect.lab.shrink.choosing import check_fit, choose_plan, costs_of, expected
    from resect.lab.shrink.cutting import cut, cut_in_rounds
    from resect.lab.shrink.outcome import gone_now, outcome, record, told
    from resect.lab.shrink.unfinished import Unfinished
    from resect.lab.shrink.wishes import read_wishes
    from resect.lab.text import TextData
    from resect.report import theme

    wishes = read_wishes(
        fewer=fewer, target_latency=target_latency, keep=keep, names=names, plan=plan, out=to, export=export,
        report=report, scratch=scratch, dry=dry, n=n, at_most_worse=at_most_worse, by=by, search=search, unit=unit,
        limit=limit, replace=replace, compact=compact, recover=recover, recover_by=recover_by, rounds=rounds,
        resume=resume,
    )  # fmt: skip
    opened = open_model(model, option or (), data, data_option or ())
    if report and (opened.data is None or isinstance(opened.data, TextData)):
        raise InputError("--report is of test images: name some with --data, or leave it out.")
    if scratch and opened.recipe is None:
        raise InputError(f"--from-scratch trains by the recipe of a run, and {opened.name} comes without one.")
    blocks = resect.find_blocks(opened.model, opened.example())
    need_blocks(opened.name, blocks)
    warned_of_random(opened)
    check_fit(opened, blocks, wishes)

    if to is None or dry:
        with progress_bar(err) as display:
            chosen = choose_plan(opened, blocks, wishes, display, remark)
        say(str(chosen))
        for line in expected(opened, blocks, chosen, wishes):
            say(line)
        if rounds > 1:
            say("That is in one cut. In rounds, which blocks go is asked anew of what was healed.")
        say("A dry run: nothing was cut or written.")
        return
    kept = Unfinished.of(to, opened, wishes)
    if resume and not kept.plans:
        remark(f"Nothing was kept in {kept.folder}: this begins anew.")
    with progress_bar(err) as display:
        try:
            small = (cut_in_rounds if rounds > 1 else cut)(opened, blocks, wishes, kept, display, remark)
        except Interrupted as stopped:
            remark(f"{stopped} The same command with --resume goes on from there.")
            raise typer.Exit(130) from None
        except ResectError as error:
            if not (kept.trained or isinstance(error, FileError)):  # to go on would end here again
                kept.done()
            raise
    found = outcome(opened, small, limit)
    record(small, opened, found, wishes)
    save_cut(small, to, opened)
    kept.done()
    for line in told(opened, blocks, small, found, wishes):
        say(line)
    say(f"The cut model is in {to}.")
    if export:
        say(f"Exported and compared: {resect.export(small, export, example=opened.example())}.")
    if report:
        from resect.lab.scratch import from_scratch, scratch_folder
        from resect.lab.shrink.report import shrink_report

        with progress_bar(err) as display:
            gone = gone_now(opened.model, blocks, small)
            nets = {}
            if scratch and opened.recipe is not None:
                tell = display.training("from scratch", opened.recipe.train.batch_size)
                nets["from scratch"] = from_scratch(opened.recipe, gone, scratch_folder(to), tell)
            nets[f"cut, then {theme.plural(wishes.epochs, 'epoch')}" if recover else "cut"] = small
            costs = costs_of(opened, blocks)
            page = shrink_report(report, opened, blocks, gone, nets, block_costs=costs, say=display.steps)
        say(f"The report is {page}.")
