"""What a cut cost and bought: measured before and after, told, and kept in the plan of the cut model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import resect
from resect.blocks.block import Blocks
from resect.blocks.cost import count_flops, resized, samples_in
from resect.blocks.example import forward_batch
from resect.blocks.metrics import mean_of, metric_named
from resect.blocks.modes import kept_modes
from resect.blocks.plan import Plan
from resect.lab.evaluate import evaluate
from resect.lab.open import Opened
from resect.lab.shrink.wishes import Wishes
from resect.lab.text import TextData
from resect.report import theme
from resect.shrink.history import COMPACT, RECOVERED, REPLACED, original

BATCH = 16
"""Sequences at a time: logits are large."""
RUINED = 5.0
"""Points of test error."""
RUINED_TEXT = 2.0
"""Times the perplexity."""


def outcome(opened: Opened, small: nn.Module, limit: int) -> dict[str, Any]:
    """Return ``{"test_error" or "perplexity": {"uncut", "cut", "data"}}``; {} without data.

    Test errors are in % of all test images, perplexities of the first ``limit`` sequences: text has no splits.
    """
    if opened.data is None:
        return {}
    if isinstance(opened.data, TextData):
        batches = opened.data.batches(BATCH, limit)
        a, b = (_perplexity(net, batches) for net in (opened.model, small))
        return {"perplexity": {"uncut": a, "cut": b, "data": opened.data.name}}
    images, labels = opened.images()
    a, b = (evaluate(net, images, labels) for net in (opened.model, small))
    return {"test_error": {"uncut": a, "cut": b, "data": opened.data.name}}


def _perplexity(model: nn.Module, batches: list[Any]) -> float:
    metric, total, count = metric_named("perplexity"), 0.0, 0
    with kept_modes(model), torch.no_grad():
        model.eval()
        for batch in batches:
            values = metric(forward_batch(model, batch), batch)
            total, count = total + float(values.sum()), count + len(values)
    return mean_of(metric, total, count)


def record(small: nn.Module, opened: Opened, found: dict[str, Any], wishes: Wishes) -> None:
    """Put what was measured, and the epochs of recovery and its way, into the evidence of a cut model's plan.

    Where the model was cut before, its first "uncut" stays, epochs add up, and so do ways.
    """
    plan: Any = small.resect_plan
    earlier = getattr(opened.model, "resect_plan", None)
    past = {} if earlier is None else earlier.evidence
    kept = {}
    for key, value in found.items():
        if earlier is None:
            kept[key] = value
        elif past.get(key, {}).get("data") == value["data"]:
            kept[key] = value | {"uncut": past[key]["uncut"]}
    before = past.get(RECOVERED, {"epochs": 0})
    total = wishes.epochs + before["epochs"]
    ways = list(dict.fromkeys([*before.get("by", ()), *([wishes.way] if wishes.epochs else ())]))
    recovered = {RECOVERED: {"epochs": total, "by": ways}} if total else {}
    small.resect_plan = replace(plan, evidence={**plan.evidence, **kept, **recovered})


def flops_told(opened: Opened, small: nn.Module) -> str:
    """Say how many FLOPs a sample takes, before and after."""
    example = resect.Example.of(opened.example())
    one = resized(example, 1) if samples_in(example) else example
    before, after = count_flops(opened.model, one), count_flops(small, one)
    what = "sequence" if isinstance(opened.data, TextData) else "sample"
    return f"FLOPs of one {what}: {before:,} → {after:,} ({after / max(1, before) - 1:+.1%})."


def told(opened: Opened, blocks: Blocks, small: nn.Module, found: dict[str, Any], wishes: Wishes) -> Iterator[str]:
    """Say what was cut, what it saves, and what it cost."""
    plan: Any = small.resect_plan
    yield str(gone_now(opened.model, blocks, small))
    before, after = (sum(p.numel() for p in net.parameters()) for net in (opened.model, small))
    healed = f" Then trained for {theme.plural(wishes.epochs, 'epoch')}." if wishes.epochs else ""
    proof = "" if wishes.replace else " Proven equal to the closed model."
    yield f"Parameters: {before:,} → {after:,} ({after / before - 1:+.1%}).{proof}{healed}"
    yield flops_told(opened, small)
    for run in plan.evidence.get(REPLACED, {}).values():
        where = f"merged into {run['merged_into']}" if run["merged_into"] else "one linear layer kept"
        distance = f"{run['error_removed']:.3g} without it, {run['error']:.3g} with it"
        yield f"In the place of {', '.join(run['blocks'])}: {where}; distance from the uncut net {distance}."
    if wishes.compact:
        past = getattr(opened.model, "resect_plan", None)
        before = [] if past is None else past.evidence.get(COMPACT, {}).get("layers", [])
        layers = [layer for layer in plan.evidence[COMPACT]["layers"] if layer not in before]
        yield f"Layers deleted: {', '.join(layers)} (as the uncut model calls them); the others are renumbered."
    more = ["--recover 3"] if not wishes.recover else ["--rounds"] if wishes.n and wishes.rounds < wishes.n else []
    more += ["--replace"] * (not wishes.replace and wishes.rounds == 1)
    yield from cost_told(opened, found, wishes.limit, " or ".join(more or ["more epochs"]))


def gone_now(model: nn.Module, blocks: Blocks, small: nn.Module) -> Plan:
    """Return the plan of what this cut took of a model, in that model's own names; it may have been cut before."""
    plan: Any = small.resect_plan
    earlier = getattr(model, "resect_plan", None)
    moved = {} if earlier is None else earlier.evidence.get(COMPACT, {}).get("moved", {})
    uncut = {block.name: original(block.name, moved) for block in blocks}
    gone = tuple(block for block in blocks if uncut[block.name] in plan.names)
    scores = {name: plan.scores[old] for name, old in uncut.items() if old in plan.scores}
    return replace(plan, blocks=gone, scores=scores)


def cost_told(opened: Opened, found: dict[str, Any], limit: int, advice: str) -> Iterator[str]:
    """Say what was measured, and where the cut has ruined the model, the ``advice``."""
    how = " with every block open, without its gate" if opened.gated else ""
    if "test_error" in found:
        a, b = found["test_error"]["uncut"], found["test_error"]["cut"]
        yield f"Test error: {a:.2f} %{how} → {b:.2f} %."
        ruined = b - a > RUINED
    elif "perplexity" in found:
        a, b = found["perplexity"]["uncut"], found["perplexity"]["cut"]
        count = min(limit, len(opened.data.sequences))  # type: ignore[union-attr]
        yield f"Perplexity of {count} sequences: {a:.4g} → {b:.4g}."
        ruined = b > RUINED_TEXT * a
    else:
        return
    if ruined:
        yield f"[yellow]This cut has ruined the model. Cut less, or try {advice}.[/yellow]"
