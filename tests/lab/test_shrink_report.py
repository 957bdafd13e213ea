import json

import pytest
import torch
from tiny_runs import tiny

import resect
from resect.lab import runs
from resect.lab.data import open_data
from resect.lab.open import Opened
from resect.lab.shrink import report as shrink_report
from resect.report.costs import eager
from resect.report.rows import read_rows
from resect.report.schema import COLUMNS


def test_class_errors_by_hand() -> None:
    model = torch.nn.Identity()
    model.weight = torch.nn.Parameter(torch.zeros(1))  # for its device
    labels = torch.tensor([0, 0, 2, 2])
    logits = torch.nn.functional.one_hot(torch.tensor([0, 1, 2, 2]), 3).float()
    assert shrink_report.class_errors(model, logits, labels, 4) == (0.25, [0.5, None, 0.0, None])


def test_the_report_of_a_cut(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shrink_report, "usable", lambda model, example: ({"eager": eager}, {"compiled": "no compiler."})
    )
    recipe = tiny()
    data = open_data(recipe.data.name, **recipe.data.options)
    torch.manual_seed(0)
    opened = Opened("tiny", runs.build_model(recipe, data).eval(), recipe, data)
    blocks = resect.find_blocks(opened.model, opened.example())
    batches = opened.batches("train", 64)
    costs = resect.block_costs(opened.model, blocks, opened.example(), batches=(1, 8), rounds=2)
    ranking = resect.rank(opened.model, blocks, batches, metric="cross_entropy")
    plan = ranking.choose(n=1)
    small = resect.remove(opened.model, blocks, plan)
    page = shrink_report.shrink_report(
        tmp_path / "report", opened, blocks, plan, {"cut": small}, ranking=ranking, block_costs=costs, batch=8, limit=64
    )
    assert page.is_file()
    folder = tmp_path / "report"
    trade = read_rows(folder / "data" / "cut_trade.csv", COLUMNS["cut_trade"])
    assert {row["choice"] for row in trade} == {"lesion", "last", "random", "cut"}
    cut = next(row for row in trade if row["choice"] == "cut")
    same = next(row for row in trade if row["choice"] == "lesion" and row["removed"] == 1)
    assert (cut["error"], cut["flops"]) == pytest.approx((same["error"], same["flops"]))  # removed = closed
    assert same["ms"] == pytest.approx(costs.latency(plan.names, 8)[0])
    whole = [row for row in trade if not row["removed"]]
    assert len({row["error"] for row in whole}) == 1
    chain = read_rows(folder / "data" / "chain.csv", COLUMNS["chain"])
    assert [row["name"] for row in chain if row["gone"]] == plan.names
    content = json.loads((folder / "report.json").read_text())
    assert content["title"] == "tiny without 1 of its 3 blocks"
    assert [row["net"] for row in content["sections"][0]["table"]] == ["uncut", "cut"]
    assert content["sections"][-1]["note"] == "Not measured compiled: no compiler."
