"""A plan that grows as a model is cut again and again, always in the names of the uncut model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from resect.blocks.block import ResidualBlock
from resect.blocks.plan import Plan
from resect.errors import InputError

COMPACT = "compact"
"""Key of a plan's evidence that holds what ``compact`` did."""
REPLACED = "replaced"
"""Key of what ``replace`` put in the place of runs of blocks, by the name of each run's first."""
RECOVERED = "recovered"
"""Key of what was trained afterwards: ``{"epochs": N, "by": [ways]}``."""
MEASURES = {"test_error": "test error (%)", "perplexity": "perplexity"}
"""Keys of what was measured before and after, ``{"uncut": …, "cut": …, "data": …}``, and what they are called."""
OUTCOME = (RECOVERED, *MEASURES)
"""Keys of what came of a cut, and is not true any more of the next."""


def unspent(plan: Plan) -> Plan:
    """Return a plan without what was done when it was carried out before: of the next model nothing of it is true."""
    done = (COMPACT, REPLACED, *OUTCOME)
    return replace(plan, evidence={key: value for key, value in plan.evidence.items() if key not in done})


def grown(earlier: Plan | None, plan: Plan, compacted: Mapping[str, Any] | None = None) -> Plan:
    """Return the plan of all that is gone from a model.

    Parameters
    ----------
    earlier: the plan of what was gone before this cut.
    plan: what this cut took, in the names of the model that was cut.
    compacted: what ``compact`` returned after this cut.
    """
    gone, before = ((), {}) if earlier is None else (earlier.blocks, earlier.evidence)
    past = before.get(COMPACT, {})
    moved = past.get("moved", {})
    # Of the earlier evidence, what was done to the model stays; how its blocks were chosen says nothing of these.
    evidence = {key: value for key, value in plan.evidence.items() if key not in (REPLACED, *OUTCOME)}
    if compacts := past if compacted is None else _merged(past, compacted):
        evidence[COMPACT] = compacts
    blocks = [_translated(block, moved) for block in plan.blocks]
    # A linear map that went now was in the place of a block that is in the plan already.
    maps = {block.modules[block.end]: block.name for block in gone if _is_map(before, block) and block.end is not None}
    same = {b.name: maps[b.modules[0]] for b in blocks if len(b.modules) == 1 and b.modules[0] in maps}
    spent = {maps[module] for block in blocks for module in block.modules if module in maps}
    kept = {name: run for name, run in before.get(REPLACED, {}).items() if name not in spent}
    now = {original(name, moved): _named(run, moved) for name, run in plan.evidence.get(REPLACED, {}).items()}
    scores = {same.get(name := original(key, moved), name): score for key, score in plan.scores.items()}
    return replace(
        plan,
        blocks=(*gone, *(block for block in blocks if block.name not in same)),
        scores={**(earlier.scores if earlier is not None else {}), **scores},
        evidence=evidence | ({REPLACED: kept | now} if kept or now else {}),
        among=plan.among if earlier is None else earlier.among,
    )


def original(name: str, moved: Mapping[str, str]) -> str:
    """Translate a module's path, a parameter's key or a block's name to what it was before layers went."""
    end = len(name)
    while end > 0:
        if name[:end] in moved:
            return moved[name[:end]] + name[end:]
        end = max(name.rfind(mark, 0, end) for mark in "./@")
    return name


def name_in(small: nn.Module, name: str) -> str:
    """Return what a module of the uncut model is called in a cut one.

    Raises ``InputError`` if it is gone, or nothing but a stub of a removed block.
    """
    plan = getattr(small, "resect_plan", None)
    moved = plan.evidence.get(COMPACT, {}).get("moved", {}) if isinstance(plan, Plan) else {}
    found = next((path for path, _ in small.named_modules() if original(path, moved) == name), None)
    if found is None or (isinstance(plan, Plan) and name in _stubs(plan)):
        raise InputError(f"The cut model has no module {name!r} any more. Name one that was kept.")
    return found


def _stubs(plan: Plan) -> set[str]:
    """The modules of removed blocks that are left by name alone; a linear map in a block's place is none."""
    return {
        module
        for block in plan.blocks
        for position, module in enumerate(block.modules)
        if block.calls[position] is None and (position != block.end or not _is_map(plan.evidence, block))
    }


def _is_map(evidence: Mapping[str, Any], block: ResidualBlock) -> bool:
    """Whether a linear map was kept where a block was."""
    return bool(evidence.get(REPLACED, {}).get(block.name, {}).get("linear"))


def _merged(past: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    before = past.get("moved", {})
    touched = {*now["moved"].values(), *now["layers"]}
    moved = {new: old for new, old in before.items() if new not in touched}
    moved |= {new: original(old, before) for new, old in now["moved"].items()}
    return {
        "layers": [*past.get("layers", []), *(original(layer, before) for layer in now["layers"])],
        "moved": {new: old for new, old in moved.items() if new != old},
        "keys": {new: original(old, before) for new, old in now["keys"].items()},
        "kept": {original(layer, before): reason for layer, reason in now["kept"].items()},
    }


def _named(run: Mapping[str, Any], moved: Mapping[str, str]) -> dict[str, Any]:
    merged = run["merged_into"]
    names = {"blocks": [original(name, moved) for name in run["blocks"]]}
    return {**run, **names, "merged_into": None if merged is None else original(merged, moved)}


def _translated(block: ResidualBlock, moved: Mapping[str, str]) -> ResidualBlock:
    if not moved:
        return block

    def translate(value: Any) -> Any:
        if isinstance(value, str):
            return original(value, moved)
        return type(value)(map(translate, value)) if isinstance(value, (list, tuple)) else value

    return ResidualBlock.from_json({name: translate(value) for name, value in block.to_json().items()})
