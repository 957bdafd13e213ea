"""What the demo asks of the trained plain net, and of the contrast without shortcuts."""

from __future__ import annotations

from functools import partial

from torch import nn

import resect
from resect.lab import runs
from resect.lab.contrast import delete_each_layer
from resect.lab.data import in_batches
from resect.lab.demo import story
from resect.lab.demo.findings import Display, Findings, Nets


def study_plain(nets: Nets, found: Findings, display: Display) -> None:
    """Delete each block and k blocks at random; count paths; split the gradient by path length."""
    blocks = resect.find_blocks(nets.plain, nets.example)
    counts = [count for count in (1, 2, 4, 8, 12, 16, 20, 27) if count <= len(blocks)]
    study = resect.lesion_study(
        nets.plain, blocks, in_batches(nets.images, nets.labels, 128), random_counts=counts,
        progress=partial(display.steps, "lesions"),
    )  # fmt: skip
    found.figures["lesion_each"] = [
        {"net": "54 blocks", "index": blocks[name].index, "name": name,
         "stage": blocks[name].owner.partition(".")[0], "error": lesion.value / 100, "baseline": study.baseline / 100,
         "shortcut": blocks[name].shortcut, "chance": 0.9}
        for lesion in study.each for name in lesion.closed
    ]  # fmt: skip
    found.figures["lesion_random"] = [
        {"k": lesion.k, "draw": draw, "error": lesion.value / 100, "every": lesion.every}
        for draw, lesion in enumerate(study.random)
    ]
    paths = resect.path_lengths(blocks)
    total = sum(paths)
    found.figures["path_lengths"] = [{"length": k, "share": count / total} for k, count in enumerate(paths)]
    sample = (nets.images[:128], nets.labels[:128])
    gradients = resect.path_gradients(
        nets.plain, blocks, sample, nn.functional.cross_entropy, samples=128,
        progress=partial(display.steps, "paths"),
    )  # fmt: skip
    found.figures["gradients"] = gradients.rows()
    found.numbers["gradients"] = story.gradient_numbers(gradients)
    changes = sorted(study.scores.values())
    found.numbers["lesions"] = {
        "blocks": len(blocks), "baseline_error": study.baseline, "largest_rise": changes[-1],
        "within_half_a_point": sum(change <= 0.5 for change in changes),
        "most_missed": max(study.scores, key=study.scores.__getitem__), "by_count": study.by_count(),
    }  # fmt: skip


def study_contrasts(nets: Nets, found: Findings) -> None:
    """Delete layers of the small net with and without shortcuts."""
    rows = found.figures["lesion_each"]
    for name, label in (("contrast-shortcuts", "9 blocks"), ("contrast-none", "9 layers, no shortcuts")):
        model, _, _ = runs.open_run(nets.folders[name])
        deleted = delete_each_layer(model, in_batches(nets.images, nets.labels, 256))
        rows += [
            {"net": label, "index": row["index"], "name": row["label"], "stage": row["stage"],
             "error": row["value"] / 100, "baseline": row["baseline"] / 100, "shortcut": "identity", "chance": 0.9}
            for row in deleted
        ]  # fmt: skip
        errors = {row["label"]: row["value"] for row in deleted}
        found.numbers[name] = {"baseline_error": deleted[0]["baseline"], "errors": errors}
