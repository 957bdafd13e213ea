"""Buffers that a forward pass writes, in eval mode too, are as they were after everything that only looks."""

from __future__ import annotations

import pytest
import torch
from nets import Net
from torch import nn

import resect

pytestmark = pytest.mark.core


class Counting(Net):
    def __init__(self):
        super().__init__((False, False, False))
        self.register_buffer("passes", torch.zeros(()))
        self.register_buffer("spread", torch.zeros(1, 3).expand(2, 3))  # no whole tensor can be written over it

    def forward(self, x):
        self.passes.add_(1)
        return super().forward(x)


def summed(output, target):
    return nn.functional.cross_entropy(output, target, reduction="sum")


WORK = {
    "find_blocks": lambda net, blocks, data: resect.find_blocks(net, data[0][0]),
    "lesion_study": lambda net, blocks, data: resect.lesion_study(net, blocks, data),
    "path_gradients": lambda net, blocks, data: resect.path_gradients(net, blocks, data[0], summed, samples=4),
    "block_gradients": lambda net, blocks, data: resect.block_gradients(net, blocks, data[0], summed),
    "block_response": lambda net, blocks, data: resect.block_response(net, blocks, data),
    "taylor": lambda net, blocks, data: resect.rank(net, blocks, data, by="taylor"),
    "recoverability": lambda net, blocks, data: resect.rank(net, blocks, data, by="recoverability", steps=2),
    "block_costs": lambda net, blocks, data: resect.block_costs(net, blocks, batches=()),
    "remove": lambda net, blocks, data: resect.remove(net, blocks, ["layers.0"]),
    "replace": lambda net, blocks, data: resect.replace(net, blocks, ["layers.1"], data),
    "mimic": lambda net, blocks, data: resect.mimic(resect.remove(net, blocks, ["layers.0"]), net, data, steps=2),
}


@pytest.mark.filterwarnings("ignore:Every altered network is run in full")
@pytest.mark.parametrize("name", WORK)
def test_what_a_pass_counts_is_put_back(name):
    torch.manual_seed(0)
    net, data = Counting().eval(), [(torch.randn(8, 5), torch.randint(4, (8,))) for _ in range(2)]
    blocks = resect.find_blocks(net, data[0][0])
    net.passes.fill_(7)
    passes = net.passes
    WORK[name](net, blocks, data)
    assert net.passes is passes
    assert float(passes) == 7


def test_a_buffer_made_in_inference_mode_does_not_keep_blocks_from_being_found():
    net, x = Net().eval(), torch.randn(2, 5)
    with torch.inference_mode():
        net.register_buffer("made", torch.zeros(3))
    assert len(resect.find_blocks(net, x)) == 3
