"""How batches come (what kind of mapping, in which order, from which loader) changes nothing of what is found."""

from __future__ import annotations

from collections import UserDict

import pytest
import torch
from nets import Net
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import resect
from resect.blocks.example import to_device

pytestmark = pytest.mark.core


class Texts(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.layers = Net((False, False)).layers
        self.head = nn.Linear(6, 3)

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x[:, -1])


@pytest.fixture
def texts():
    torch.manual_seed(0)
    net = Texts().eval()
    batches = [{"input_ids": torch.randint(10, (4, 20)), "labels": torch.tensor([0, 1, 2, 0])} for _ in range(2)]
    return net, resect.find_blocks(net, {"input_ids": batches[0]["input_ids"]}), batches


@pytest.mark.parametrize("by", ["lesion", "influence", "angle", "size", "taylor", "recoverability"])
def test_a_mapping_that_is_no_dict_scores_as_a_dict(texts, by):
    net, blocks, batches = texts
    how = {"by": by, **({"steps": 2} if by == "recoverability" else {"metric": "cross_entropy"})}
    wanted = resect.rank(net, blocks, batches, **how).scores
    assert resect.rank(net, blocks, [UserDict(batch) for batch in batches], **how).scores == wanted


def test_a_mapping_that_is_no_dict_is_learned_from_and_analysed_as_a_dict(texts):
    net, blocks, batches = texts
    opened = [UserDict(batch) for batch in batches]

    def losses(data):
        return resect.mimic(resect.remove(net, blocks, ["layers.1/a"]), net, data, steps=4, batch_size=2)

    assert losses(opened) == losses(batches)
    one = resect.block_response(net, blocks, opened, gradient=False)
    assert one.rows() == resect.block_response(net, blocks, batches, gradient=False).rows()

    def loss(output, batch):
        return nn.functional.cross_entropy(output, batch["labels"], reduction="sum")

    found = [resect.path_gradients(net, blocks, batch, loss, samples=4).rows() for batch in (opened[0], batches[0])]
    assert found[0] == found[1]
    assert to_device(opened[0], torch.device("meta"))["input_ids"].is_meta


def test_the_order_of_a_batch_s_keys_does_not_tell_images_from_texts():
    class Images(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1)
            self.branches = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(2))
            self.head = nn.Linear(6, 3)

        def forward(self, pixel_values, labels=None):
            x = self.stem(pixel_values)
            for branch in self.branches:
                x = x + branch(x)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    net, pixels, labels = Images().eval(), torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])
    blocks = resect.find_blocks(net, {"pixel_values": pixels})
    first = resect.rank(net, blocks, [{"pixel_values": pixels, "labels": labels}], by="angle").scores
    assert resect.rank(net, blocks, [{"labels": labels, "pixel_values": pixels}], by="angle").scores == first


def test_a_loader_that_does_not_know_its_length_will_do():
    class Stream(IterableDataset):
        def __iter__(self):
            torch.manual_seed(1)
            yield from zip(torch.randn(8, 5), torch.randint(4, (8,)), strict=True)

    torch.manual_seed(0)
    net = Net((False, False)).eval()
    loader = DataLoader(Stream(), batch_size=4)
    data, told = list(loader), []
    blocks = resect.find_blocks(net, data[0][0])
    study = resect.lesion_study(net, blocks, loader)
    assert study.rows() == resect.lesion_study(net, blocks, data).rows()
    resect.block_response(net, blocks, loader, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 0), (2, 0)]
    for by in ("influence", "taylor"):
        assert resect.rank(net, blocks, loader, by=by).scores == resect.rank(net, blocks, data, by=by).scores
