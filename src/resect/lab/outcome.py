"""What a cut cost and bought: measured before and after, told, and kept in the plan of the cut model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

import resect
from resect.blocks.cost import count_flops, resized, samples_in
from resect.blocks.example import forward_batch
from resect.blocks.metrics import mean_of, metric_named
from resect.blocks.modes import kept_modes
from resect.lab.evaluate import evaluate
from resect.lab.open import Opened
from resect.lab.text import TextData
from resect.shrink.history import RECOVERED

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
    with kept_modes(model), torch.inference_mode():
        model.eval()
        for batch in batches:
            values = metric(forward_batch(model, batch), batch)
            total, count = total + float(values.sum()), count + len(values)
    return mean_of(metric, total, count)


def record(small: nn.Module, opened: Opened, found: dict[str, Any], epochs: int) -> None:
    """Put what was measured, and the epochs of recovery, into the evidence of a cut model's plan.

    Where the model was cut before, its first "uncut" stays, and epochs add up.
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
    total = epochs + past.get(RECOVERED, {}).get("epochs", 0)
    recovered = {RECOVERED: {"epochs": total}} if total else {}
    small.resect_plan = replace(plan, evidence={**plan.evidence, **kept, **recovered})


def flops_told(opened: Opened, small: nn.Module) -> str:
    """Say how many FLOPs a sample takes, before and after."""
    example = resect.Example.of(opened.example())
    one = resized(example, 1) if samples_in(example) else example
    before, after = count_flops(opened.model, one), count_flops(small, one)
    what = "sequence" if isinstance(opened.data, TextData) else "sample"
    return f"FLOPs of one {what}: {before:,} → {after:,} ({after / max(1, before) - 1:+.1%})."


def told(opened: Opened, found: dict[str, Any], limit: int, advice: str) -> Iterator[str]:
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
