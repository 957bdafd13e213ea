"""CKA, probes and strict identity against the textbook's formulas on whole matrices, and the real gate."""

from __future__ import annotations

import itertools

import pytest
import torch
from nets import Net
from torch import nn

import resect
from resect.analyse import likeness, probes
from resect.analyse.likeness import Angles, Cka, Correlations, similarity, summary
from resect.analyse.probes import Probes, held_out
from resect.analyse.strict import closed_share
from resect.errors import InputError

pytestmark = pytest.mark.core


def hsic_1(x, y):
    """Song et al. 2012, with loops over the samples' quadruples: means of products of kernel values."""
    k, m, n = x @ x.T, y @ y.T, len(x)
    pairs = [k[i, j] * m[i, j] for i, j in itertools.permutations(range(n), 2)]
    quads = [k[i, j] * m[q, r] for i, j, q, r in itertools.permutations(range(n), 4)]
    threes = [k[i, j] * m[i, q] for i, j, q in itertools.permutations(range(n), 3)]
    return sum(pairs) / len(pairs) + sum(quads) / len(quads) - 2 * sum(threes) / len(threes)


def test_cka_is_that_of_the_unbiased_estimator_written_out():
    torch.manual_seed(0)
    x, y = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64) + 2
    found = Cka(2)
    found.add([x[:3], y[:3]])
    found.add([x[3:], y[3:]])
    wanted = hsic_1(x, y) / (hsic_1(x, x) * hsic_1(y, y)).sqrt()
    torch.testing.assert_close(found.matrix(), torch.tensor([[1, wanted], [wanted, 1]], dtype=torch.float64))


def kornblith(x, y):
    """Linear CKA of whole matrices: Kornblith et al. 2019, section 3."""
    x, y = x - x.mean(0), y - y.mean(0)
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def test_cka_of_many_samples_nears_the_whole_matrices():
    torch.manual_seed(0)
    x = torch.randn(3000, 4, dtype=torch.float64)
    y = x @ torch.randn(4, 6, dtype=torch.float64) + torch.randn(3000, 6, dtype=torch.float64)
    z = 5 * x @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q + 100
    found = Cka(3)
    for parts in zip(x.split(500), y.split(500), z.split(500), strict=True):
        found.add(parts)
    matrix = found.matrix()
    assert matrix[0, 1].item() == pytest.approx(kornblith(x, y).item(), abs=0.01)
    assert matrix[0, 2].item() == pytest.approx(1, abs=1e-6)  # rotated, scaled, moved
    assert matrix[0, 1] < 0.95


def test_cka_does_not_hang_on_the_batches_and_says_when_it_is_not_defined(monkeypatch):
    monkeypatch.setattr(likeness, "CHUNK", 8)
    x, y = torch.randn(30, 3), torch.randn(30, 2)
    matrices = []
    for size in (1, 7, 30):
        found = Cka(2)
        for parts in zip(x.split(size), y.split(size), strict=True):
            found.add(parts)
        matrices.append(found.matrix())
    torch.testing.assert_close(matrices[0], matrices[1])
    torch.testing.assert_close(matrices[0], matrices[2])
    few, still = Cka(1), Cka(2)
    few.add([x[:3]])
    still.add([x, torch.ones(30, 2)])
    assert few.matrix().isnan().all()
    assert still.matrix()[1].isnan().all()
    assert still.sums.isfinite().all()


def test_correlations_in_one_pass_are_those_of_whole_maps():
    torch.manual_seed(0)
    maps = torch.randn(3, 5, 40, dtype=torch.float64) + 1000
    maps[2, :3] = -maps[0, :3]
    maps[1, 4] = 7.0  # never varies
    found = Correlations()
    for part in maps.split(13, dim=2):
        found.add([block.T for block in part])
    torch.testing.assert_close(found.similarity(), similarity(maps))
    assert found.similarity()[2, 0] > 0.6
    assert summary(similarity(maps))["others"] == pytest.approx(float(found.similarity()[[0, 2], [2, 0]].mean()))


def test_streams_without_direction_are_left_out_of_angles():
    one, other = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 2.0]], [[1.0, 1.0]]])
    found = Angles(2)
    found.add([one, other])
    assert found.matrix()[0, 1].item() == pytest.approx(0.5)


def test_probes_are_ridge_regressions_on_all_the_data():
    torch.manual_seed(0)
    x = torch.randn(300, 5, dtype=torch.float64) * torch.tensor([1, 10, 0.1, 3, 0]) + 4
    y = (x[:, 0] + x[:, 1] / 10 > 4.4).long() + (x[:, 3] > 6).long()
    found, noise = Probes(), torch.randn(300, 2)
    for a, b, c in zip(x.split(64), noise.split(64), y.split(64), strict=True):
        found.add([a, b], c)
    test = held_out(0, 300)
    inside, labels = x[~test], nn.functional.one_hot(y[~test], 3).double()
    mean, std = inside.mean(0), inside.std(0, correction=0)
    scaled = torch.where(std > 1e-9, (inside - mean) / std, 0)
    rows = torch.cat([scaled, (probes.RIDGE * len(inside)) ** 0.5 * torch.eye(5, dtype=torch.float64)])
    targets = torch.cat([labels - labels.mean(0), torch.zeros(5, 3, dtype=torch.float64)])
    weights = torch.linalg.lstsq(rows, targets).solution
    ours, bias = probes.solve(found.squares[0], found.products[0], found.count)
    torch.testing.assert_close(ours, torch.where(std > 1e-9, 1 / std, 0)[:, None] * weights)
    torch.testing.assert_close(bias, labels.mean(0) + (found.origins[0] - mean) @ ours)
    outside = torch.where(std > 1e-9, (x[test] - mean) / std, 0) @ weights + labels.mean(0)
    accuracies, guessing = found.accuracies()
    assert accuracies[0].item() == pytest.approx((outside.argmax(1) == y[test]).double().mean().item())
    assert guessing == pytest.approx(y[test].bincount().max().item() / int(test.sum()))
    assert accuracies[0] > 0.65 > accuracies[1]


def test_a_quarter_is_held_out_whatever_the_batches_and_the_order_of_classes(monkeypatch):
    whole = held_out(0, 4000)
    assert torch.equal(whole, torch.cat([held_out(0, 3), held_out(3, 3000), held_out(3003, 997)]))
    for classes in (2, 4, 8, 10):
        for label in range(classes):
            assert whole[label::classes].double().mean() == pytest.approx(0.25, abs=0.02)
    monkeypatch.setattr(probes, "HELD_OUT", 5)
    found = Probes()
    for part in torch.randn(60, 2).split(4):
        found.add([part], torch.zeros(len(part), dtype=torch.int64))
    assert 5 <= sum(len(labels) for _, labels in found._test) <= 8
    monkeypatch.setattr(probes, "MEMORY", 100)
    with pytest.raises(InputError, match="probes=False"):
        Probes().add([torch.randn(4, 9)], torch.zeros(4, dtype=torch.int64))


@pytest.fixture(scope="module")
def strict():
    torch.manual_seed(5)
    net = Net((False, False, True))
    x = torch.randn(50, 5)
    blocks = resect.find_blocks(net, x[:4])
    return net, blocks, x, resect.block_response(net, blocks, x.split(8), gradient=False, probes=False)


@pytest.mark.parametrize("size", [1, 16, 64])
@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.97])
def test_the_share_of_closed_batches_is_that_of_the_real_gate(strict, size, quantile):
    net, blocks, x, response = strict
    # Next to a response of one sample, but not on it: other batches round otherwise.
    epsilon = 1.0001 * float(response.largest[blocks.names[1]].quantile(quantile, interpolation="lower"))
    rows = response.closed_rows(epsilon, [size])
    for place, row in enumerate(rows):  # each gate alone: with others muted the stream would be another
        muted = []
        with resect.EpsilonGate(net.eval(), blocks[place], epsilon=epsilon, muted_at_start="allow") as method:
            method._acts[0].note = lambda place, closed, response, muted=muted: muted.append(bool(closed))
            for part in x.split(size):
                net(part)
        assert (row["name"], row["batches"]) == (blocks.names[place], len(muted))
        assert row["closed"] == pytest.approx(sum(muted) / len(muted))


def test_quantiles_and_distances(strict):
    _, blocks, _, response = strict
    rows = response.strict_rows(epsilon=0.5)
    for name in blocks.names:
        values = response.largest[name]
        own = [row for row in rows if row["name"] == name]
        assert [row["quantile"] for row in own] == [0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1]
        assert own[0]["response"] == pytest.approx(float(values.min()))
        assert own[-1]["distance"] == pytest.approx(float(values.max()) - 0.5)
        assert own[4]["response"] == pytest.approx(float(values.sort().values[24:26].mean()))
    assert "distance" not in response.strict_rows()[0]
    dead = closed_share({"dead": torch.zeros(4)}, 0.0, [1])  # ε = 0 is no gate
    assert [row["closed"] for row in dead] == [0.0]
    for wrong in ([0], [2.5], [True]):
        with pytest.raises(InputError, match="whole numbers of at least 1"):
            response.closed_rows(1.0, wrong)
    with pytest.raises(InputError, match="epsilon must be"):
        response.closed_rows(-1.0)
