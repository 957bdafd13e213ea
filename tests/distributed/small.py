"""A small net without batch statistics, its data, and training it on one process or on several."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import resect

SAMPLES = 12  # of a step, over all processes: divided by 2 and by 3
STEPS = 6


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Chain(nn.Module):
    """A stem, layers of one block each, a head, on (N, tokens, 5)."""

    def __init__(self, count: int = 7, width: int = 6) -> None:
        super().__init__()
        self.stem = nn.Linear(5, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(count))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


def chain(count: int = 7, make: Callable[..., nn.Module] = Chain) -> tuple[Any, resect.Blocks]:
    torch.manual_seed(0)
    net = make(count).double()
    return net, resect.find_blocks(net, torch.randn(8, 2, 5).double())


def batch(step: int, size: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """The batch of a step, of all processes together."""
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 2, 5, generator=generator).double(), torch.randint(0, 3, (size,), generator=generator)


def mine(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """What of a batch is this process's: every N-th sample, as torch's DistributedSampler deals it out."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return [tensor[rank::ranks] for tensor in tensors]


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}
UNIFORM = {"drop_prob": 0.5, "rule": "uniform"}
METHODS: dict[str, Callable[..., Any]] = {
    "StochasticDepth": lambda net, blocks: resect.StochasticDepth(net, blocks, **UNIFORM),
    "StochasticDepth, per sample": lambda net, blocks: resect.StochasticDepth(net, blocks, per="sample", **UNIFORM),
    "StochasticDepth, subset": lambda net, blocks: resect.StochasticDepth(
        net, blocks, per="sample", compute="subset", drop_prob=0.8, rule="uniform"
    ),
    "ResidualDroppath": lambda net, blocks: resect.ResidualDroppath(net, blocks, **UNIFORM),
    "ResidualDroppath, zeros": lambda net, blocks: resect.ResidualDroppath(net, blocks, stillness="zero", **UNIFORM),
    "ResidualDroppath, per sample": lambda net, blocks: resect.ResidualDroppath(net, blocks, per="sample", **UNIFORM),
    "ResidualDroppath, shortcuts": lambda net, blocks: resect.ResidualDroppath(
        net, blocks, backward="shortcuts", forward="dropped", mask="fresh", rest="trained", **UNIFORM
    ),
    "EffectivePaths": lambda net, blocks: resect.EffectivePaths(net, blocks, keep=3),
    "RandomSubset": lambda net, blocks: resect.RandomSubset(net, blocks, keep=3),
    "EpsilonGate": lambda net, blocks: resect.EpsilonGate(net, blocks, epsilon=0.9, muted_at_start="allow"),
    "EpsilonGate, stream": lambda net, blocks: resect.EpsilonGate(
        net, blocks, epsilon=0.7, units="stream", muted_at_start="allow"
    ),
    "EpsilonGate, skipping": lambda net, blocks: resect.EpsilonGate(
        net, blocks, epsilon=0.9, side=0.1, skip_muted_after=2, recheck_every=4, muted_at_start="allow"
    ),
}


def wrapped(net: nn.Module, **options: Any) -> nn.Module:
    return DistributedDataParallel(net, **{"find_unused_parameters": True} | options)


def train(
    net: nn.Module,
    run: nn.Module,
    method: Any,
    optimizer: str | torch.optim.Optimizer = "sgd",
    steps: int = STEPS,
    micro: int = 1,
    first: int = 0,
    clip: bool = True,
) -> None:
    """Train ``net``, called as ``run``, on this process's share of every batch; ``micro``: micro-batches of a step."""
    if isinstance(optimizer, str):
        optimizer = OPTIMIZERS[optimizer]([*net.parameters(), *method.parameters()])
    for step in range(first, first + steps):
        method.begin_step()
        parts = [tensor.chunk(micro) for tensor in mine(batch(step))]
        for number, (x, y) in enumerate(zip(*parts, strict=True)):
            waits = number < micro - 1 and isinstance(run, DistributedDataParallel)
            with run.no_sync() if waits else contextlib.nullcontext():
                ((F.cross_entropy(run(x), y) + method.extra_loss(y)) / micro).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            nn.utils.clip_grad_norm_(method.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def alone(name: str, optimizer: str = "sgd", steps: int = STEPS) -> dict[str, Tensor]:
    """Weights after training on one process with the joined batches."""
    net, blocks = chain()
    method = METHODS[name](net, blocks)
    with method:
        train(net, net, method, optimizer, steps)
    return weights(net, method)


def weights(net: nn.Module, method: Any = None) -> dict[str, Tensor]:
    found = {name: value.detach().clone() for name, value in net.state_dict().items()}
    return found | {f"own {place}": value.detach() for place, value in enumerate(method.parameters() if method else ())}


def check_same(found: list[dict[str, Tensor]], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """All processes hold the same weights to the bit, and those of one process up to rounding."""
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())
    for name, value in expected.items():
        distance = float((found[0][name] - value).abs().max())
        assert torch.allclose(found[0][name], value, rtol=tolerance, atol=tolerance), f"{name}: {distance}"
