"""``resect.draw``: what an analysis found, as measurements that can be drawn again and figures that say of what."""

from __future__ import annotations

import pytest
import torch
from nets import Net
from torch import nn

import resect
from resect.errors import InputError
from resect.report.draw import rows_by_figure
from resect.report.figures import FIGURES, redraw_measurements


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    model = Net()
    x, y = torch.randn(12, 5), torch.randint(0, 4, (12,))
    return model.eval(), resect.find_blocks(model, x), (x, y)


def test_what_each_analysis_found_is_written_and_drawn_again_to_the_byte(case, tmp_path):
    model, blocks, batch = case
    loss = nn.functional.cross_entropy
    grads = resect.path_gradients(model, blocks, batch, loss, samples=2)
    found = {
        "lesion": resect.lesion_study(model, blocks, [batch]),
        "gradients": grads,
        "gradients_by_moment": {"begin": grads, "end": grads},
        "block_gradients": resect.block_gradients(model, blocks, batch, loss),
        "path_lengths": resect.path_lengths(blocks),
        "block_response": resect.block_response(model, blocks, [batch]),
    }
    for name, one in found.items():
        folder = tmp_path / name
        paths = resect.draw(one, folder, about={"model": "a small net", "samples": 12})
        assert folder / f"{name}.csv" in paths
        assert all(path.is_file() for path in paths)
        pictures = {path: path.read_bytes() for path in folder.glob("*.svg")}
        assert len(pictures) == sum(path.suffix == ".png" for path in paths)
        for path, picture in pictures.items():
            assert b"a small net, 12 samples" in picture, path.name
        assert {path.with_suffix(".svg") for path in redraw_measurements(folder)} == set(pictures)
        assert {path: path.read_bytes() for path in pictures} == pictures


def test_nets_share_figures_and_options_reach_their_rows(case):
    model, blocks, batch = case
    one = resect.block_response(model, blocks, [batch])
    rows = rows_by_figure({"a": one, "b": one}, epsilon=0.5, batch_sizes=[2])
    assert [row["net"] for row in rows["block_response"]] == ["a"] * 3 + ["b"] * 3
    assert rows["gate_closed"] == [{"net": net} | row for net in "ab" for row in one.closed_rows(0.5, [2])]


def test_options_of_other_figures_are_told_with_those_there_are(case, tmp_path):
    model, blocks, batch = case
    grads = resect.path_gradients(model, blocks, batch, nn.functional.cross_entropy, samples=0)
    for found, kind in ((resect.lesion_study(model, blocks, [batch]), "LesionStudy"), ({"a": grads}, "PathGradients")):
        with pytest.raises(InputError, match=f"option of the figures of a {kind} 'epsilon'. There are none"):
            resect.draw(found, tmp_path / "out", epsilon=1.0)
    response = resect.block_response(model, blocks, [batch])
    with pytest.raises(InputError, match=r"BlockResponse 'batch_size'. Did you mean 'batch_sizes'\?"):
        resect.draw(response, tmp_path / "out", batch_size=[2])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (object(), "there is no figure of object"),
        ({"a": 1}, "PathGradients by moment or BlockResponse by net, not int"),
        ({}, "not nothing"),
        ((0.5, 0.5), "a whole number per length"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(found, message, tmp_path):
    with pytest.raises(resect.ResectError, match=message):
        resect.draw(found, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"samples": "about 1000"}, "'samples' must be a whole number, not 'about 1000'"),
        ({"seeds": 3}, "the seeds have an argument of their own"),
        ({3: "a"}, "the key 3 is no text"),
        ({"net": object()}, "'net' cannot be written as JSON"),
    ],
)
def test_what_is_no_provenance_is_refused_before_anything_is_written(case, about, message, tmp_path):
    with pytest.raises(InputError, match=message):
        resect.draw(resect.path_lengths(case[1]), tmp_path / "out", about=about)
    assert not (tmp_path / "out").exists()


def test_figures_without_a_value_are_left_out_and_a_chart_that_fails_leaves_nothing(case, tmp_path, monkeypatch):
    model, blocks, (x, y) = case
    one = resect.block_response(model, blocks, [(x[:1], y[:1])])  # no sample is left to test a probe on
    resect.draw(one, tmp_path / "one")
    assert (tmp_path / "one" / "gate_closed.png").is_file()
    assert not list((tmp_path / "one").glob("probes*"))

    def fails(rows):
        raise InputError("it was made to")

    monkeypatch.setitem(FIGURES, "gate_closed", fails)
    with pytest.raises(InputError, match="it was made to"):
        resect.draw(one, tmp_path / "two")
    assert not (tmp_path / "two").exists()
