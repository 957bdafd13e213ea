"""Whatever happens to a model's modes and buffers, every module gets its own back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def kept_modes(*models: nn.Module) -> Iterator[None]:
    """Restore the mode of every single module on leaving, also by an exception."""
    before = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


class Buffers:
    """The buffers of a model as they are now: objects and values, also of those that a forward pass replaces."""

    def __init__(self, model: nn.Module) -> None:
        places = [(module._buffers, *item) for module in model.modules() for item in module._buffers.items()]
        self._kept: list[tuple[dict[str, Tensor | None], str, Tensor, Tensor]] = [
            (holder, name, buffer, buffer.clone()) for holder, name, buffer in places if buffer is not None
        ]

    def restore(self) -> None:
        """Put every buffer back."""
        with torch.no_grad():
            for holder, name, buffer, value in self._kept:
                holder[name] = buffer.copy_(value)


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restore every buffer on leaving, also by an exception."""
    before = Buffers(model)
    try:
        yield
    finally:
        before.restore()
