"""The main job end to end, on a net small enough for a test: everything it promises is there afterwards."""

from __future__ import annotations

import csv
import json

import pytest
import torch

import resect
from resect.lab import recipe, runs
from resect.lab.demo import run as demo
from resect.lab.demo import speed
from resect.lab.demo.crossval import differences
from resect.lab.reuse import spiral_rows
from resect.lab.spiral import Setting
from resect.report.html import redraw

SMALL = [
    "model.name=cifar-preresnet-20",
    "model.options={ widths = [4, 4, 8] }",
]
GATE = [
    "method.skip_muted_after=4",
    "method.epsilon=4.6",
]


class Silent:
    def stage(self, text):
        self.last = text

    def steps(self, name, done, total):
        pass


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "out"
    read = recipe.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "SPEED_MODELS", ("torchvision:resnet18",))
        changed = {"digits-epsilon": SMALL + GATE}
        patch.setattr(demo.recipes, "read", lambda name, changes: read(name, [*changes, *changed.get(name, SMALL)]))
        setting = Setting(blocks=6, width=3, steps=12, points=40)
        patch.setattr(demo, "spiral_rows", lambda seed: spiral_rows(seed, setting))
        page = demo.demo(folder, Silent(), epochs=6, seed=0)
    return folder, page


def test_everything_promised_is_there(report):
    folder, page = report
    assert page == folder / "report.html"
    assert page.stat().st_size > 100_000
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert figures == {path.stem for path in (folder / "figures").glob("*.svg")}
    assert figures == {path.stem for path in (folder / "data").glob("*.csv")}
    assert {
        "chain",
        "speed",
        "training",
        "lesion_each",
        "lesion_random",
        "path_lengths",
        "gradients",
        "removal",
    } <= figures
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["lesions"]["blocks"] == 9
    assert not [path for path in folder.parent.iterdir() if path != folder]


def test_the_cut_net_is_the_gated_one_and_reloads(report):
    folder, _ = report
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["cut"]["muted"], "this net is to have muted blocks, or the test proves nothing"
    assert metrics["cut"]["reloaded_equal"]
    gated, used, data = runs.open_run(folder / "runs" / "gated")
    cut = resect.load(folder / "cut", runs.build_model(used, data)).eval()
    x = torch.randn(8, 1, 8, 8)
    with torch.no_grad(), resect.closed(gated, resect.find_blocks(gated, x).select(metrics["cut"]["muted"])):
        assert torch.equal(gated(x), cut(x))
    table = {row["net"]: row for row in metrics["table"]}
    assert set(table) == {"plain", "gated (ε)", "cut", "cut shape from scratch"}
    assert table["cut"]["parameters"] == sum(p.numel() for p in cut.parameters())
    assert table["cut"]["parameters"] == table["cut shape from scratch"]["parameters"]
    assert table["cut"]["FLOPs (M)"] < table["plain"]["FLOPs (M)"]


def test_it_can_be_drawn_again(report):
    folder, page = report
    before = page.read_text()
    with (folder / "data" / "lesion_random.csv").open() as file:
        assert {int(row["k"]) for row in csv.DictReader(file)} == {1, 2, 4, 8}
    assert redraw(folder) == page
    assert len(page.read_text()) == len(before)


def test_four_methods_are_compared_at_equal_steps(report):
    folder, _ = report
    metrics = json.loads((folder / "metrics.json").read_text())
    with (folder / "data" / "removal.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = {}
    for row in rows:
        first.setdefault(row["net"], int(row["removed"]))
    assert first == {
        "plain": 0, "stochastic depth": 0, "ResidualDroppath": 0, "gated (ε)": len(metrics["cut"]["muted"])
    }  # fmt: skip
    table = {row["net"]: row["test error (%)"] for row in metrics["table"]}
    errors = {(row["net"], int(row["removed"])): float(row["error"]) for row in rows}
    assert errors["plain", 0] == pytest.approx(table["plain"] / 100)
    assert errors["gated (ε)", first["gated (ε)"]] == pytest.approx(table["cut"] / 100)
    steps = {json.loads((run / "recipe.json").read_text())["train"]["epochs"] for run in (folder / "runs").iterdir()}
    assert steps == {6}


def test_an_interrupted_demo_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "measure_speed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.demo(tmp_path / "out", Silent(), epochs=1)
    assert not list(tmp_path.iterdir())


def test_differences_are_paired():
    rows = [{"plain": 1.0, "cut": 3.0}, {"plain": 2.0, "cut": 4.0}, {"plain": 5.0, "cut": 7.0}]
    (row,) = differences(rows)
    assert row == {"difference": "cut − plain", "mean (points)": 2.0, "low": 2.0, "high": 2.0}
