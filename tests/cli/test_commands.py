"""The command as a new user meets it: in an empty folder, with typos."""

from __future__ import annotations

import csv
import json
import re
import shlex
import signal
from pathlib import Path

import pytest
import torch

from resect.shrink.timed import Latency

TINY = ["model.name=cifar-preresnet-14", "model.options={widths = [4, 4, 8]}", "train.epochs=2"]


def test_find_shows_a_table_and_json(resect):
    code, out, _ = resect("find", "cifar-preresnet-20")
    assert code == 0
    assert "9 residual blocks in 9 layers" in out
    assert "layer2.0/conv2" in out
    code, out, _ = resect("find", "torchvision:resnet18", "--json")
    assert len(json.loads(out)["blocks"]) == 8


def alike(whole, bare, blocks, *_):
    return Latency(torch.ones(1 + len(blocks), dtype=torch.float64), torch.zeros(1 + len(blocks), dtype=torch.float64))


def evidence_of(folder):
    return json.loads((Path(folder) / "plan.json").read_text())["evidence"]


def test_the_steps_alone(resect, tmp_path, monkeypatch):
    code, out, err = resect("train", "digits-epsilon", *TINY, "method.epsilon=0.01", "--out", "runs/a")
    assert code == 0, err
    assert "The run is in runs/a" in out.replace("\n", "")
    code, _, err = resect("train", "digits-epsilon", *TINY, "method.epsilon=0.01", "--out", "runs/a")
    assert code == 1
    assert "holds a run already" in err
    assert resect("train", "digits-epsilon", *TINY, "method.epsilon=0.01", "--out", "runs/a", "--resume")[0] == 0

    code, out, _ = resect("lesion", "runs/a", "--random", "1,2", "--draws", "2", "--limit", "64", "--out", "figures")
    assert code == 0, out
    assert "2 at random" in out
    rows = list(csv.DictReader((tmp_path / "figures" / "lesion.csv").read_text().splitlines()))
    assert len(rows) == 6 + 4

    code, out, _ = resect(
        "paths", "runs/a", "--samples", "2", "--batch", "8", "--blocks", "--initial", "--out", "figures"
    )
    assert code == 0, out
    assert "norm of sum" in out  # the rest of the heading may be on the next line
    assert "Norm of the sum: paths of " in out
    assert "Sum of the norms: paths of " in out
    rows = list(csv.DictReader((tmp_path / "figures" / "gradients_by_moment.csv").read_text().splitlines()))
    assert [row["when"] for row in rows] == ["initialisation"] * 7 + ["as it is"] * 7
    assert rows[3]["norm_of_sum"] != rows[10]["norm_of_sum"]
    for name in ("gradients", "path_lengths", "gradients_by_moment", "block_gradients"):
        assert (tmp_path / "figures" / f"{name}.svg").is_file()
    code, out, _ = resect("paths", "runs/a", "--exact-only", "--max-length", "2", "--batch", "8", "--out", "figures2")
    assert code == 0, out
    assert "≥ 3" in out
    assert (tmp_path / "figures2" / "gradients.png").is_file()

    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = ["--target-latency", "0.8", "--keep", "layer1.0", "--by", "size", "--limit", "64", "--dry-run"]
    with monkeypatch.context() as patch:  # as much time in every block as in all the rest: no test is of real time
        patch.setattr("resect.shrink.costs.timed", alike)
        took = {"whole": (7.0, 0.0), "cut": (5.0, 0.0)}
        patch.setattr("resect.lab.shrink.choosing.measured", lambda *given: {str(batch): took for batch in given[4]})
        code, out, err = resect("shrink", "runs/a", *arguments)
    assert code == 0, err
    assert "2 residual blocks to go" in out
    assert "Choosing takes about" in err
    assert "Latency at batch 32: 7.00 ± 0.00 → 5.00 ± 0.00 ms (-28.6%)" in out
    assert "on 64 training images, before recovery: " in out
    assert "layer1.0/" not in out
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    code, out, err = resect("shrink", "runs/a", "--at-most-worse", "100", "--limit", "64", "--out", "all")
    assert code == 0, err
    assert "6 residual blocks to go" in out

    code, out, err = resect("shrink", "runs/a", "--blocks", "2", "--recover", "1", "--out", "cut")
    assert code == 0, out
    before, after = re.search(r"FLOPs of one sample: ([\d,]+) → ([\d,]+) \(-", out).groups()
    assert int(before.replace(",", "")) > int(after.replace(",", "")) > 0
    assert "Proven equal" in out
    assert "FLOPs of one sample: " in out
    assert "has random weights" not in err
    assert not err.endswith("\n\n")
    evidence, card = evidence_of("cut"), " ".join(Path("cut/README.md").read_text().split())
    assert evidence["recovered"] == {"epochs": 1, "by": ["distil"]}
    assert f"{evidence['test_error']['uncut']:.2f} %" in out
    assert f"→ {evidence['test_error']['cut']:.2f} %" in out
    assert evidence["test_error"]["data"] in card
    assert "trained for 1 epoch, " in card
    assert "`base.json`, beside" in card
    code, out, _ = resect("find", "cut")
    assert code == 0, out
    assert "4 residual blocks" in out
    code, out, _ = resect("shrink", "cut", "--names", "layer1.1", "--out", "cut2")
    assert code == 0, out
    assert evidence_of("cut2")["recovered"] == {"epochs": 1, "by": ["distil"]}
    assert evidence_of("cut2")["test_error"]["uncut"] == evidence["test_error"]["uncut"]
    code, out, _ = resect("shrink", "runs/a", "--plan", "cut", "--out", "cut4")
    assert code == 0, out
    assert "recovered" not in evidence_of("cut4")
    code, out, _ = resect(
        "shrink", "runs/a", "--names", "layer1.1", "--out", "cut3", "--replace", "--export", "cut.pt2"
    )
    assert code == 0, out
    assert "merged into" in out
    assert "batch sizes" in out
    assert (tmp_path / "cut.pt2").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["find", "timm:resnet81"], "Did you mean 'timm:resnet18'"),
        (["find", "cifar-resnet-57"], "6n+2"),
        (["find", "torchvision:vgg11", "--size", "7"], "cannot run on this example"),
        (["find", "cifar-resnet-20", "-o", "widht=3"], "Did you mean 'width"),
        (["find", "cifar-resnet-20", "-o", "widths"], "must look like key=value"),
        (["train", "digits-epsilom"], "Did you mean 'digits-epsilon'"),
        (["train", "digits-plain", "train.epoch=3"], "Did you mean 'epochs'"),
        (["train", "digits-epsilon", "method.epsilon=-1"], "method.epsilon"),
        (["lesion", "runs/nothing"], "There is no folder"),
        (["lesion", "cifar-resnet-20"], "--data digits"),
        (["lesion", "cifar-resnet-20", "--data", "digit"], "Did you mean 'digits'"),
        (["lesion", "cifar-resnet-8", "--data", "digits", "--metric", "top2", "--limit", "8"], "Unknown metric"),
        (["lesion", "cifar-resnet-8", "--data", "digits", "--random", "two", "--limit", "8"], "whole numbers"),
        (["lesion", "torchvision:vgg11", "-o", "num_classes=10", "--data", "digits"], ""),
        (["shrink", "cifar-resnet-8", "--out", "x"], "Nothing says which blocks"),
        (["shrink", "cifar-resnet-8", "--blocks", "1"], "Give --out FOLDER, or --dry-run"),
        (["shrink", "cifar-resnet-8", "--fewer", "latncy=0.3,flops=2", "--dry-run"], "did you mean 'latency'"),
        (["shrink", "cifar-resnet-8", "--fewer", "latency", "--dry-run"], "must look like latency=0.3"),
        (["shrink", "cifar-resnet-8", "--target-latency", "30", "--dry-run"], "0.7 for 30 % less"),
        (["shrink", "cifar-resnet-8", "--blocks", "1", "--by", "lesions", "--dry-run"], "Did you mean 'lesion'"),
        (["shrink", "cifar-resnet-8", "--by", "size", "--dry-run"], "Say how much shall go"),
        (["shrink", "cifar-resnet-8", "--blocks", "1", "--names", "layer1.0", "--dry-run"], "Give one of --names"),
        (["shrink", "cifar-resnet-8", "--blocks", "1", "--dry-run"], "has no data of its own"),
        (["shrink", "cifar-resnet-8", "--out", "x", "--names", "layer9.1"], "Unknown residual block"),
        (["shrink", "runs/nothing", "--out", "x", "--plan", "no.json"], "Cannot read the plan"),
        (["shrink", "runs/nothing", "--out", "x", "--plan", "."], "Cannot read the plan 'plan.json'"),
        (["shrink", "runs/nothing", "--out", "x", "--at-most-worse", "-1"], "from 0 up, not -1"),
        (
            ["shrink", "runs/nothing", "--out", "x", "--names", "layer1.0", "--export", "a.tflite"],
            "end in .onnx or .pt2",
        ),
        (["shrink", "cifar-resnet-8", "--out", "x", "--names", "layer9.1"], "has random weights"),
        (["report", "."], "no report folder"),
        (["report", "gradients.csv"], "does not exist"),
    ],
)
def test_a_mistake_gets_one_message_and_writes_nothing(resect, tmp_path, arguments, message):
    code, _, err = resect(*arguments)
    assert code == 1, err
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage", [{"blocks": [3]}, {"blocks": 3}, {"scores": []}, {"evidence": None}, {"blocks": None}]
)
def test_a_damaged_plan_is_told_before_anything_opens(resect, tmp_path, damage):
    whole = {"format": "resect-plan", "version": 1, "blocks": [], "by": "x", "scores": {}, "evidence": {}, "model": ""}
    (tmp_path / "plan.json").write_text(json.dumps(whole | damage))
    code, _, err = resect("shrink", "runs/nothing", "--out", "x", "--plan", "plan.json")
    assert code == 1
    assert "Cannot read the plan 'plan.json': This plan is damaged" in err


def test_unknown_commands_and_options_get_the_nearest(resect):
    code, _, err = resect("finde", "x")
    assert code == 2
    assert "find" in err
    code, _, err = resect("find", "cifar-resnet-20", "--jsn")
    assert code == 2
    assert "--json" in err


@pytest.mark.parametrize("command", ["find", "train", "lesion", "paths", "reuse", "shrink", "report", "demo"])
def test_every_help_has_an_example(resect, command):
    code, out, _ = resect(command, "--help")
    assert code == 0
    assert f"Example: resect {command}" in out


def test_a_damaged_run_is_named(resect, tmp_path):
    resect("train", "digits-plain", *TINY, "--out", "run")
    weights = tmp_path / "run" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    code, _, err = resect("lesion", "run")
    assert code == 1
    assert "is damaged" in err


def test_ctrl_c_ends_with_one_word(resect, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("resect.lab.open.open_model", interrupted)
    code, _, err = resect("find", "cifar-resnet-20")
    assert code == 130
    assert err.startswith("Interrupted.")


def test_an_interrupted_training_says_how_to_go_on_and_does(resect, monkeypatch):
    from resect.lab import trainer

    real = trainer.train_step

    def train_step(session, indices):
        if session.step == 14:
            signal.raise_signal(signal.SIGTERM)
        return real(session, indices)

    monkeypatch.setattr(trainer, "train_step", train_step)
    code, _, err = resect("train", "digits-plain", *TINY, "--out", "my run")
    assert code == 130, err
    assert "Stopped after step 15 of 22; the checkpoint is written." in err
    monkeypatch.setattr(trainer, "train_step", real)
    (command,) = [line.strip() for line in err.splitlines() if line.strip().startswith("resect train")]
    code, _, err = resect(*shlex.split(command)[1:])
    assert code == 0, err
    assert "epoch   2" in err
    assert "epoch   1" not in err
