"""Removal curves against closing the blocks and counting mistakes by hand."""

import torch
from torch import nn

import resect
from resect.lab.models import cifar_resnet
from resect.lab.removal import COUNTS, removal


def test_rows_are_errors_of_the_net_without_the_drawn_blocks():
    torch.manual_seed(0)
    net = cifar_resnet(20, widths=(4, 4, 8), in_channels=1).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.bias)
    images, labels = torch.randn(64, 1, 8, 8), torch.randint(0, 10, (64,))
    blocks = resect.find_blocks(net, images)
    rows = removal(net, blocks, images, labels, draws=3)
    assert sorted({row["removed"] for row in rows}) == [count for count in COUNTS if count <= 9]
    assert [row["draw"] for row in rows if row["removed"] == 2] == [0, 1, 2]

    def error():
        with torch.no_grad():
            return float((net(images).argmax(1) != labels).double().mean())

    assert rows[0] == {"removed": 0, "draw": 0, "error": error()}
    possible = set()
    for block in blocks:
        with resect.closed(net, block.name):
            possible.add(error())
    assert {row["error"] for row in rows if row["removed"] == 1} <= possible
    gone = [blocks[3].name, blocks[8].name, blocks[1].name]
    rows = removal(net, blocks, images, labels, gone=gone)
    with resect.closed(net, gone):
        assert rows[0] == {"removed": 3, "draw": 0, "error": error()}
    assert [row["removed"] for row in rows] == [3, *([4] * 5), *([8] * 5)]
    again = removal(net, blocks, images, labels, gone=gone)
    assert again == rows
