"""``resect lesion``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from resect.cli.common import Data, DataOptions, Format, Model, Options, Out, app, err, of, say, with_blocks, write_out
from resect.errors import InputError

_RANDOM = typer.Option("--random", help="numbers of blocks to close at random: 1,2,4")
_RUNS = typer.Option("--runs", help="lengths of runs of neighbouring blocks to close: 2,4")
_BY = typer.Option("--by", help="groups to close as a whole: stage,part,layer,kind")
_GREEDY = typer.Option("--greedy", help="close one block after the other, always the one missed least")
_DEPTH = typer.Option("--depth", min=1, help="stop --greedy after so many")
_PAIRS = typer.Option("--pairs", help="close every pair: do blocks depend on each other?")
_SWAPS = typer.Option("--swaps", help="numbers of random swaps of layers built alike: 1,2,4,8")
_PATHS = typer.Option("--paths", help="random sub-networks of so many open branches, and ensembles of them: 4,8,16")
_DRAWS = typer.Option("--draws", min=1, help="random draws of each kind; default: 10")
_METRIC = typer.Option(help="top1, top5 (errors in %), cross_entropy or perplexity; default: top1, for text perplexity")
_STORE = typer.Option("--store", help="keep what is finished here; given again, an interrupted study goes on")
_LAYERS = typer.Option("--layers", help="a net without shortcuts: delete each layer that keeps its input's shape")
_BESIDE = typer.Option("--beside", help="a net without shortcuts, in the same figure: each of its layers deleted")

_OPTIONS = {"random_counts": "--random", "runs": "--runs", "groups": "--by", "greedy": "--greedy", "pairs": "--pairs",
            "swaps": "--swaps", "paths": "--paths"}  # fmt: skip
Plain = tuple[Any, list[Any]]


@app.command()
def lesion(
    model: Model,
    option: Options = None,
    data: Data = None,
    data_option: DataOptions = None,
    each: Annotated[bool, typer.Option("--each/--no-each", help="close each block alone")] = True,
    counts: Annotated[str, _RANDOM] = "",
    runs: Annotated[str, _RUNS] = "",
    by: Annotated[str, _BY] = "",
    greedy: Annotated[bool, _GREEDY] = False,
    depth: Annotated[int | None, _DEPTH] = None,
    pairs: Annotated[bool, _PAIRS] = False,
    swaps: Annotated[str, _SWAPS] = "",
    paths: Annotated[str, _PATHS] = "",
    layers: Annotated[bool, _LAYERS] = False,
    beside: Annotated[str | None, _BESIDE] = None,
    draws: Annotated[int | None, _DRAWS] = None,
    metric: Annotated[str | None, _METRIC] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="use this many test samples")] = None,
    seed: Annotated[int, typer.Option(help="of the random draws")] = 0,
    store: Annotated[Path | None, _STORE] = None,
    to: Out = None,
    format: Format = "csv",
) -> None:
    """Close blocks of a trained model, or swap its layers, and measure (Veit et al. 2016). Nothing is retrained.

    Example: [bold]resect lesion runs/digits-plain --random 1,2,4,8[/bold]

    The paper's figures: [bold]resect lesion runs/digits-plain --random 1,2,5,10 --swaps 1,2,4,8 --out figures[/bold]

    A language model: [bold]resect lesion hf:gpt2 --data text:book.txt --by part --greedy --depth 4[/bold]

    Beside a net without shortcuts: [bold]resect lesion runs/plain --beside runs/no-shortcuts --out figures[/bold]

    Without shortcuts alone: [bold]resect lesion torchvision:vgg11_bn --data cifar10 --layers[/bold]
    """
    from resect.lab.open import TEXT, whole_numbers
    from resect.report.measurements import Measurements

    if depth is not None and not greedy:
        raise InputError("--depth is about --greedy, which is not given.")
    wanted: dict[str, Any] = {
        "each": each,
        "random_counts": whole_numbers(counts),
        "runs": whole_numbers(runs),
        "groups": [name.strip() for name in by.split(",") if name.strip()],
        "greedy": depth or greedy,
        "pairs": pairs,
        "swaps": whole_numbers(swaps),
        "paths": whole_numbers(paths),
    }
    if draws is not None and not (counts or swaps or paths):
        raise InputError("--draws is about --random, --swaps and --paths, none of which is given.")
    if beside and (layers or not each):
        raise InputError(
            f"--beside is about closing each block alone: leave out {'--layers' if layers else '--no-each'}."
        )
    others = [option for key, option in _OPTIONS.items() if wanted[key]]
    if layers and (others or not each):
        raise InputError(f"--layers deletes each layer and nothing else: leave out {', '.join(others) or '--no-each'}.")
    if not (layers or each or others):
        raise InputError(f"--no-each leaves nothing to measure. Ask for another study: {', '.join(_OPTIONS.values())}.")
    text = data is not None and data.startswith(TEXT)
    metric = metric or ("perplexity" if text else "top1")
    if layers:
        if store:
            raise InputError("--store keeps closed blocks, and --layers deletes layers: leave one of them out.")
        found, about = _without_shortcuts(_plain(model, option, data, data_option, limit), metric)
    else:
        net_beside = _plain(beside, None, data, data_option, limit) if beside else None  # opened before the work
        # A batch of a language model's outputs is large: every token has a number for every word.
        draws = draws or 10
        opened, blocks, batches = with_blocks(model, option, data, data_option, limit, 8 if text else 128)
        found = _study(opened.model, blocks, batches, metric=metric, draws=draws, seed=seed, store=store, **wanted)
        about = of(opened, batches)
        say(str(found))
        if net_beside is not None:
            other, of_other = _without_shortcuts(net_beside, metric)
            rows = [*found.rows(), *(row | {"net": of_other["model"], "stage": None} for row in other.rows)]
            found = Measurements("lesion", rows, {})
    if to:
        write_out(found, to, format, about, [seed])


def _study(*arguments: Any, **wanted: Any) -> Any:
    import resect
    from resect.lab.display import progress_bar

    with progress_bar(err) as display:
        return resect.lesion_study(*arguments, **wanted, progress=partial(display.steps, "lesions"))


def _plain(model: str, option: Any, data: str | None, data_option: Any, limit: int | None) -> Plain:
    """Open a net without shortcuts, some of whose layers can be deleted: (opened, batches)."""
    from resect.lab.contrast import layers_to_delete
    from resect.lab.open import open_model

    opened = open_model(model, option or (), data, data_option or ())
    batches = opened.batches("test", limit, 128)
    layers_to_delete(opened.model, batches[0])
    return opened, batches


def _without_shortcuts(plain: Plain, metric: str) -> tuple[Any, dict[str, Any]]:
    from resect.lab.contrast import delete_each_layer
    from resect.lab.display import progress_bar
    from resect.report.measurements import Measurements

    opened, batches = plain
    with progress_bar(err) as display:
        rows = delete_each_layer(opened.model, batches, metric, partial(display.steps, "layers"))
    whole = f"{opened.label}: {metric} of the whole model {rows[0]['baseline']:.4g}; with one layer deleted:"
    say(whole)
    for row in rows:
        say(f"  {row['label']:<32} {row['change']:+.4g}")
    return Measurements("lesion", rows, {}), of(opened, batches)
