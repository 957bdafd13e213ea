"""Do residual blocks far apart learn the same features? A spiral, 32 blocks, three ways to train.

    python examples/feature_reuse.py --out feature-reuse              # one seed, seconds
    python examples/feature_reuse.py --out feature-reuse --seeds 5    # with spread, and compared across nets

Writes ``report.html`` (works offline), ``figures/*.png``, ``data/*.csv`` and ``seeds.csv``, the numbers of every seed.
``METHODS`` in ``resect.lab.spiral`` says how each net is trained. What the numbers show, and what they do not:
``docs/examples/feature-reuse.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from resect.lab.reuse import figure_rows, measure, sections, table_rows
from resect.lab.spiral import Setting, train_all
from resect.report.html import write_data, write_report
from resect.report.provenance import provenance
from resect.report.rows import write_rows


def main(arguments: Sequence[str] | None = None) -> Path:
    """Train, compare, print the table, write everything; return the path of the report."""
    parser = argparse.ArgumentParser(description="Feature reuse in residual blocks, on a spiral.")
    parser.add_argument("--out", type=Path, default=Path("feature-reuse"), help="folder to write to")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds; the figures show the first")
    parser.add_argument("--steps", type=int, default=Setting.steps, help="optimizer steps of each training")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.steps < 10:
        parser.error("--seeds must be at least 1 and --steps at least 10")

    setting = Setting(steps=options.steps)
    runs = {}
    for seed in range(options.seeds):
        print(f"seed {seed}: {setting.blocks} blocks, {setting.steps} steps with each method", flush=True)
        runs[seed] = train_all(setting, seed)

    measured = measure(runs, setting)
    table = table_rows(measured)
    for row in [dict(zip(table[0], table[0], strict=True)), *table]:
        print("  ".join(f"{cell!s:<22}" for cell in row.values()).rstrip())

    write_rows(options.out / "seeds.csv", measured)
    for figure, rows in figure_rows(runs[0]).items():
        write_data(options.out, figure, rows)
    summary = "What 32 residual blocks learn on a spiral, trained in three ways, and which blocks learn the same."
    page = write_report(options.out, "Feature reuse", summary, sections(table), provenance(list(runs)))
    print(f"wrote {page}")
    return page


if __name__ == "__main__":
    main()
