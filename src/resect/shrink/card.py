"""The model card of a cut model: what was cut from what, why, and how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import nn

from resect import __version__
from resect.blocks.plan import Plan
from resect.shrink.history import COMPACT, MEASURES, RECOVERED, REPLACED
from resect.shrink.structure import under


def card(small: nn.Module, plan: Plan, *, base: bool = False) -> str:
    """Return the card as Markdown. It says no more than the plan knows. ``base``: whether base.json lies beside it."""
    weights = sum(parameter.numel() for parameter in small.parameters())
    replaced = plan.evidence.get(REPLACED, {})
    how = (
        "By linear maps in their place, so the outputs differ from those of the uncut model"
        if replaced
        else "When they were cut, what was left was proven equal, bit for bit, to the model with them closed"
    )
    return "\n".join(
        [
            f"# {plan.model or type(small).__name__}, cut",
            "",
            f"Cut from a {plan.model or type(small).__name__}: {len(plan.blocks)} of its residual blocks, listed "
            f"below. {weights:,} parameters are left. {how}. {_trained(plan)}",
            "",
            f"Chosen by: {plan.by}. Written by Resect {__version__}.",
            "",
            *_blocks(plan),
            "",
            *_outcome(plan),
            *_replaced(replaced),
            *_evidence(plan),
            *_loading(small, plan, base),
        ]
    )


def _blocks(plan: Plan) -> list[str]:
    rows = [
        f"| `{block.name}` | {block.shortcut} | {block.parameters:,} | {_number(plan.scores.get(block.name))} |"
        for block in plan.blocks
    ]
    kept = {name: score for name, score in plan.scores.items() if name not in set(plan.names)}
    least = min(kept, key=kept.__getitem__, default=None)
    more = [] if least is None else ["", f"The lowest score that stayed: `{least}`, {_number(kept[least])}."]
    return ["| gone | shortcut | parameters | score |", "|---|---|---|---|", *rows, *more]


def _trained(plan: Plan) -> str:
    found = plan.evidence.get(RECOVERED)
    epochs = found.get("epochs") if isinstance(found, Mapping) else None
    if not epochs:
        return "Training afterwards changes the weights, and is not recorded here."
    often = f"{epochs} epoch{'s' * (epochs != 1)}"
    ways = f" ({', '.join(found['by'])})" if isinstance(found, Mapping) and found.get("by") else ""
    return f"Afterwards it was trained for {often}, with the model that it was cut from as its teacher{ways}."


def _outcome(plan: Plan) -> list[str]:
    rows = [
        f"| {name} | {found['data']} | {found['uncut']:.4g} | {found['cut']:.4g} |"
        for key, name in MEASURES.items()
        if isinstance(found := plan.evidence.get(key), Mapping) and found.keys() == {"uncut", "cut", "data"}
    ]
    return ["| measured | on | uncut | as saved here |", "|---|---|---|---|", *rows, ""] if rows else []


def _replaced(replaced: Mapping[str, Any]) -> list[str]:
    lines = [
        f"- {', '.join(f'`{name}`' for name in run['blocks'])}: "
        + (f"merged into `{run['merged_into']}`" if run["merged_into"] else "one linear layer kept")
        + f"; distance from the uncut model {run['error']:.3g}, without it {run['error_removed']:.3g}"
        for run in replaced.values()
    ]
    return ["## In their place", "", *lines, ""] if lines else []


def _evidence(plan: Plan) -> list[str]:
    """Say what else the plan knows, as it says it."""
    known = {key: value for key, value in plan.evidence.items() if key not in (COMPACT, REPLACED)}
    if not known:
        return []
    return ["## Evidence", "", "```json", json.dumps(known, indent=1), "```", ""]


def _loading(small: nn.Module, plan: Plan, base: bool) -> list[str]:
    home = type(small).__module__
    lines = [
        "## Loading",
        "",
        "With Resect, into the uncut model, freshly built, with any weights (the file is checked by its hash):",
        "",
        "```python",
        "import resect",
        f"small = resect.load(FOLDER, model)  # model: the uncut {plan.model or type(small).__name__}",
        "```",
        "",
        *(["`base.json`, beside this card, says how the uncut model is built.", ""] if base else []),
    ]
    compacted = plan.evidence.get(COMPACT)
    layers = compacted["layers"] if compacted else []
    # Of a layer that stays something may be gone too: then no shorter model of the class has these weights.
    whole = all(under(part, layers) for b in plan.blocks for part in (*b.modules, *b.raw_parameters))
    if not layers or not whole or any(run["linear"] for run in plan.evidence.get(REPLACED, {}).values()):
        return [*lines, "Without Resect: export it, `resect.export(small, 'small.onnx', example=x)`.", ""]
    other = {
        "timm": "resect.integrations.timm.save(small, 'shorter.safetensors', x)",
        "transformers": "resect.integrations.transformers.save(small, 'shorter', example)",
    }.get(home.partition(".")[0])
    went = ", ".join(f"`{layer}`" for layer in layers)
    return [
        *lines,
        f"Without Resect: whole layers went ({went}), so `model.safetensors` fits the same class built with fewer of "
        "them" + (f"; `{other}` writes it so that the library loads it." if other else "."),
        "",
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:+.4g}"
