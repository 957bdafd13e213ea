"""What a cut cost is measured, told, and a ruinous one is called that."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

import resect
from resect.blocks.measure import measure_closed
from resect.lab.open import open_model
from resect.lab.shrink.choosing import expected
from resect.lab.shrink.outcome import cost_told, outcome
from resect.lab.shrink.wishes import Wishes


def test_perplexity_is_that_of_the_closed_model(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "a.txt").write_text("the cat sat on the mat, and that was that. " * 30)
    options = ["n_layer=3", "n_embd=8", "n_head=2", "vocab_size=256", "n_positions=16"]
    opened = open_model("hf:gpt2", options, f"text:{tmp_path / 'a.txt'}")
    blocks = resect.find_blocks(opened.model, opened.example())
    gone = blocks.names[1:3]
    small = resect.remove(opened.model, blocks, gone)
    found = outcome(opened, small, 40)["perplexity"]
    whole, [cut] = measure_closed(opened.model, blocks, opened.batches("train", 40), [tuple(gone)], "perplexity")
    assert (found["uncut"], found["cut"]) == pytest.approx((whole, cut))
    assert found["data"] == opened.data.name
    assert f"Perplexity of 40 sequences: {whole:.4g} → " in next(cost_told(opened, {"perplexity": found}, 40, ""))


@pytest.mark.parametrize(
    ("key", "uncut", "cut", "ruined"),
    [("test_error", 7, 12, False), ("test_error", 7, 12.1, True),
     ("perplexity", 20, 39, False), ("perplexity", 20, 41, True)],
)  # fmt: skip
def test_a_ruinous_cut_is_called_that(key, uncut, cut, ruined):
    opened = SimpleNamespace(gated=False, data=SimpleNamespace(sequences=range(9)))
    lines = list(cost_told(opened, {key: {"uncut": uncut, "cut": cut}}, 5, "--recover 3"))
    assert ("--recover 3" in lines[-1]) is ruined
    assert len(lines) == 1 + ruined


@pytest.mark.parametrize(("half", "noisy"), [(0.3, False), (0.4, True)])
def test_latency_that_is_mostly_noise_is_called_that(half, noisy):
    times = {"1": {"whole": (1.0, half), "cut": (1.0, half)}}
    line = next(expected(SimpleNamespace(data=None), (), SimpleNamespace(evidence={"measured_ms": times}), Wishes(n=1)))
    assert ("too noisy to say" in line) is noisy
