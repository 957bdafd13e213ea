"""What a step computes, in FLOPs: closed blocks nothing at all, frozen ones no gradients that nobody needs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import resect

pytestmark = [pytest.mark.core, pytest.mark.filterwarnings("ignore:.*dropping branches tends to hurt")]

BLOCKS, WIDTH, BATCH = 6, 8, 4
MATMUL = 2 * BATCH * WIDTH * WIDTH  # of one linear layer forward; each of its two gradients takes as much


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


@pytest.fixture
def made():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), *(Layer() for _ in range(BLOCKS)))
    x = torch.randn(BATCH, WIDTH)
    return net, x, resect.find_blocks(net, x)


def matmuls(net, x, method):
    """Return how many matrix products one step takes: forward, and backward."""
    method.begin_step()
    with FlopCounterMode(display=False) as forward:
        loss = net(x).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    net.zero_grad()
    return [counter.get_total_flops() / MATMUL for counter in (forward, backward)]


@pytest.mark.parametrize("closed", [{0, 1, 2}, {5}, {1, 3, 5}, set(), set(range(BLOCKS))])
def test_a_closed_block_costs_nothing(made, closed):
    net, x, blocks = made
    shares = [float(place in closed) for place in range(BLOCKS)]
    with resect.StochasticDepth(net, blocks, drop_prob=1.0, rule=shares) as method:
        open_blocks = BLOCKS - len(closed)
        # The stem's input needs no gradient.
        assert matmuls(net, x, method) == [1 + 2 * open_blocks, 1 + 4 * open_blocks]


@pytest.mark.parametrize("dropped", [{5}, {3}, {2, 4}, {0}])
def test_a_dropped_only_step_has_no_backward_pass_before_the_first_dropped_block(made, dropped):
    net, x, blocks = made
    shares = [float(place in dropped) for place in range(BLOCKS)]
    with resect.ResidualDroppath(net, blocks, drop_prob=1.0, rule=shares) as method:
        matmuls(net, x, method)
        first = min(dropped)
        after = BLOCKS - first - 1
        # Weights of the dropped ones; inputs of all after the first; in it the second layer's input alone.
        assert matmuls(net, x, method) == [1 + 2 * BLOCKS, 2 * len(dropped) + 2 * after + 1]


@pytest.mark.parametrize("dropped", [{1, 3, 5}, {0, 1, 2, 3, 4}])
def test_a_pair_of_residual_droppath_steps_costs_what_the_model_says(made, dropped):
    """(5 − 2p)/6 of two plain steps, but for the stem and what lies before the first dropped block."""
    net, x, blocks = made
    shares = [float(place in dropped) for place in range(BLOCKS)]
    with resect.ResidualDroppath(net, blocks, drop_prob=1.0, rule=shares) as method:
        pair = sum(matmuls(net, x, method)) + sum(matmuls(net, x, method))
    p = len(dropped) / BLOCKS
    assert pair <= (5 - 2 * p) / 6 * 2 * (6 * BLOCKS) + 3
