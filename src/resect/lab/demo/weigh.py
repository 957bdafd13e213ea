"""Cut the muted blocks, prove it, and weigh the nets against each other."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import resect
from resect.lab import runs
from resect.lab.demo import story
from resect.lab.demo.findings import Findings, Nets
from resect.lab.demo.proof import compare_with_gated
from resect.lab.evaluate import evaluate
from resect.lab.scratch import cut_shape
from resect.report.cost import count_flops, count_parameters, latency


def cut_and_prove(work: Path, nets: Nets, found: Findings) -> None:
    """Cut the muted blocks, prove the cut equal to the gated net, save, reload, and weigh it up."""
    epsilon = _epsilon(nets)
    evidence = nets.plan.evidence
    found.figures["response"] = [
        {"index": block.index, "name": block.name, "shortcut": block.shortcut, "epsilon": epsilon,
         "response": evidence["largest_response"][block.name], "muted": block.name in nets.plan.names}
        for block in nets.blocks
    ]  # fmt: skip
    models = {"plain": nets.plain, "gated": nets.gated}
    found.numbers["cut"] = {"blocks": len(nets.blocks), "muted": nets.plan.names, "epsilon": epsilon}
    if nets.plan.blocks:
        cut = resect.remove(nets.gated, nets.blocks, nets.plan)
        resect.save(cut, work / "cut")
        fresh = runs.build_model(nets.recipe, nets.data).eval()
        again = resect.load(work / "cut", fresh)
        with torch.no_grad():
            found.numbers["cut"]["reloaded_equal"] = torch.equal(again(nets.images), cut(nets.images))
        found.tables["proof"] = compare_with_gated(
            nets.gated, again, nets.blocks, nets.plan, epsilon, nets.images, (16, 64, 128, len(nets.images))
        )
        scratch = cut_shape(nets.recipe, nets.plan).eval()
        scratch.load_state_dict(_weights(nets.folders["from-scratch"]))
        models |= {"cut": again, "from-scratch": scratch}
    with resect.EpsilonGate(nets.gated, nets.blocks, epsilon=epsilon, muted_at_start="allow"):
        weigh(nets, models, found)


def _epsilon(nets: Nets) -> float:
    return float(nets.plan.evidence["epsilon"])


def _weights(folder: Path) -> dict[str, Tensor]:
    return load_file(str(folder / "model.safetensors"))


def weigh(nets: Nets, models: dict[str, nn.Module], found: Findings) -> None:
    """Fill the honest table: error, parameters, FLOPs and latency at batch 1 and 256."""
    image = nets.images[:1]
    timings = latency({name: (model, nets.images[:256]) for name, model in models.items()}, batches=(1, 256))
    found.figures["table_latency"] = [
        {"net": story.NAMES[row["variant"]]} | {key: row[key] for key in ("batch", "median_ms", "low_ms", "high_ms")}
        for row in timings
    ]
    median = {(row["variant"], row["batch"]): row["median_ms"] for row in timings}
    found.tables["honest"] = [
        {"net": story.NAMES[name], "test error (%)": evaluate(model, nets.images, nets.labels),
         "parameters": count_parameters(model), "FLOPs (M)": count_flops(model, image) / 1e6,
         "latency, batch 1 (ms)": median[name, 1], "latency, batch 256 (ms)": median[name, 256]}
        for name, model in models.items()
    ]  # fmt: skip
    found.numbers["table"] = found.tables["honest"]
