"""What cannot be drawn is left out of the figures of feature reuse, and their titles say what was found."""

from __future__ import annotations

import json

from report_fakes import angular_distance, block_response, cka, gate_closed, probes, strict_identity

from resect.report.figures import FIGURES


def spec(name, rows):
    return FIGURES[name](rows).to_dict()


def drawn(panel):
    """The rows of a panel and of its layers."""
    views = [panel, *panel.get("layer", [])]
    return [row for view in views for row in json.loads(view.get("data", {}).get("values", "[]"))]


def test_depths_without_a_value_leave_a_hole():
    for name, rows, column in (("cka", cka(), "cka"), ("angular_distance", angular_distance(), "distance")):
        for panel in spec(name, rows)["concat"]:
            values = [row[column] for row in drawn(panel)]
            assert values
            assert None not in values


def test_a_branch_of_size_zero_has_no_logarithm():
    sizes, angles, _ = spec("block_response", block_response())["vconcat"]
    assert 7 not in [row.get("index") for row in drawn(sizes)]
    assert 7 in [row.get("index") for row in drawn(angles)]


def test_a_quantity_that_no_row_has_gets_no_panel():
    rows = [row | {"descent": None} for row in block_response()]
    assert len(spec("block_response", rows)["vconcat"]) == 2


def test_titles_say_what_was_found():
    rows = [row for row in strict_identity() if row["net"] == "plain"]
    within = {row["index"] for row in rows if row["quantile"] == 1 and row["response"] <= 2.5}
    assert spec("strict_identity", rows)["title"]["text"].startswith(f"{len(within)} of 54 blocks stay within ε = 2.5")
    title = spec("gate_closed", gate_closed())["title"]["text"]
    shares = [row["closed"] for row in gate_closed() if row["batch"] == 64]
    assert f"on {100 * sum(shares) / len(shares):.1f} % of batches of 64" in title
    assert "gets 29.4 % right before all blocks, 95.1 % after" in spec("probes", probes())["title"]["text"]


def test_many_nets_leave_the_title_short():
    rows = [row | {"net": f"{row['net']} number {seed}"} for seed in range(4) for row in block_response()]
    assert len(spec("block_response", rows)["title"]["text"]) < 130
