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
import hashlib
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
from coverage_models.quick import QUICK
from coverage_table import table

ROOT = Path(__file__).parents[1]
CACHE = ROOT / "build" / "coverage"
TIMEOUT = 600
MEMORY = 8 << 30


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


def fingerprint() -> str:
    """Return a hash of the library and the checks: what another code gave does not count."""
    folders = ("src/resect/blocks/*.py", "src/resect/shrink/*.py", "benchmarks/coverage_[cr]*.py")
    files = [path for folder in folders for path in ROOT.glob(folder)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:12]


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
    parser.add_argument("--stale", action="store_true", help="keep what other code gave; the table counts such rows")
    parser.add_argument("--table", action="store_true", help="run nothing: write the table of what has been run")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    options = parser.parse_args()

    # The denominators count every listed family, also of a source that is not installed here.
    listed = [family for source in [options.source] if source for family in families(source)]
    listed = listed or [family for source in SOURCES for family in families(source)]
    listed = [family for family in listed if options.pattern in family.name]
    if options.quick:
        listed = [family for family in listed if family.name in QUICK[family.source]]
    missing = [source for source in dict.fromkeys(f.source for f in listed) if not is_installed(source)]
    for source in missing:
        print(f"{source} is not installed: its families are not run")

    code = fingerprint()
    cache = CACHE / ("quick.jsonl" if options.quick else "full.jsonl")
    cache.parent.mkdir(parents=True, exist_ok=True)
    if options.quick:
        cache.unlink(missing_ok=True)
    rows = read(cache, None if options.stale else code)
    todo = [f for f in listed if f.source not in missing and (options.again or (f.source, f.name) not in rows)]
    todo = [] if options.table else todo
    preload({family.source for family in todo})
    of_key = {(family.source, family.name): family for family in listed}
    with cache.open("a") as lines:
        for row in run_all(todo, options.jobs, TIMEOUT):
            key = row["source"], row["name"]
            rows[key] = row | {"code": code}
            lines.write(json.dumps(rows[key]) + "\n")
            lines.flush()
            print(line(of_key[key], row), flush=True)
    result = summary(rows, listed)
    if not options.source and not options.quick:
        (ROOT / "docs" / "coverage.md").write_text(table(listed, rows, result, code, is_full), encoding="utf-8")
    print(json.dumps(result))


def read(cache: Path, code: str | None) -> dict[tuple[str, str], dict[str, Any]]:
    """Return what earlier runs of the same code (None: of any) found, by source and name."""
    found = map(json.loads, cache.read_text().splitlines()) if cache.exists() else ()
    return {(row["source"], row["name"]): row for row in found if code in (None, row.get("code"))}


def preload(sources: set[str]) -> None:
    """Import once what every process needs: each is a fork of this one."""
    modules = ("coverage_checks", "resect.blocks.find", "resect.shrink.files", "torch._dynamo")
    for module in (*(SOURCES[source][1] for source in sources), *modules):
        importlib.import_module(module)


def line(family: Family, row: dict[str, Any]) -> str:
    """Say in one line what a family gave, and the first thing that is wrong with it."""
    good = is_full(family, row) if family.residual else row["found"] == 0 and not row["error"]
    return (
        f"{'ok ' if good else 'BAD'} {family.source:12s} {family.name:44s} {row['verified']}/{row['found']}"
        f" of {family.published}  {row.get('seconds', '')} s  {row['error'] or _first(row)}"
    )


def _first(row: dict[str, Any]) -> str:
    """Return the first thing that is wrong, shortened."""
    problems = [f"{check}: {name}: {text}" for check, of in row["problems"].items() for name, text in of.items()]
    return (problems + [f"refused {where}: {reason}" for where, reason in row["refused"]] + [""])[0][:150]


if __name__ == "__main__":
    main()
