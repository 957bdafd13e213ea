"""Save a cut model as safetensors and a plan; load it into a freshly built uncut model."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import save_model
from torch import Tensor, nn

from resect import __version__
from resect.blocks.gate import check_detached
from resect.blocks.plan import Plan
from resect.errors import FileError, InputError, ResectError, check_all
from resect.files import read_tensors, refuse_pickle, sha256_of, whole_folder
from resect.shrink.card import card
from resect.shrink.compact import delete_layers
from resect.shrink.history import COMPACT, REPLACED
from resect.shrink.remove import copied, take_out
from resect.shrink.standin import linear_of, stand_in

WEIGHTS = "model.safetensors"
PLAN = "plan.json"
BASE = "base.json"
CARD = "README.md"
SHOWN = 8
"""Differences that an error lists: another depth alone makes a hundred."""


def save(small: nn.Module, path: str | Path, *, base: Mapping[str, Any] | None = None) -> None:
    """Write a cut model to a folder: ``model.safetensors``, ``plan.json`` and a model card, ``README.md``.

    The folder appears whole or not at all; an earlier one at the same place is replaced only then.
    ``base`` is JSON that says how to build the uncut model, kept beside it in ``base.json``. The card says what was cut
    from what, why (the plan's scores and evidence), and how to load it.

    Raises
    ------
    InputError: the model was not cut by ``remove`` or ``replace``.
    FileError: the disk is full, or the place holds something else.
    """
    plan = plan_of(small)
    if plan is None:
        raise InputError(
            "resect.save writes models cut by resect.remove, and this one was not. "
            "Save an uncut model with safetensors.torch.save_model."
        )
    check_detached(small)
    with whole_folder(Path(path), own=(WEIGHTS, PLAN, BASE, CARD)) as folder:
        state = _without_parts(small.state_dict())
        save_model(SimpleNamespace(state_dict=lambda: state), str(folder / WEIGHTS))  # type: ignore[arg-type]
        (folder / PLAN).write_text(plan_document(plan, folder / WEIGHTS), encoding="utf-8")
        (folder / CARD).write_text(card(small, plan, base=base is not None), encoding="utf-8")
        if base is not None:
            (folder / BASE).write_text(json.dumps(base, indent=1), encoding="utf-8")


def _without_parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Clone every tensor that is a part of a larger storage, which safetensors refuses; what is tied stays tied."""
    clones: dict[Any, Tensor] = {}
    for key, value in state.items():
        if value.untyped_storage().nbytes() != value.nbytes:
            view = value.device, value.data_ptr(), value.dtype, value.shape, value.stride()
            state[key] = clones.setdefault(view, value.clone())
    return state


def plan_of(model: nn.Module) -> Plan | None:
    """Return what is gone from a model; None of one that was not cut."""
    plan = getattr(model, "resect_plan", None)
    return plan if isinstance(plan, Plan) else None


def plan_document(plan: Plan, weights: Path) -> str:
    """Return what ``plan.json`` holds beside a file of weights: the plan, and the hash by which they are checked."""
    files = {WEIGHTS: sha256_of(weights)}
    return json.dumps({**plan.to_json(), "resect": __version__, "files": files}, indent=1)


def load(path: str | Path, model: nn.Module) -> nn.Module:
    """Load a cut model; no trace and no data are needed.

    Parameters
    ----------
    path: the folder that ``save`` wrote.
    model: the uncut model, freshly built, with any weights; left alone.

    Returns
    -------
    The cut model, with the saved weights, on the device of ``model`` and in its mode.

    Raises
    ------
    FileError: the folder is missing, incomplete, damaged (its hash differs) or not written by Resect; a pickle.
    InputError: ``model`` is not the architecture that was cut; the first eight differences are listed.
    """
    folder = Path(path)
    refuse_pickle(folder)
    plan, hashes = _read_plan(folder)
    if WEIGHTS not in hashes:
        raise FileError(f"{str(folder)!r} is not a model saved by resect.save: its {PLAN} is a plan alone.")
    tensors = read_tensors(folder / WEIGHTS, hashes[WEIGHTS])
    check_detached(model)
    modules = dict(model.named_modules())
    weights = dict(model.named_parameters())
    missing = [f"no module {name!r}" for block in plan.blocks for name in block.modules if name not in modules]
    missing += [f"no parameter {name!r}" for b in plan.blocks for name in b.raw_parameters if name not in weights]
    check_all(missing, f"This {type(model).__name__} is not the {plan.model} that was cut", limit=SHOWN)
    small = shaped(model, plan)
    _check_fits(small, tensors, plan)
    # Tied tensors are stored once: strict=False after the check above, which knows about ties.
    small.load_state_dict(_with_versions(tensors, small), strict=False)
    loaded = small.state_dict()
    changed = [f"{key!r} is not what the file holds" for key in tensors if not _same(loaded[key], tensors[key])]
    check_all(changed, "The weights did not survive loading (another dtype, or tied weights)", limit=SHOWN)
    return small


def shaped(model: nn.Module, plan: Plan) -> nn.Module:
    """Return a copy of the uncut model without what a plan says is gone, its other weights as they are."""
    small = copied(model)
    stand_ins = {name: run["linear"] for name, run in plan.evidence.get(REPLACED, {}).items() if run["linear"]}
    for block in plan.blocks:
        if block.name in stand_ins:
            stand_in(small, block, linear_of(stand_ins[block.name]))
    take_out(small, [block for block in plan.blocks if block.name not in stand_ins])
    delete_layers(small, plan.evidence.get(COMPACT, {}).get("layers", ()))
    small.resect_plan = plan  # type: ignore[assignment]
    return small


def _with_versions(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Say of which version each module's weights are: safetensors drop it, and some modules then refuse them."""
    state = OrderedDict(tensors)
    state._metadata = getattr(model.state_dict(), "_metadata", {})  # type: ignore[attr-defined]
    return state


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and not a.is_meta and bool(((a.cpu() == b) | (a.cpu().isnan() & b.isnan())).all())


def _read_plan(folder: Path) -> tuple[Plan, dict[str, str]]:
    if not (folder / PLAN).is_file():
        raise FileError(f"{str(folder)!r} is not a model saved by resect.save: it has no {PLAN}.")
    try:
        document = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        return Plan.from_json(document), dict(document.get("files", {}))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, ResectError) as error:
        raise FileError(f"Cannot read {str(folder / PLAN)!r}: {error}") from error


def _check_fits(small: nn.Module, tensors: dict[str, Any], plan: Plan) -> None:
    own = small.state_dict()
    # Tied tensors are stored under one of their names; the others share its storage in the model.
    stored = {own[key].data_ptr() for key in tensors if key in own}
    problems = [f"{key!r} is on the meta device, where nothing can be loaded" for key in own if own[key].is_meta]
    problems += [f"the file has {key!r}, the model does not" for key in sorted(tensors) if key not in own]
    problems += [
        f"the model has {key!r}, the file does not"
        for key, value in own.items()
        if key not in tensors and (value.data_ptr() not in stored or not value.numel())
    ]
    problems += [
        f"{key!r} is {tuple(tensors[key].shape)} in the file and {tuple(own[key].shape)} in the model"
        for key in own  # not in the file's order, which changes from process to process
        if key in tensors and tensors[key].shape != own[key].shape
    ]
    check_all(problems, f"This {type(small).__name__} is not the {plan.model} that was cut", limit=SHOWN)
