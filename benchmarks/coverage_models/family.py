"""One model of the coverage list: how to build it, and how many residual blocks its architecture has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

Weight = Literal["high", "middle", "low"]


@dataclass(frozen=True)
class Family:
    """One representative of a family of models. Expected numbers come from its paper or code, never from a search.

    A residual block is one branch of one addition: a transformer layer counts two, ``x + attn(x) + mlp(x)`` two.
    A block inside another block's branch is not counted: the outer one stands for it.
    """

    source: str
    """``timm``, ``torchvision``, ``torch``, ``handwritten`` or ``transformers``."""
    name: str
    """Unique within its source."""
    build: Callable[[], tuple[nn.Module, Any]]
    """Returns the model, in eval mode and passed through ``lively``, and the example for ``find_blocks``.
    Two calls return equal weights and examples: seed inside."""
    published: int | None
    """Residual blocks of exactly this (small) variant; None where the paper's structure gives no number."""
    where: str
    """The paper or table, or ``"counted: …"`` with the formula."""
    residual: bool = True
    """False: a model in which no residual block must be found."""
    weight: Weight = "low"
    """How much the family is used; the list's file says how this was chosen."""
    trains: str = ""
    """Why the train-mode check cannot be run (``""``: it is run)."""
    batch: Callable[[Any], Any] | None = None
    """Turns the example into one with another batch size; None: every tensor is repeated along its first axis."""
    slow: bool = False
    """Whether the checks take more than 10 s: then it is left out of the random sample that the tests run."""
    sums: Mapping[str, int] = field(default_factory=dict)
    """In which classes' own code the additions stand, ``{class: number}``, where that is known: tells a block from
    a sum inside its branch."""


def lively(model: nn.Module, seed: int = 7) -> nn.Module:
    """Give every constant parameter and statistic values of order 1, and put the model in eval mode.

    Zero-initialised scales, heads and norms would hide a branch: closing it would change nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def spread(tensor: torch.Tensor, low: float, high: float) -> None:
        tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point() or parameter.numel() == 0:
                continue
            is_constant = bool((parameter == parameter.flatten()[0]).all())
            if is_constant and parameter.numel() == max(parameter.shape, default=1):
                low, high = (-0.2, 0.2) if name.endswith("bias") else (0.5, 1.0)
                spread(parameter, low, high)
            elif is_constant:
                spread(parameter, *(bound / math.sqrt(parameter[0].numel()) for bound in (-1.0, 1.0)))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                spread(buffer, -0.1, 0.1)
            elif name.endswith("running_var"):
                spread(buffer, 0.8, 1.2)
    return model.eval()
