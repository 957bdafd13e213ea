"""Whether two models do the same: the aten operations they run, in order, with the shapes of all tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


class Log(TorchDispatchMode):
    """Keeps every operation with its arguments, tensors as their shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shown = tree_map(lambda leaf: (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf, args)
        self.done.append(f"{func} {shown}")
        return func(*args, **(kwargs or {}))


def operations(model: nn.Module, x: Tensor) -> list[str]:
    """What one pass in eval mode runs."""
    with torch.no_grad(), Log() as log:
        model.eval()(x)
    return log.done


def first_difference(one: list[str], other: list[str]) -> str | None:
    """The first operation in which two logs differ, or None."""
    for place in range(max(len(one), len(other))):
        a, b = (log[place] if place < len(log) else "nothing" for log in (one, other))
        if a != b:
            return f"operation {place}: {a} beside {b}"
    return None
