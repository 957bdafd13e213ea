"""Whatever happens to a model's train and eval modes, every module gets its own back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def kept_modes(*models: nn.Module) -> Iterator[None]:
    """Restore the mode of every single module on leaving, also by an exception."""
    before = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
