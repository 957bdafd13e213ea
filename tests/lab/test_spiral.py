"""The spiral's experiment: what is compared is compared rightly, and the example runs whole."""

from __future__ import annotations

import csv
import importlib.util
from pathlib import Path

import pytest
import torch

from resect.analyse.likeness import similarity, summary
from resect.lab import spiral
from resect.lab.reuse import figure_rows, measure, sections, spiral_rows, table_rows
from resect.lab.units import REACH, grid, unit_maps

SMALL = spiral.Setting(blocks=6, width=3, steps=12, points=40)


@pytest.fixture(scope="module")
def nets():
    return spiral.train_all(SMALL, 0)


def test_a_spiral_has_two_arms_that_are_each_other_turned_by_half_a_turn():
    x, y = spiral.spiral(400, 0, noise=0.0)
    radius, angle = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
    off = angle - 3.5 * torch.pi * radius - torch.pi * y
    assert torch.allclose(off.cos(), torch.ones(400), atol=1e-3)
    assert y.sum() == 200
    assert float(radius.max()) <= 1
    noisy, _ = spiral.spiral(400, 0)
    assert 0.01 < float((noisy - x).std()) < 0.03
    assert torch.equal(noisy, spiral.spiral(400, 0)[0])
    assert not torch.equal(noisy, spiral.spiral(400, 1)[0])


def test_all_nets_start_from_the_same_weights_and_learn(nets):
    torch.manual_seed(123)
    random = torch.random.get_rng_state()
    again = spiral.train(None, SMALL, 0)
    assert torch.equal(random, torch.random.get_rng_state())
    for name, value in nets["plain"].state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert list(nets) == ["untrained", "plain", "stochastic depth", "ResidualDroppath"]
    weights = [net[0].weight for net in nets.values()]
    assert not any(torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])
    assert not any(net.training for net in nets.values())


def test_the_spiral_is_learned():
    setting = spiral.Setting(blocks=8, width=8, steps=150, points=256)
    assert spiral.fresh_error(spiral.train(None, setting, 0), setting, 0) < 0.1
    assert spiral.fresh_error(spiral.build(setting, 0).eval(), setting, 0) > 0.3


def test_the_grid_is_read_like_a_page():
    points = grid(3)
    assert points.tolist()[0] == pytest.approx([-REACH, REACH])
    assert points.tolist()[1] == pytest.approx([0, REACH])
    assert points.tolist()[-1] == pytest.approx([REACH, -REACH])


def test_maps_are_the_branches_responses_block_by_block(nets):
    points = grid(5)
    maps = unit_maps(nets["plain"], points)
    assert maps.shape == (6, 3, 25)
    x = nets["plain"][0](points)
    for block, found in zip(nets["plain"][1:-1], maps, strict=True):
        branch = block.branch(x)
        assert torch.allclose(found, branch.T, atol=1e-6)
        x = x + branch


def slow_similarity(ours, theirs):
    """The definition, pair by pair, by torch's own correlation."""
    result = torch.zeros(len(ours), len(theirs), dtype=torch.float64)
    for i, block in enumerate(ours):
        for j, other in enumerate(theirs):
            best = []
            for unit in block:
                pairs = [torch.corrcoef(torch.stack([unit, candidate]).double())[0, 1] for candidate in other]
                best.append(max(abs(float(r)) if torch.isfinite(r) else 0.0 for r in pairs))
            result[i, j] = sum(best) / len(best)
    return result


def test_similarity_is_the_mean_largest_correlation():
    draw = torch.Generator().manual_seed(3)
    maps, others = torch.randn(4, 3, 20, generator=draw), torch.randn(4, 3, 20, generator=draw)
    maps[2, 1] = -3 * maps[0, 2] + 5  # the other way round, larger and shifted: the same feature
    maps[3, 0] = 0.7  # says nothing anywhere
    others[1, 0] = 0.0
    assert torch.allclose(similarity(maps), slow_similarity(maps, maps))
    assert torch.allclose(similarity(maps, others), slow_similarity(maps, others))
    assert float(similarity(maps)[3, 3]) == pytest.approx(2 / 3)
    assert not torch.allclose(similarity(maps), similarity(maps).T)


def test_a_map_that_only_wobbles_by_rounding_is_no_feature():
    maps = torch.randn(2, 2, 50)
    maps[0, 0] = 0.9 + 1e-9 * torch.randn(50, dtype=torch.float64)
    maps[0, 0, 0] += 6e-8  # one step of float32
    assert float(similarity(maps)[0, 0]) == pytest.approx(0.5)


def test_summary_by_hand():
    matrix = torch.tensor([[1.0, 0.2, 0.6, 0.1], [0.4, 1.0, 0.3, 0.5], [0.1, 0.9, 1.0, 0.2], [0.8, 0.3, 0.7, 1.0]])
    assert summary(matrix) == pytest.approx(
        {"adjacent": (0.2 + 0.4 + 0.3 + 0.9 + 0.2 + 0.7) / 6, "others": (0.6 + 0.1 + 0.5 + 0.1 + 0.8 + 0.3) / 6,
         "elsewhere": 3 / 4}
    )  # fmt: skip


def test_another_net_is_the_next_seeds(nets):
    runs = {0: nets, 1: spiral.train_all(SMALL, 1)}
    measured = measure(runs, SMALL)
    assert [(row["seed"], row["net"]) for row in measured] == [(seed, name) for seed in runs for name in nets]
    row = next(row for row in measured if (row["seed"], row["net"]) == (1, "plain"))
    own, other = (unit_maps(runs[seed]["plain"], grid(48)) for seed in (1, 0))
    assert row["another net"] == summary(similarity(own, other))["others"]
    assert row["other blocks"] == summary(similarity(own))["others"]
    (plain,) = (row for row in table_rows(measured) if row["net"] == "plain")
    values = [row["another net"] for row in measured if row["net"] == "plain"]
    assert plain["another net"] == f"{sum(values) / 2:.2f} ± {abs(values[0] - values[1]) / 2**0.5:.2f}"
    assert "another net" not in table_rows(measure({0: nets}, SMALL))[0]


def test_rows_hold_what_the_nets_respond(nets):
    rows = figure_rows(nets, every=3)
    assert {row["block"] for row in rows["unit_maps"]} == {3, 6}
    assert "untrained" not in {row["net"] for row in rows["unit_maps"]}
    row = next(r for r in rows["unit_maps"] if (r["net"], r["block"], r["unit"], r["line"]) == ("plain", 6, 2, 7))
    expected = unit_maps(nets["plain"], grid(24))[5, 1].view(24, 24)[7]
    assert torch.tensor([float(value) for value in row["responses"].split()]) == pytest.approx(expected, abs=0.006)
    matrix = similarity(unit_maps(nets["plain"], grid(48)))
    for row in rows["unit_similarity"]:
        if row["net"] == "plain":
            assert row["similarity"] == pytest.approx(float(matrix[row["block"] - 1, row["other"] - 1]), abs=1e-4)


def test_one_call_gives_a_report_all_it_needs(nets):
    figures, table = spiral_rows(0, SMALL)
    assert figures["unit_similarity"] == figure_rows(nets)["unit_similarity"]
    assert [row["net"] for row in table] == list(nets)
    assert {section.figure for section in sections(table)} == set(figures)


def test_the_example_runs_whole(tmp_path, capsys):
    path = Path(__file__).parents[2] / "examples" / "feature_reuse.py"
    spec = importlib.util.spec_from_file_location("feature_reuse", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    page = example.main(["--out", str(tmp_path / "out"), "--steps", "10", "--seeds", "2"])
    assert page == tmp_path / "out" / "report.html"
    for name in ("unit_maps", "unit_similarity"):
        assert (tmp_path / "out" / "figures" / f"{name}.png").is_file()
        assert (tmp_path / "out" / "data" / f"{name}.csv").is_file()
    with (tmp_path / "out" / "seeds.csv").open() as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["0"] * 4 + ["1"] * 4
    printed = capsys.readouterr().out
    assert "ResidualDroppath" in printed
    assert "±" in printed
    with pytest.raises(SystemExit):
        example.main(["--seeds", "0"])
