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
            (holder, name, buffer, _each_once(buffer).clone()) for holder, name, buffer in places if buffer is not None
        ]

    def restore(self) -> None:
        """Put every buffer back."""
        for holder, name, buffer, value in self._kept:
            # What was made in inference mode can only be written there.
            with torch.inference_mode() if buffer.is_inference() else torch.no_grad():
                _each_once(buffer).copy_(value)
            holder[name] = buffer


def _each_once(tensor: Tensor) -> Tensor:
    """A view of a tensor without what repeats in an expanded one, which cannot be written as a whole."""
    strides = tensor.stride() if tensor.layout is torch.strided else ()
    for dim, stride in enumerate(strides):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restore every buffer on leaving, also by an exception."""
    before = Buffers(model)
    try:
        yield
    finally:
        before.restore()
