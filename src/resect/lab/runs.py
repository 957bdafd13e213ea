"""The folder of a run: model.safetensors, recipe.json, history.csv, metrics.json, and the last checkpoint."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import resect
from resect.errors import FileError, InputError, ResectError, check_all, quoted
from resect.files import read_tensors, write_bytes
from resect.lab import checkpoint
from resect.lab.data import Data, open_data
from resect.lab.recipe import Recipe, differences, parse, read
from resect.lab.registry import build, fit_options
from resect.lab.tree import flatten
from resect.shrink.files import PLAN, plan_document, plan_of

FORMAT = "resect-run-1"
FILES = ("model.safetensors", PLAN, "recipe.json", "history.csv", "metrics.json")
"""What `finish` writes; the plan only of a cut net."""


def build_model(recipe: Recipe, data: Data) -> nn.Module:
    """The recipe's model, with the channels and classes of ``data`` unless the recipe gives them."""
    fitting = fit_options(recipe.model.name, data.shape[0], len(data.classes))
    try:
        return build(recipe.model.name, **fitting | recipe.model.options)
    except InputError as error:
        if not recipe.model.options:
            raise
        given = ", ".join(recipe.model.options)
        raise InputError(f"{error} The recipe gives it {given}; model.options={{}} leaves that out.") from error


def starting_model(recipe: Recipe, data: Data) -> nn.Module:
    """The recipe's model as training begins: freshly drawn, or what ``model.start`` says.

    Raises:
        InputError: the folder holds another model than the recipe's.
        FileError: it holds none, or a damaged one.
    """
    model = build_model(recipe, data)
    if recipe.model.start is None:
        return model
    folder = Path(recipe.model.start)
    if (folder / "base.json").is_file():
        return resect.load(folder, model)
    started, other, _ = open_run(folder)
    if other.model.name != recipe.model.name:
        raise InputError(f"{folder} holds a {other.model.name}, and the recipe trains a {recipe.model.name}.")
    return started


def started_from(recipe: Recipe, folder: Path) -> Recipe:
    """``recipe`` for the model in a folder, that of a run or a cut one, to begin from there.

    Raises:
        FileError: the folder does not say what its model was built from.
    """
    file = next((folder / name for name in ("base.json", "recipe.json") if (folder / name).is_file()), None)
    if file is None:
        raise FileError(
            f"{str(folder)!r} is no run, and no model cut from one: it has neither recipe.json nor base.json. "
            "`resect train` and `resect shrink` write such folders."
        )
    model = parse(_read_json(file), str(file)).model.model_dump()
    return parse({**recipe.dump(), "model": {**model, "start": str(folder)}})


@contextmanager
def run_folder(folder: Path) -> Iterator[None]:
    """Make ``folder`` for a training; one that fails before it wrote anything leaves no folder behind.

    Raises:
        FileError: something in the way is no folder, or it must not be made.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"Cannot make the run folder {folder}: {error.strerror}.") from error
    try:
        yield
    except BaseException:
        with suppress(OSError):  # the first that is not empty ends it
            for path in new:
                path.rmdir()
        raise


def begin(folder: Path, recipe: Recipe, resume: bool) -> dict[str, Any] | None:
    """The state to continue from, or None for a new run in ``folder``.

    Raises:
        InputError: the folder holds a run already and ``resume`` is False, or holds one of another recipe; or it has
            files that the run would overwrite, and no checkpoint to go on from.
        FileError: the checkpoint is damaged.
    """
    last = checkpoint.newest(folder)
    if last is None:
        there = [name for name in FILES if (folder / name).exists()]
        if there:
            raise InputError(
                f"{folder} holds {quoted(there)}, which a new run would overwrite, and no checkpoint to go on from: "
                "choose another folder, or delete them."
            )
        return None
    if not resume:
        raise InputError(f"{folder} holds a run already: resume it (--resume), choose another folder, or delete it.")
    saved = checkpoint.load(last)
    changes = list(differences(_recipe_in(last, saved).settled(), recipe.settled()))
    check_all(changes, f"{folder} holds a run of another recipe, which cannot be resumed")
    return saved


def recipe_of(folder: Path) -> Recipe:
    """The recipe of a run, finished or not, from its last checkpoint.

    Raises:
        FileError: the folder has no checkpoint, or a damaged one.
    """
    last = checkpoint.newest(folder)
    if last is None:
        raise FileError(f"There is nothing to go on with in {folder}: it has no checkpoint.")
    return _recipe_in(last, checkpoint.load(last))


def _recipe_in(last: Path, saved: dict[str, Any]) -> Recipe:
    tables = saved["recipe"]
    if tables["method"] is not None:  # a run begun before there was this key drew from 0
        tables["method"].setdefault("seed", 0)
    return parse(tables, f"The recipe in {last}")


def wanted(
    source: str, changes: Sequence[str], to: Path | None, resume: bool, start: Path | None = None
) -> tuple[Path, Recipe]:
    """The folder and recipe that ``resect train`` is asked for; ``source``: a run to resume, or a recipe.

    ``start``: the folder of the model to train, in place of the recipe's.

    Raises:
        InputError, FileError: as `recipe.read`; or there is nothing to resume.
    """
    if resume and Path(source).is_dir():
        if start is not None:
            raise InputError(f"{source} goes on from its own checkpoint: leave out --from.")
        if changes:
            raise InputError(f"{source} goes on as it was: leave out {', '.join(changes)}, or start a new run.")
        return Path(source), recipe_of(Path(source))
    folder = to or Path("runs") / Path(source).stem
    if resume:
        recipe_of(folder)
    recipe = read(source, changes)
    return folder, recipe if start is None else started_from(recipe, start)


def finish(folder: Path, recipe: Recipe, model: nn.Module, history: list[dict[str, Any]], **more: Any) -> None:
    """Write the four files of a finished run, metrics.json last: it makes the folder a run.

    Of a cut net also plan.json, what is gone: `resect.load` takes the folder, too.

    Raises:
        FileError: a file could not be written; the ones it would have replaced are unchanged.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        flatten(tensor, tensors, name)
    weights = safetensors.torch.save(tensors)
    columns = list(dict.fromkeys(key for row in history for key in row))
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    metrics = {
        "format": FORMAT,
        "model_sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        **history[-1],
        "seconds": round(sum(row["seconds"] for row in history), 3),
        **more,
    }
    write_bytes(folder / "model.safetensors", weights)
    if (plan := plan_of(model)) is not None:
        write_bytes(folder / PLAN, plan_document(plan, folder / "model.safetensors").encode())
    write_bytes(folder / "recipe.json", _json(recipe.dump()))
    write_bytes(folder / "history.csv", table.getvalue().encode())
    write_bytes(folder / "metrics.json", _json(metrics))


def initial_state(recipe: Recipe) -> dict[str, Tensor]:
    """The weights that a training by this recipe begins with, drawn again from its seed."""
    data = open_data(recipe.data.name, **recipe.data.options)
    with torch.random.fork_rng([]):
        torch.manual_seed(recipe.train.seed)
        return starting_model(recipe, data).state_dict()


def open_run(folder: str | Path) -> tuple[nn.Module, Recipe, Data]:
    """The trained model (eval mode, on the CPU), its recipe and its data, from the folder of a finished run.

    Raises:
        FileError: the folder is no finished run, or one of its files is damaged.
    """
    folder = Path(folder)
    if not (folder / "metrics.json").is_file():
        hint = "its training did not finish: resume it" if checkpoint.newest(folder) else "it has no metrics.json"
        raise FileError(f"{folder} is not the folder of a finished run ({hint}).")
    metrics, tables = (_read_json(folder / name) for name in ("metrics.json", "recipe.json"))
    if metrics.get("format") != FORMAT:
        raise FileError(f"{folder} was not written by this version of Resect (metrics.json is not {FORMAT}).")
    try:
        recipe = parse(tables, f"{folder / 'recipe.json'}")
    except ResectError as error:
        raise FileError(str(error)) from error
    weights = read_tensors(folder / "model.safetensors", str(metrics.get("model_sha256")))
    data = open_data(recipe.data.name, **recipe.data.options)
    model = build_model(recipe, data)
    if (folder / PLAN).is_file() and "files" in _read_json(folder / PLAN):
        return resect.load(folder, model).eval(), recipe, data
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise FileError(
            f"The weights in {folder} do not fit {recipe.model.name!r} as recipe.json describes it: "
            "the run was given a model of its own. Build that model and load model.safetensors into it."
        ) from error
    return model.eval(), recipe, data


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise FileError(f"{path} is missing or is not whole JSON ({type(error).__name__}).") from error
    if not isinstance(value, dict):
        raise FileError(f"{path} does not hold a JSON object.")
    return value
