"""What the demo's report says: the text around the figures, with the numbers found."""

from __future__ import annotations

from typing import Any

from resect.analyse.gradients import PathGradients
from resect.lab import reuse
from resect.lab.demo.findings import Findings
from resect.report.html import Section

NAMES = {
    "plain": "plain",
    "stochastic-depth": "stochastic depth",
    "residual-droppath": "ResidualDroppath",
    "gated": "gated (ε)",
    "cut": "cut",
    "from-scratch": "cut shape from scratch",
}


def gradient_numbers(gradients: PathGradients) -> dict[str, Any]:
    """Return the path lengths that carry most of the sampled gradient, and the share of paths they are."""
    effective = gradients.effective()
    exact = gradients.norm_of_sum
    return {
        "effective_lengths": [effective.low, effective.high],
        "share_of_sampled_gradient": effective.held,
        "share_of_paths": float(effective.paths),
        "longest_path": len(gradients.paths) - 1,
        "exact_share_up_to_length_5": float(exact[:6].sum() / exact.sum()),
    }


def tell(found: Findings) -> tuple[str, str, list[Section], list[tuple[str, str]]]:
    """Return title, summary, sections and highlights of the report."""
    table = {row["net"]: row for row in found.tables["honest"]}
    plain, cut, scratch = table[NAMES["plain"]], table.get(NAMES["cut"]), table.get(NAMES["from-scratch"])
    total, muted = found.numbers["cut"]["blocks"], len(found.numbers["cut"]["muted"])
    sections = [
        *_speed(found),
        *_training(found),
        _methods(found),
        *reuse.sections(found.tables["spiral"]),
        *_veit(found),
        *_cut(found),
        _honest(found, plain, cut, scratch),
    ]
    if cut is None:
        summary = f"A net of {total} residual blocks was trained with the ε-gate, and none of them stayed muted."
        return "Residual blocks, found, trained and cut", summary, sections, []
    saved = 1 - cut["parameters"] / plain["parameters"]
    faster = 1 - cut["latency, batch 256 (ms)"] / plain["latency, batch 256 (ms)"]
    summary = (
        f"A net of {total} residual blocks was trained on scikit-learn's digits with the ε-gate. {muted} blocks stayed "
        f"muted to the end and were cut out: {saved:.0%} of the parameters. The cut net gives the same outputs, to the "
        f"bit, wherever the gate holds. Test error: plain {plain['test error (%)']:.2f} %, cut "
        f"{cut['test error (%)']:.2f} %."
    )
    highlights = [
        (f"{muted} of {total}", "blocks cut"),
        (f"−{saved:.0%}", "parameters"),
        (f"−{faster:.0%}" if faster >= 0 else f"+{-faster:.0%}", "latency, batch 256"),
    ]
    return "Residual blocks, found, trained and cut", summary, sections, highlights


def _speed(found: Findings) -> list[Section]:
    rows = {(row["model"], row["variant"]): row["median_ms"] for row in found.figures["speed"]}
    models = list(dict.fromkeys(row["model"] for row in found.figures["speed"]))
    ratios = "; ".join(
        f"{model}: {rows[model, 'half closed'] / rows[model, 'full']:.2f} × closed, "
        f"{rows[model, 'half removed'] / rows[model, 'full']:.2f} × removed"
        for model in models
    )
    chain = [
        {"model": model, "blocks": len(blocks), "layers": len({b["owner"] for b in blocks}),
         "identity": sum(b["shortcut"] == "identity" for b in blocks),
         "projection": sum(b["shortcut"] == "projection" for b in blocks),
         "parameters in branches": sum(b["parameters"] for b in blocks)}
        for model in models
        for blocks in [[row for row in found.figures["chain"] if row["model"] == model]]
    ]  # fmt: skip
    return [
        Section(
            "The blocks of two models",
            "`resect.find_blocks(model, example)` runs a model once, finds every addition of a branch to its shortcut, "
            "and checks each block against an independent oracle before it offers it. The weights here are random.",
            figure="chain",
            table=chain,
        ),
        Section(
            "A closed block costs nothing",
            "Every second block of each model closed, and the same blocks removed for good. This is about speed only: "
            "a model with random weights has no accuracy to lose.",
            figure="speed",
            note=f"Latency at batch 1 against the full model: {ratios}.",
        ),
    ]


def _training(found: Findings) -> list[Section]:
    muted = found.numbers["cut"]["muted"]
    epsilon = found.numbers["cut"]["epsilon"]
    stages = sorted({name.partition(".")[0] for name in muted})
    where = f" They lie in {', '.join(f'`{stage}`' for stage in stages)}." if stages else ""
    return [
        Section(
            "Training a net to be cut",
            "All nets start with 54 blocks (the layout of ResNet-110, widths 8, 16 and 32); the gated one has an "
            f"ε-gate on every branch (Yu et al. 2018). A branch none of whose outputs exceeds ε = {epsilon:g} on a "
            "batch is muted: it contributes nothing and gets no gradient. Muted for a whole epoch, it is closed for "
            "the rest of the training and costs no time any more. The last seven epochs train what remains, without "
            "gates.",
            figure="training",
        ),
        Section(
            "What the branches still add",
            f"{len(muted)} of {found.numbers['cut']['blocks']} branches were muted in every step of the last epochs."
            f"{where} For a closed branch this is the last value before it was closed: near ε, not zero. On a training "
            "this short a branch goes because it starts small, not because it withered.",
            figure="response",
        ),
    ]


def _methods(found: Findings) -> Section:
    rows = found.figures["removal"]
    whole = {row["net"]: row["error"] for row in rows if row["removed"] == 0}
    gated = min(row["removed"] for row in rows if row["net"] == NAMES["gated"])
    start = ", ".join(f"{net} {error:.2%}" for net, error in whole.items())
    return Section(
        "Four ways to train, and how many blocks each net can do without",
        "The same net, data, seed and number of optimizer steps: plain, with stochastic depth (Huang et al. 2016), "
        "with ResidualDroppath (our interpretation of the abstract of Park 2024; there are no numbers to compare with) "
        "and with the ε-gate. Then blocks are removed at random, nothing retrained.",
        figure="removal",
        note=f"Whole: {start}. The gated net starts at {gated} removed blocks, those that its gate has muted: that is "
        "the cut net. Dropping blocks slows learning; Huang et al. train for 500 epochs, this is 25. One seed: curves "
        "within each other's bands do not differ.",
    )


def _veit(found: Findings) -> list[Section]:
    lesions, none = found.numbers["lesions"], found.numbers["contrast-none"]
    with_shortcuts = found.numbers["contrast-shortcuts"]
    gradients = found.numbers["gradients"]
    low, high = gradients["effective_lengths"]
    worst, worst_with = max(none["errors"].values()), max(with_shortcuts["errors"].values())
    return [
        Section(
            "Delete any one block: hardly anything happens",
            f"One block deleted from the trained plain net (Veit et al. 2016), whose test error is "
            f"{lesions['baseline_error']:.2f} %: {lesions['within_half_a_point']} of {lesions['blocks']} deletions "
            "raise it by at most half a point. The exceptions are mostly early blocks; the worst, "
            f"`{lesions['most_missed']}`, adds {lesions['largest_rise']:.1f} points.",
            figure="lesion_each",
            note="The contrast has 9 layers, because a net of 54 layers without shortcuts does not learn at all. Its "
            f"test error is {none['baseline_error']:.2f} % whole and up to {worst:.1f} % with one layer deleted "
            f"(guessing: 90 %); the same 9 layers with shortcuts: {with_shortcuts['baseline_error']:.2f} % whole, "
            f"up to {worst_with:.1f} %. Only layers that keep the size of the image can be deleted from it.",
        ),
        Section(
            "Delete many: the error rises smoothly",
            "Blocks closed at random in the plain net, ten draws for each number.",
            figure="lesion_random",
        ),
        Section(
            "An ensemble of paths",
            "Each block is a fork: through the branch or past it. 54 blocks make 2 to the power of 54 paths, nearly "
            "all of them of middle length.",
            figure="path_lengths",
        ),
        Section(
            "Most of the gradient comes along short paths",
            f"{gradients['share_of_sampled_gradient']:.0%} of the sampled gradient comes along paths of {low} to "
            f"{high} branches, {gradients['share_of_paths']:.2%} of all paths (Veit et al.: 5 to 17 of 54, 0.45 %).",
            figure="gradients",
            note="Two different quantities. The exact one adds up the gradients of all paths of a length, as vectors, "
            "and takes the norm; paths that disagree cancel out. The paper's one adds up the norms: number of paths "
            "times the mean norm of a single path's gradient, from samples.",
        ),
    ]


def _cut(found: Findings) -> list[Section]:
    proof = found.tables.get("proof")
    if proof is None:
        return [Section("Nothing to cut", "No block was muted in every step of the last epochs.")]
    held = sum(row["gate held"] for row in proof)
    batches = sum(row["batches"] for row in proof)
    return [
        Section(
            "Cut and prove",
            "The muted blocks were removed, the result saved, and reloaded into a freshly built net. On every test "
            "batch on which the gate holds (all cut blocks muted, all others open) cut and gated net must give the "
            "same outputs to the bit.",
            table=proof,
            note=f"The gate held on {held} of {batches} batches, and there the nets were equal on all of them. It "
            "decides by the largest response in a batch, so that small batches mute blocks that larger ones need: this "
            "is a property of the published gate, and the reason to ship the cut net, which does not depend on the "
            "batch.",
        )
    ]


def _honest(
    found: Findings, plain: dict[str, Any], cut: dict[str, Any] | None, scratch: dict[str, Any] | None
) -> Section:
    note = None
    if cut is not None and scratch is not None:
        a, b = cut["test error (%)"], scratch["test error (%)"]
        if b < a:
            note = (
                f"The cut shape trained from scratch wins: {b:.2f} % against {a:.2f} %. What remains of the gate: it "
                "found this shape in one run, without a search, and `resect.remove` can cut a net you already have."
            )
        elif b == a:
            note = f"The cut shape trained from scratch is as good: {b:.2f} %. The gate found that shape in one run."
        else:
            note = f"The cut net is better than its shape trained from scratch: {a:.2f} % against {b:.2f} %."
        note += " One split and one seed: `make demo-full` gives intervals over five folds."
    return Section(
        "The honest table",
        "The same test images and the same timing, in turns, for all nets.",
        figure="table_latency",
        table=found.tables["honest"],
        note=note,
        best={"test error (%)": "low", "latency, batch 256 (ms)": "low"},
    )
