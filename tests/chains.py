"""A chain of residual blocks with batch norm whose forward pass can be told by hand what each block does."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import resect
from resect.train.draws import generator


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.BatchNorm1d(width), nn.Linear(width, width), nn.Linear(width, width)

    def branch(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Chain(nn.Module):
    def __init__(self, count: int = 7, width: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
        self.layers = nn.ModuleList(Layer(width) for _ in range(count))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

    def by_hand(self, x: Tensor, factors: list[float | Tensor | None]) -> Tensor:
        """Forward with block l left out (None), or its branch multiplied by ``factors[l]``."""
        x = self.stem(x)
        for layer, factor in zip(self.layers, factors, strict=True):
            if factor is not None:
                branch = layer.branch(x)
                x = x + (branch if isinstance(factor, float) and factor == 1.0 else branch * factor)
        return self.head(x)


def chain(count: int = 7) -> tuple[Chain, Tensor, resect.Blocks]:
    torch.manual_seed(0)
    net, x = Chain(count), torch.randn(16, 3)
    return net, x, resect.find_blocks(net, x)


def batches(steps: int, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 3, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(steps)
    ]


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
}


def snapshot(net: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every parameter, buffer and piece of optimizer state, by name."""
    found = {name: value.clone() for name, value in net.state_dict().items()}
    for name, parameter in net.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                found[f"{name}/{key}"] = torch.as_tensor(value).clone()
    return found


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The first two parts of the names of everything that differs: ``layers.3``, ``stem.0``, ``head.weight``."""
    changed = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    return {".".join(name.split("/")[0].split(".")[:2]) for name in changed}


def same(one: nn.Module, other: nn.Module) -> bool:
    states = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in states)


twin = copy.deepcopy


def draw_dropped(probs: list[float], samples: int, seed: int, step: int) -> Tensor:
    """Draw, per block and sample, whether the branch is dropped: the hash in plain Python numbers, one by one."""

    def mix(value: int) -> int:
        for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
            value = (value ^ (value >> shift)) * factor % 2**32
        return value ^ (value >> 15)

    keys = torch.randint(2**32, (len(probs),), generator=generator("dropped", seed, step)).tolist()
    drawn = [
        [mix(mix(row) ^ key) / 2**32 < prob for row in range(samples)] for key, prob in zip(keys, probs, strict=True)
    ]
    return torch.tensor(drawn)
