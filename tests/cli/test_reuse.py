"""``resect reuse``: a table, figures of several nets, every format; typos."""

from __future__ import annotations

import json

import pytest

from resect.cli.reuse import net_names
from resect.report.measurements import read_measurements

SMALL = ["-o", "widths=[4,4,8]", "--data", "digits", "--limit", "24", "--batch", "8"]
FIGURES = ["block_response", "angular_distance", "cka", "unit_similarity", "probes", "strict_identity", "gate_closed"]


def test_two_nets_are_laid_over_each_other(resect, tmp_path):
    models = "cifar-resnet-8", "cifar-preresnet-8"
    code, out, err = resect("reuse", *models, *SMALL, "--out", "found", "--format", "json", "--batch-sizes", "1,8")
    assert code == 0, err
    assert "random weights" in err
    assert "cifar-preresnet-8: 24 samples, mean over places" in out
    assert "layer3.0/conv2" in out
    assert "@8" in out
    for name in FIGURES:
        found = read_measurements(tmp_path / "found" / f"{name}.json")
        assert list(dict.fromkeys(row["net"] for row in found.rows)) == list(models)
        assert found.provenance["model"] == ", ".join(models)
        assert (tmp_path / "found" / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / "found" / f"{name}.svg").is_file()
    assert len(json.loads((tmp_path / "found" / "gate_closed.json").read_text())["rows"]) == 2 * 3 * 2
    (tmp_path / "found" / "cka.png").unlink()
    code, out, err = resect("report", "found/cka.json")
    assert code == 0, err
    assert (tmp_path / "found" / "cka.png").is_file()


def test_text_and_less_of_everything(resect, tmp_path):
    (tmp_path / "text.txt").write_text("a rose is a rose is a rose. " * 9)
    tiny = ["n_layer=1", "n_embd=8", "n_head=2", "vocab_size=256", "bos_token_id=1", "eos_token_id=1"]
    options = [part for option in tiny for part in ("-o", option)]
    code, out, err = resect("reuse", "hf:gpt2", *options, "--data", "text:text.txt", "-d", "length=16", "--no-gradient")
    assert code == 0, err
    assert "sequences of 16 bytes" in err
    assert "last token" in out
    assert "Left out: probes" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar-resnet-8", "cifar-resnet-9", *SMALL], "6n+2"),
        (["cifar-resnet-8"], "--data digits"),
        (["runs/none", *SMALL, "--batch-sizes", "0"], "at least 1, not 0"),
        (["cifar-resnet-8", *SMALL, "--batch-sizes", "one"], "whole numbers"),
        (["cifar-resnet-8", "--data", "digets"], "Did you mean 'digits'"),
        (["cifar-resnet-8", "--data", "digits", "-d", "folds"], "must look like key=value"),
        (["runs/none", "--data", "digits"], "There is no folder"),
    ],
)
def test_a_mistake_gets_one_message_and_writes_nothing(resect, tmp_path, arguments, message):
    code, out, err = resect("reuse", *arguments, "--out", "found")
    assert code == 1, err
    assert message in err.replace("\n", " ")
    assert "Traceback" not in err
    assert "samples" not in out
    assert not list(tmp_path.iterdir())


def test_names_of_nets_are_short_and_tell_them_apart():
    assert net_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert net_names(["x/run", "y/run", "timm:vit"]) == ["x/run", "y/run", "timm:vit"]
    assert net_names(["a", "a"]) == ["a 1", "a 2"]
