"""Deleting layers of nets without shortcuts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from resect.errors import InputError
from resect.lab.contrast import delete_each_layer, layers_to_delete


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10), nn.ReLU(), nn.Linear(10, 10),
    )  # fmt: skip


def test_each_layer_that_keeps_its_inputs_shape_goes_with_its_norm_and_activation():
    net = plain()
    x, y = torch.randn(9, 3, 8, 8), torch.randint(0, 10, (9,))
    before, modules = net(x), list(net)
    rows = delete_each_layer(net, [(x[:6], y[:6]), (x[6:], y[6:])], "cross_entropy")
    assert [row["closed"] for row in rows] == ["3 4 5", "7 8", "12"]
    net.eval()
    for row in rows:
        gone = {int(name) for name in row["closed"].split()}
        short = nn.Sequential(*(module for place, module in enumerate(modules) if place not in gone)).eval()
        assert row["value"] == pytest.approx(nn.functional.cross_entropy(short(x), y).item(), rel=1e-5)
        assert row["baseline"] == pytest.approx(nn.functional.cross_entropy(net(x), y).item(), rel=1e-5)
    assert list(net) == modules
    assert torch.equal(net.train()(x), before)
    with pytest.raises(InputError, match=r"This Sequential cannot run on these samples: .*to have 3 channels"):
        layers_to_delete(plain(), (torch.randn(2, 1, 8, 8), torch.zeros(2, dtype=torch.long)))
    with pytest.raises(InputError, match="No layer of this Sequential keeps its input's shape"):
        delete_each_layer(nn.Sequential(nn.Linear(3, 4)), [(torch.randn(2, 3), y[:2])])
