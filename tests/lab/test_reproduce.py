"""One recipe by every method: run, stopped, gone on with, tabulated."""

import json
import subprocess
import sys

import pytest

import resect
from resect.lab import reproduce, runs
from resect.lab.data import mean_std, normalize
from resect.lab.evaluate import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:.*start just below", "ignore:.*below 6")


def test_every_method_and_seed_once_then_nothing_more(tmp_path):
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(
        '[model]\nname = "cifar-preresnet-8"\noptions = { widths = [4, 4, 8] }\n[data]\nname = "digits"\n'
        '[train]\nepochs = 1\nbatch_size = 256\ntensorboard = false\nprecision = "fp32"\n'
    )
    command = [sys.executable, "-W", "ignore", "-m", "resect.lab.reproduce", str(recipe), "--seeds", "0,1"]
    command += ["--out", str(tmp_path / "out")]
    first = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*/metrics.json")}
    assert len(times) == 8
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert again.stdout == first.stdout == (tmp_path / "out" / "table.md").read_text() + "\n"
    assert times == {file: file.stat().st_mtime_ns for file in times}
    rows = reproduce.collect(tmp_path / "out")
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in reproduce.METHODS for s in (0, 1)]
    model, used, data = runs.open_run(tmp_path / "out" / "ResidualDroppath-1")
    assert (used.method.name, used.train.seed) == ("residual-droppath", 1)
    wanted = evaluate(model, normalize(data.test.images, *mean_std(data.train)), data.test.labels)
    assert next(row for row in rows if (row["method"], row["seed"]) == ("ResidualDroppath", 1))["error"] == wanted
    assert (tmp_path / "out" / "removal.png").stat().st_size > 10_000


def test_the_table_pairs_by_seed():
    errors = {"plain": [10.0, 12.0, 14.0], "stochastic depth": [9.0, 11.0, 10.0], "ε-ResNet": [11.0]}
    rows = [
        {"method": name, "seed": seed, "error": error, "images_per_second": 300.0 + seed}
        for name, values in errors.items()
        for seed, error in enumerate(values)
    ]
    lines = reproduce.table(rows).splitlines()
    assert lines[2] == "| plain | 10.00, 12.00, 14.00 | 12.00 ± 2.00 |  | 302 |"
    mean, low, high = -2.0, *resect.analyse.interval.interval([-1.0, -1.0, -4.0])
    assert (
        lines[3]
        == f"| stochastic depth | 9.00, 11.00, 10.00 | 10.00 ± 1.00 | {mean:+.2f} ({low:+.2f} … {high:+.2f}) | 302 |"
    )
    assert lines[4] == "| ε-ResNet | 11.00 | 11.00 | +1.00 | 300 |"


def test_the_recipe_is_the_same_but_for_method_and_seed():
    found = reproduce.jobs("digits-plain", ["train.epochs=3"], [0, 4], reproduce.Path("x"))
    assert [job.recipe["train"]["seed"] for job in found] == [0] * 4 + [4] * 4
    same = [job.recipe | {"method": None, "train": job.recipe["train"] | {"seed": 0}} for job in found]
    stripped = {json.dumps(recipe) for recipe in same}
    assert len(stripped) == 1
