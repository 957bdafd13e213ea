"""``resect lesion``: every study by its option, and what is wrong said in one line."""

from __future__ import annotations

import csv

import pytest
import torch

ALL = ["--random", "1,2", "--runs", "2", "--by", "stage,kind", "--greedy", "--depth", "2", "--pairs", "--swaps", "0,1",
       "--paths", "1,3", "--draws", "2"]  # fmt: skip
NET = ["cifar-resnet-14", "-o", "widths=[4,4,8]", "--data", "digits", "--limit", "32"]


def test_every_study_its_rows_and_its_figures_which_can_be_drawn_again(resect, tmp_path):
    torch.manual_seed(0)  # of the random weights
    code, out, err = resect("lesion", *NET, *ALL, "--store", "s.jsonl", "--out", "fig")
    assert code == 0, err
    for said in ("2 in a row", "stage 1, 2 closed together", "2 closed, the last", "15 pairs", "1 swap of", "averaged"):
        assert said in out, said
    with (tmp_path / "fig" / "lesion.csv").open() as file:
        rows = list(csv.DictReader(file))
    count = {name: sum(row["study"] == name for row in rows) for name in {row["study"] for row in rows}}
    assert count == {
        "each": 6, "random": 4, "runs": 5, "by stage": 3, "by kind": 2, "greedy": 2, "pairs": 15, "swaps": 2,
        "paths": 4, "ensembles": 2,
    }  # fmt: skip
    names = {"each", "many", "order", "pairs", "parts", "paths", "random"}
    pictures = {path.name: path.read_bytes() for path in (tmp_path / "fig").glob("*.png")}
    assert set(pictures) == {f"lesion_{name}.png" for name in names}
    for path in (tmp_path / "fig").glob("lesion_*"):
        path.unlink()
    code, _, err = resect("report", "fig")
    assert code == 0, err
    assert {path.name: path.read_bytes() for path in (tmp_path / "fig").glob("*.png")} == pictures
    torch.manual_seed(0)
    code, again, _ = resect("lesion", *NET, *ALL, "--store", "s.jsonl")
    assert again == out.partition("Measurements:")[0]


def test_a_net_without_shortcuts_loses_its_layers_one_at_a_time(resect, tmp_path):
    net = ["cifar-resnet-8", "-o", "widths=[4,4,8]", "-o", "shortcuts=false", "--data", "digits", "--limit", "32"]
    code, _, err = resect("lesion", *net)
    assert code == 1
    assert "Of a net without shortcuts, resect lesion --layers deletes the layers." in err.replace("\n", " ")
    code, out, err = resect("lesion", *net, "--layers", "--out", "fig")
    assert code == 0, err
    assert "with one layer deleted" in out
    assert (tmp_path / "fig" / "lesion_each.png").exists()
    code, _, err = resect("lesion", *net, "--layers", "--beside", "cifar-resnet-8")
    assert "--beside is about closing each block alone: leave out --layers" in err.replace("\n", " ")
    code, out, err = resect("lesion", *NET[:1], *NET[3:], "--beside", "cifar-resnet-8", "--out", "both")
    assert code == 0, err
    with (tmp_path / "both" / "lesion.csv").open() as file:
        nets = [row["net"] for row in csv.DictReader(file)]
    assert nets == [""] * 6 + ["cifar-resnet-8"]
    assert "cifar-resnet-8" in (tmp_path / "both" / "lesion_each.svg").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "7"], "There is no run of 7 neighbouring blocks: there are 6"),
        (["--by", "stages"], "Did you mean 'stage'"),
        (["--depth", "3"], "--depth is about --greedy"),
        (["--greedy", "--depth", "9"], "from 0 to 6, but is 9"),
        (["--draws", "3"], "--draws is about --random, --swaps and --paths"),
        (["--layers", "--pairs", "--random", "1"], "nothing else: leave out --random, --pairs"),
        (["--layers", "--no-each"], "leave out --no-each"),
        (["--no-each"], "--no-each leaves nothing to measure. Ask for another study: --random"),
        (["--swaps", "2"], "After 2 swaps everything stands where it stood"),
        (["--paths", "9"], "the longest has 6 branches"),
        (["--metric", "perplexitty"], "Did you mean 'perplexity'"),
        (["--swaps", "one"], "must be whole numbers"),
    ],
)
def test_mistakes_are_told_and_nothing_is_written(resect, tmp_path, arguments, message):
    code, _, err = resect("lesion", *NET, *arguments, "--out", "fig")
    assert code == 1, err
    assert message in err.replace("\n", " ")
    assert not list(tmp_path.iterdir())


def test_what_goes_beside_is_opened_before_the_study(resect, tmp_path, monkeypatch):
    def studied(*_, **__):
        raise AssertionError("the study began")

    monkeypatch.setattr("resect.lesion_study", studied)
    code, _, err = resect("lesion", *NET, "--beside", "runs/no-shortcut", "--out", "fig")
    assert code == 1
    assert "There is no folder 'runs/no-shortcut'" in err
    assert not list(tmp_path.iterdir())
