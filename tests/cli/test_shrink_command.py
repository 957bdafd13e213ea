"""``resect shrink`` as a stranger uses it: what can be checked is told at once and first, nothing is overwritten."""

from __future__ import annotations

import json
import signal
from dataclasses import replace

import pytest
import torch

import resect as package
from resect.cli.words import in_options
from resect.errors import InputError
from resect.lab import recipe
from resect.lab.display import Bars
from resect.lab.open import open_model
from resect.lab.trainer import train
from resect.report.costs import eager

CHANGES = ["model.name=cifar-preresnet-14", "model.options={widths = [4, 4, 8]}", "train.epochs=1"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a net that was trained for an epoch."""
    folder = tmp_path_factory.mktemp("runs") / "net"
    train(recipe.read("digits-plain", CHANGES), folder)
    return str(folder)


def evidence(folder):
    return json.loads((folder / "plan.json").read_text())["evidence"]


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ["--names", " , ", "--fewer", "flps=0.3,latency", "--by", "lesions", "--search", "greddy"],
            ["flps", "'latency' must look", "--names names no block", "'lesion'?", "'greedy'?", "Where shall"],
        ),
        (["--recover-by", "mimic", "--names", "a"], ["nothing how long: add --recover EPOCHS"]),
        (["--rounds", "2", "--blocks", "2"], ["nothing heals: add --recover"]),
        (["--resume", "--names", "a"], ["there is none: add --recover EPOCHS"]),
        (["--rounds", "3", "--blocks", "2", "--recover", "1"], ["--rounds 3 is more than --blocks 2"]),
        (["--rounds", "2", "--names", "a", "--recover", "1"], ["it goes with --blocks N"]),
        (["--rounds", "2", "--blocks", "2", "--fewer", "flops=0.1", "--recover", "1"], ["without other wishes"]),
        (["--rounds", "2", "--blocks", "2", "--recover", "1", "--replace"], ["--rounds and --replace do not"]),
        (["--blocks", "2", "--by", "random", "--search", "greedy"], ["changes nothing of --by random"]),
        (["--blocks", "2", "--by", "size", "--search", "beam"], ["--search beam compares", "goes with --by lesion"]),
        (["--names", "a", "--out", "cut", "--report", "cut"], ["--report cut is --out, too"]),
        (["--names", "a", "--out", "r/cut", "--report", "r"], ["--out r/cut lies in --report r: give each a place"]),
        (["--names", "a", "--export", "r/a.pt2", "--report", "r"], ["--export r/a.pt2 lies in --report r"]),
        (["--names", "a", "--recover", "1", "--resume", "--out", "b"], ["'b-unfinished' holds 'notes', not written"]),
        (["--names", "a", "--from-scratch"], ["--from-scratch is a row of the report: add --report FOLDER"]),
        (["--names", "a", "--report", "full"], ["--report: 'full' holds 'thesis.tex', not written here"]),
        (["--names", "a", "--out", "full"], ["--out: full holds 'thesis.tex' already"]),
        (["--names", "a", "--out", "full/thesis.tex"], ["--out: full/thesis.tex is a file"]),
        (["--names", "a", "--export", "a.onnx"], ["--export: 'a.onnx' is a folder"]),
        (["--names", "a", "--out", "full/thesis.tex/cut"], ["full/thesis.tex is no folder that may be written to"]),
        (["--names", "a", "--export", "full/thesis.tex/a.pt2"], ["--export: full/thesis.tex/a.pt2 cannot be written"]),
    ],
)
def test_what_needs_no_model_is_told_together_before_one_is_opened(resect, tmp_path, arguments, messages):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    (tmp_path / "a.onnx").mkdir()
    (tmp_path / "b-unfinished" / "notes").mkdir(parents=True)
    code, _, err = resect("shrink", "runs/nothing", *arguments)
    assert code == 1
    assert "There is no folder" not in err
    for message in messages:
        assert message in err.replace("\n", " ")


def test_the_folder_one_is_in_is_no_place_for_a_cut(resect, tmp_path):
    code, _, told = resect("shrink", "a", "--names", "b", "--recover", "1", "--out", ".")
    assert code == 1
    assert "--out: '.' is the folder that you are in" in told
    (tmp_path / "thesis.tex").touch()
    code, _, told = resect("shrink", "a", "--names", "b", "--recover", "1", "--out", ".")
    assert code == 1
    assert "--out: . holds 'thesis.tex' already" in told


def test_an_earlier_cut_is_never_overwritten(resect, run, tmp_path):
    (tmp_path / "cut").mkdir()  # an empty folder is no cut
    assert resect("shrink", run, "--names", "layer1.0", "--out", "cut")[0] == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()}
    code, _, err = resect("shrink", "runs/nothing", "--names", "layer1.1", "--out", "cut")
    assert code == 1
    assert "--out: cut holds a cut model already: choose another folder, or delete it." in err
    assert "There is no folder" not in err
    code, _, err = resect("shrink", run, "--names", "layer1.1", "--out", run)
    assert code == 1
    assert "holds a run already" in err
    assert {path.name: path.read_bytes() for path in (tmp_path / "cut").iterdir()} == before
    assert resect("shrink", run, "--names", "layer1.1", "--limit", "32", "--out", "cut", "--dry-run")[0] == 0


def test_what_the_model_cannot_be_asked_for_is_told_before_the_work(resect, run, tmp_path, monkeypatch):
    def works(*_, **__):
        raise AssertionError("the work began")

    monkeypatch.setattr("resect.remove", works)
    monkeypatch.setattr("resect.lab.shrink.choosing.by_rank", works)
    blocks, given = ["--blocks", "6"], ["--limit", "32", "--out", "cut"]
    for arguments, message in (
        ([*blocks, "--keep", "layer1.0,layer9"], "--keep: Unknown residual block 'layer9'"),
        ([*blocks, "--keep", "layer1.0"], "--blocks 6: there are 5 blocks that may go"),
        (["--names", "layer1.0,layr2.0,x"], "2 problems"),
    ):
        code, _, err = resect("shrink", run, *arguments, *given)
        assert code == 1
        assert message in err.replace("\n", " ")
    code, _, err = resect("shrink", "cifar-preresnet-8", "--names", "layer1.0", "--recover", "1", *given)
    assert code == 1
    assert "has no data of its own" in err.replace("\n", " ")
    opened = open_model(run)
    blocks = package.find_blocks(opened.model, opened.example())
    package.Plan.of(blocks, ["layer1.0"]).save(tmp_path / "plan.json")
    code, _, err = resect("shrink", "cifar-preresnet-8", "--plan", "plan.json", *given)
    assert code == 1
    assert "layer1.0/conv1 has 4,640 parameters here, and 296 parameters in the plan" in err.replace("\n", " ")
    assert "it has no block layer3.1/conv1" in err.replace("\n", " ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


def test_what_is_out_of_reach_is_told_in_the_words_of_the_options(resect, run):
    wanted = ["--by", "last", "--fewer", "flops=0.9", "--keep", "layer1.0,layer1.1", "--dry-run"]
    code, _, err = resect("shrink", run, *wanted)
    assert code == 1
    assert "the most that can go: --blocks 4 with" in err.replace("\n", " ")


def test_cut_a_little_heal_and_again_by_mimicking_then_compactly(resect, run, tmp_path):
    wanted = ["--blocks", "2", "--rounds", "2", "--recover", "2", "--recover-by", "mimic", "--compact"]
    choice = ["--keep", "layer1.0,layer2.0,layer3.0", "--by", "size", "--limit", "100"]
    code, out, err = resect("shrink", run, *wanted, *choice, "--out", "cut")
    assert code == 0, err
    assert "Round 2 of 2." in err
    assert "trained for 4 epochs" in out
    found = evidence(tmp_path / "cut")
    assert found["recovered"] == {"epochs": 4, "by": ["mimic"]}
    deleted = found["compact"]["layers"]
    assert len(deleted) == 2
    assert f"Layers deleted: {', '.join(deleted)} " in out
    small = open_model(str(tmp_path / "cut")).model
    assert sum(len(stage) for stage in (small.layer1, small.layer2, small.layer3)) == 4
    assert "as its teacher (mimic)" in (tmp_path / "cut" / "README.md").read_text()
    # It was healed, goes on like any cut, and says only what went now.
    uncut = open_model(run).model
    assert not torch.equal(small.layer1[0].conv1.weight, uncut.layer1[0].conv1.weight)
    code, out, err = resect("shrink", "cut", "--names", "layer1.0", "--recover", "1", "--compact", "--out", "cut2")
    assert code == 0, err
    assert out.startswith("1 residual block to go, chosen by names:\n  layer1.0/conv1 ")
    assert "Layers deleted: layer1.0 " in out
    assert evidence(tmp_path / "cut2")["recovered"] == {"epochs": 5, "by": ["mimic", "distil"]}
    # Its plan says what goes, not what was done: the next one may be cut otherwise.
    code, out, err = resect("shrink", run, "--plan", "cut2", "--out", "cut3")
    assert code == 0, err
    assert "compact" not in evidence(tmp_path / "cut3")
    assert len(open_model(str(tmp_path / "cut3")).model.layer1) == 2


def test_a_cut_that_is_refused_leaves_nothing_to_go_on_with(resect, run, tmp_path, monkeypatch):
    def refused(*_, **__):
        raise InputError("This cannot be cut.")

    monkeypatch.setattr("resect.remove", refused)
    code, _, err = resect("shrink", run, "--names", "layer1.0", "--recover", "1", "--out", "cut")
    assert code == 1
    assert "This cannot be cut." in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rounds", "how"), [(0.2, "asked"), (1, "asked"), (1.2, "asked"), (1.2, "killed")])
def test_a_recovery_in_rounds_that_is_stopped_goes_on_to_the_same_files(
    resect, run, tmp_path, monkeypatch, rounds, how
):
    asked = ["shrink", run, "--blocks", "4", "--by", "size", "--rounds", "2", "--recover", "1", "--compact", "--out"]
    taken, steps, stop_at = [], Bars.steps, [0]

    def counting(self, name, done, total):
        steps(self, name, done, total)
        if name == "recovered":
            taken.append(total)
        if stop_at[0] and len(taken) == stop_at[0]:
            if how == "killed":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Bars, "steps", counting)
    assert resect(*asked, "whole")[0] == 0
    each = taken[0]
    assert len(taken) == 2 * each
    stop_at[0] = round(rounds * each)
    taken.clear()
    code, _, told = resect(*asked, "parts")
    assert code == 130
    assert ("The same command with --resume goes on from there." in told) == (how == "asked")
    assert not (tmp_path / "parts").exists()

    code, _, told = resect(*asked, "parts")
    assert code == 1
    assert "parts-unfinished holds a recovery that was stopped: go on with --resume" in told
    code, _, told = resect(*asked, "parts", "--resume", "--limit", "500")
    assert code == 1
    assert "limit was 1000, and is 500" in told

    before, stop_at[0] = stop_at[0], 0
    taken.clear()
    assert resect(*asked, "parts", "--resume")[0] == 0
    assert len(taken) == (2 * each - before if how == "asked" else each)
    assert not (tmp_path / "parts-unfinished").exists()
    for file in ("model.safetensors", "plan.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_in_rounds_a_layer_of_which_one_block_is_kept_stays_whole(resect, tmp_path):
    tiny = [word for size in ("img_size=8", "patch_size=4", "embed_dim=16", "depth=4", "num_heads=2")
            for word in ("--option", size)]  # fmt: skip
    wanted = ["--data", "digits", "--limit", "64", "--by", "last", "--rounds", "2", "--recover", "1"]
    asked = ["shrink", "timm:vit_tiny_patch16_224", *tiny, *wanted, "--keep", "blocks.2/attn", "--out", "cut"]
    code, _, told = resect(*asked, "--blocks", "4")
    assert code == 1
    assert "--blocks 4: there are 3 layers that may go" in told
    assert resect(*asked, "--blocks", "2")[0] == 0
    gone = {block["name"] for block in json.loads((tmp_path / "cut" / "plan.json").read_text())["blocks"]}
    assert gone == {f"blocks.{layer}/{part}" for layer in (0, 1) for part in ("attn", "mlp")}


def test_a_dry_run_measures_itself_whatever_a_plan_says(resect, run, tmp_path):
    opened = open_model(run)
    blocks = package.find_blocks(opened.model, opened.example())
    told = {"measured_ms": {"1": {"whole": [999.0, 1.0], "cut": [1.0, 0.1]}}}
    plan = package.Plan.of(blocks, ["layer1.0"])
    replace(plan, evidence=told).save(tmp_path / "plan.json")
    code, out, _ = resect("shrink", run, "--plan", "plan.json", "--dry-run", "--limit", "5000")
    assert code == 0
    assert "Latency at batch 1:" in out
    assert "999.00" not in out
    assert f"on {len(opened.images('train')[0])} training images, before recovery" in out.replace("\n", " ")


def test_the_librarys_arguments_become_options():
    options = {"n": "--blocks", "keep": "--keep", "fewer": "--fewer", "compact": "--compact", "by": "--by"}
    for said, meant in (
        ("the nearest: choose(n=3).", "the nearest: --blocks 3."),
        ("keep= holds 'a'", "--keep holds 'a'"),
        ("goes with by='lesion', not", "goes with --by lesion, not"),
        ("Remove without compact=True, and", "Remove without --compact, and"),
        ("n=12 with 3.5% less", "--blocks 12 with 3.5% less"),
        ("option 'keep=3' must", "option 'keep=3' must"),
        ("data.n=3, then=4 and --by=5", "data.n=3, then=4 and --by=5"),
    ):
        assert in_options(said, options) == meant
    assert in_options("n=3", {}) == "n=3"


def test_the_report_shows_the_shape_from_scratch(resect, run, tmp_path, monkeypatch):
    monkeypatch.setattr("resect.lab.shrink.report.usable", lambda model, example: ({"eager": eager}, {}))
    places = ["--out", str(tmp_path / "cut"), "--report", str(tmp_path / "report"), "--from-scratch"]
    code, _, err = resect("shrink", run, "--blocks", "2", "--by", "last", *places)
    assert code == 0, err
    table = json.loads((tmp_path / "report" / "report.json").read_text())["sections"][0]["table"]
    assert [row["net"] for row in table] == ["uncut", "from scratch", "cut"]
    scratch = open_model(str(tmp_path / "cut-from-scratch")).model
    assert sum(p.numel() for p in scratch.parameters()) == table[1]["parameters"] == table[2]["parameters"]
    assert table[1]["error (%)"] != table[2]["error (%)"]

    code, _, err = resect("shrink", run, "--names", "layer1.1", "--out", str(tmp_path / "cut"), *places[2:])
    assert code == 1
    assert "cut-from-scratch is there already" in err

    other = ["--names", "layer1.1", "--data", "digits", "--out", str(tmp_path / "other"), *places[2:]]
    code, _, err = resect("shrink", "cifar-preresnet-14", *other)
    assert code == 1
    assert "trains by the recipe of a run" in err
