"""Write ``docs/coverage.md``: a row per family."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from coverage_models import SOURCES, Family

Rows = dict[tuple[str, str], dict[str, Any]]

_HEAD = """\
# Coverage

Which models Resect handles, measured by `python benchmarks/coverage.py`; this file is written by it.

For each family a small variant with random weights is built. Its blocks are found; then each is closed alone, all
together and in random subsets, scaled, removed, saved, loaded and trained without. Every result is compared with an
oracle that shares no code with the library: it runs the whole model and replaces one operand of one addition.

- **expected**: residual blocks that this variant's architecture has, from the paper or the modeling code, written down
  beforehand in `benchmarks/coverage_models/`. A dash: the structure gives no single number. Three rows were put right
  after a first run, from the modeling code: NASNet and PNASNet (pooled shortcuts in the cells that halve the picture)
  and GCViT (the convolutions of its global queries). After failures, examples changed too: Reformer without its own
  kind of cache, the Wav2Vec2 relatives without augmentation from NumPy's generator. Two checks were loosened: where
  experts depend on values, operations are counted in the oracle's run; a branch without weights need not lose any.
- **verified**: blocks that passed every check that was run; the last column names a train-mode check that could not
  be. Equal means equal to the bit; scaled branches may differ by
  1e-4 of the largest value (the largest seen is given below).
- **use**: how much a family is used, a judgement of the lists' authors, not a measurement.
"""


def table(
    listed: Sequence[Family],
    rows: Rows,
    result: dict[str, int],
    code: str,
    is_full: Callable[[Family, dict[str, Any]], bool],
) -> str:
    """Return the whole page."""
    parts = [_HEAD, _versions(), ""]
    parts.append(
        f"**{result['fully_verified']} of {result['families_with_residuals']} families with residual blocks are "
        f"verified in full; {result['blocks_verified']} of {result['blocks']} blocks.**"
    )
    for use in ("high", "middle", "low"):
        some = [family for family in listed if family.residual and family.weight == use]
        good = sum(is_full(family, rows.get((family.source, family.name), {})) for family in some)
        parts.append(f"- {use} use: {good} of {len(some)} families in full")
    errors = [row["notes"].get("scaled_error", 0) for row in rows.values() if row.get("notes")]
    parts.append(f"- largest difference of a scaled branch from the oracle: {max(errors, default=0):.1g}")
    skipped = sum(bool(family.trains) and family.residual for family in listed)
    parts.append(f"- train-mode check not run: {skipped} families, with the reason in their row")
    absent = sum((family.source, family.name) not in rows for family in listed)
    if absent:
        parts.append(f"- not run: {absent} families; they count as not verified")
    stale = sum(row.get("code") != code for row in rows.values())
    if stale:
        parts.append(f"- run with an earlier version of the code: {stale} families")
    for source in SOURCES:
        some = [family for family in listed if family.source == source]
        if some:
            parts += [
                "",
                f"## {source}",
                "",
                "| family | use | expected | verified | seconds | |",
                "|---|---|---|---|---|---|",
            ]
            parts += [_row(family, rows.get((family.source, family.name)), is_full) for family in some]
    return "\n".join(parts) + "\n"


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for package in ("torch", "timm", "torchvision", "transformers"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"Versions: {', '.join(found)}; one CPU thread."


def _row(family: Family, row: dict[str, Any] | None, is_full: Callable[[Family, dict[str, Any]], bool]) -> str:
    expected = "–" if family.published is None else str(family.published)
    if row is None:
        return f"| {family.name} | {family.weight} | {expected} | | | not run |"
    remark = "" if is_full(family, row) or (not family.residual and row["found"] == 0) else _remark(family, row)
    if not family.residual and not remark:
        remark = f"no residual block: {family.where}"
    if family.trains and family.residual:
        remark = "; ".join(filter(None, [remark, f"train mode not checked: {family.trains}"]))
    cells = [family.name, family.weight, expected, str(row["verified"]), f"{row.get('seconds', 0):.1f}", remark]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _remark(family: Family, row: dict[str, Any]) -> str:
    """Say what is missing, each reason once."""
    if row["error"]:
        return f"fails: {_short(row['error'])}"
    remarks = []
    if family.published is not None and row["found"] + len(row["refused"]) != family.published:
        remarks.append(f"{row['found']} found")
    reasons: dict[str, int] = {}
    for _, reason in row["refused"]:
        reasons[_short(reason)] = reasons.get(_short(reason), 0) + 1
    remarks += [f"{count} refused: {reason}" for reason, count in reasons.items()]
    for of_check in row["problems"].values():
        remarks += [_short(text) for text in dict.fromkeys(of_check.values())]
    return "; ".join(dict.fromkeys(remarks))


def _short(text: str, length: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"
