"""Coverage: on which models every residual block is found, closed, scaled, trained without, removed and reloaded.

Every model of ``coverage_models`` runs through ``coverage_checks`` in a process of its own; what it gave is one line
of JSON in ``build/coverage/``, so that a run goes on where the last one stopped. The denominators (families with
residual blocks, blocks) come from the committed lists.

    python benchmarks/coverage.py              # everything; writes docs/coverage.md
    python benchmarks/coverage.py timm swin    # the timm families with "swin" in their name; writes nothing
    python benchmarks/coverage.py --quick      # a fixed spread of 40 families, from scratch, under 50 s on 2 cores
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import multiprocessing.connection
import resource
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from coverage_models import SOURCES, Family, families, is_installed
from coverage_table import table

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "coverage"
TIMEOUT = 600
MEMORY = 8 << 30
QUICK = {
    "timm": (
        "resnet18", "test_efficientnet", "convnext_tiny", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224",
        "davit_tiny", "test_maxvit", "mobilenetv3_small_050", "regnetx_002", "mixer_s16_224", "xcit_nano_12_p16_224",
        "cait_xxs24_224", "mvitv2_tiny", "test_mambaout", "edgenext_xx_small", "starnet_s050", "vit_mid",
        "samvit_base_patch16", "resnetv2_50x1_bit", "test_byobnet",
    ),
    "torchvision": ("resnet18", "convnext", "vit", "swin", "mobilenet_v2", "quantizable resnet18"),
    "torch": ("Transformer", "TransformerEncoder, padded"),
    "handwritten": (
        "f += x", "x - f(x)", "highway", "parallel", "dict output", "raw weights", "one layer, three calls",
        "side output", "part of the channels", "U-Net", "RepVGG", "positions, mask, rotation",
    ),
}  # fmt: skip
"""40 families: each kind of block once, those that are used most first."""


def examine(family: Family) -> dict[str, Any]:
    """Run the checks of one family; never raises."""
    from coverage_checks import check

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.perf_counter()
    row: dict[str, Any] = {"source": family.source, "name": family.name, "found": 0, "verified": 0, "error": ""}
    try:
        case, problems = check(family)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"
        row["trace"] = traceback.format_exc()[-2000:]
        return row
    wrong = {name for of_check in problems.values() for name in of_check}
    row |= {
        "found": len(case.blocks),
        "verified": 0 if "*" in wrong else sum(name not in wrong for name in case.blocks.names),
        "refused": [[refusal.where, refusal.reason] for refusal in case.blocks.refused],
        "problems": problems,
        "notes": case.notes,
        "seconds": round(time.perf_counter() - start, 2),
    }
    return row


def _work(family: Family, out: multiprocessing.connection.Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))  # a family that wants more fails alone
    out.send(examine(family))


def run_all(todo: Sequence[Family], jobs: int, timeout: float) -> Iterator[dict[str, Any]]:
    """Run families side by side, each in a process of its own that may crash or hang."""
    context = multiprocessing.get_context("fork")
    waiting = list(reversed(todo))
    running: dict[Any, tuple[Any, Family, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            family = waiting.pop()
            receive, send = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(family, send))
            process.start()
            send.close()
            running[receive] = (process, family, time.monotonic())
        ready = multiprocessing.connection.wait(list(running), timeout=1)
        late = [pipe for pipe, (_, _, since) in running.items() if time.monotonic() - since > timeout]
        for pipe in {*ready, *late}:
            process, family, _ = running.pop(pipe)
            try:
                row = pipe.recv() if pipe in ready else None
                error = f"took more than {timeout:.0f} s"
            except EOFError:
                row, error = None, "the process died"
            process.kill()
            process.join()
            yield row or {"source": family.source, "name": family.name, "found": 0, "verified": 0, "error": error}


def summary(rows: dict[tuple[str, str], dict[str, Any]], listed: Sequence[Family]) -> dict[str, int]:
    """Add up what the lists expect and what the runs gave."""
    residual = [family for family in listed if family.residual]
    return {
        "families_with_residuals": len(residual),
        "fully_verified": sum(is_full(family, rows.get((family.source, family.name), {})) for family in residual),
        "blocks": sum(family.published or 0 for family in residual),
        "blocks_verified": sum(
            min(rows.get((f.source, f.name), {}).get("verified", 0), f.published)
            for f in residual
            if f.published is not None
        ),
    }


def is_full(family: Family, row: dict[str, Any]) -> bool:
    """Whether all blocks that the architecture has were found, and all of them passed every check."""
    if not row or row["error"] or row["verified"] != row["found"] or any(row["problems"].values()):
        return False
    return row["found"] == family.published if family.published is not None else row["found"] > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", choices=sorted(SOURCES), help="one source only")
    parser.add_argument("pattern", nargs="?", default="", help="part of the families' names")
    parser.add_argument("--quick", action="store_true", help="a fixed spread of 40 families, under 50 s")
    parser.add_argument("--again", action="store_true", help="run what has run before as well")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    options = parser.parse_args()

    listed: list[Family] = []
    missing = []
    for source in [options.source] if options.source else SOURCES:
        if options.quick and source not in QUICK:
            continue
        if not is_installed(source):
            missing.append(source)
            print(f"{source} is not installed: its families are skipped")
            continue
        listed += [f for f in families(source) if options.pattern in f.name]
    if options.quick:
        listed = [family for family in listed if family.name in QUICK[family.source]]

    cache = CACHE / ("quick.jsonl" if options.quick else "full.jsonl")
    cache.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    if options.quick or (options.again and not options.source):
        cache.unlink(missing_ok=True)
    elif cache.exists():
        rows = {(row["source"], row["name"]): row for row in map(json.loads, cache.read_text().splitlines())}
    for source in {family.source for family in listed}:
        importlib.import_module(SOURCES[source][1])
    # Loaded once: every process is a fork of this one.
    for module in ("coverage_checks", "resect.blocks.find", "resect.shrink.files", "torch._dynamo"):
        importlib.import_module(module)
    todo = [f for f in listed if options.again or (f.source, f.name) not in rows]
    with cache.open("a") as lines:
        for row in run_all(todo, options.jobs, TIMEOUT):
            key = row["source"], row["name"]
            rows[key] = row
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            family = next(f for f in listed if (f.source, f.name) == key)
            good = is_full(family, row) if family.residual else row["found"] == 0 and not row["error"]
            print(
                f"{'ok ' if good else 'BAD'} {family.source:12s} {family.name:44s} {row['verified']}/{row['found']}"
                f" of {family.published}  {row.get('seconds', '')} s  {row['error'] or _first(row)}",
                flush=True,
            )
    result = summary(rows, listed)
    if not options.source and not options.quick:
        text = table(listed, rows, result, missing, is_full)
        (ROOT / "docs" / "coverage.md").write_text(text, encoding="utf-8")
    print(json.dumps(result))


def _first(row: dict[str, Any]) -> str:
    """Return the first thing that is wrong, shortened."""
    problems = [f"{check}: {name}: {text}" for check, of in row["problems"].items() for name, text in of.items()]
    return (problems + [f"refused {where}: {reason}" for where, reason in row["refused"]] + [""])[0][:150]


if __name__ == "__main__":
    main()
