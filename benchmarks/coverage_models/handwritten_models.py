"""Hand-written models: those of ``tests/handwritten.py``, every way to write a residual block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import handwritten  # tests/handwritten.py
from torch import nn

from .family import Family, lively


def _builder(name: str) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        model, example = handwritten.build(name)
        return lively(model), example

    return build


_NOT_TRAINED = {
    "stochastic depth by hand": "its own coin decides in training, also where the block is gone",
    "torch.add(x, f, out=)": "functions with out= have no gradient",
}

FAMILIES: tuple[Family, ...] = tuple(
    Family(
        "handwritten", name, _builder(name), blocks, f"counted: {why}", residual=blocks > 0, weight="middle",
        trains=_NOT_TRAINED.get(name, ""),
    )
    for name, (_, _, blocks, why) in handwritten.MODELS.items()
)  # fmt: skip
