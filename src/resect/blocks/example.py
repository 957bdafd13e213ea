"""What a model is called with: one example, or one batch of data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from resect.errors import InputError

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Example:
    """The positional and keyword arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Example:
        """Read an example: a tensor, a tuple or list of arguments, a mapping of kwargs, or an ``Example``."""
        if isinstance(value, Example):
            return value
        if isinstance(value, Tensor):
            return cls((value,))
        if isinstance(value, Mapping):
            return cls((), dict(value))
        if isinstance(value, (tuple, list)):
            return cls(tuple(value))
        raise InputError(
            f"An example must be a tensor, a tuple of arguments, a mapping of keyword arguments or a "
            f"resect.Example, not {type(value).__name__}. For instance: torch.randn(2, 3, 224, 224)."
        )

    def run(self, model: nn.Module) -> Any:
        """Call the model, with every tensor moved to the model's device."""
        here = self.to(device_of(model))
        return model(*here.args, **here.kwargs)

    def to(self, device: torch.device | None) -> Example:
        """Return the same example with its tensors on ``device`` (None: unchanged)."""
        return self if device is None else Example(*to_device((self.args, dict(self.kwargs)), device))

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the example, in order."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the first parameter or buffer; None for a model without either."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return None


def to_device(value: Any, device: torch.device | None) -> Any:
    """Move every tensor inside nested tuples, lists and dicts."""
    if device is None:
        return value
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), value)


def forward_batch(model: nn.Module, batch: Any) -> Any:
    """Run a batch the default way: tuple = (inputs, target), mapping = ``model(**batch)``, tensor = the input."""
    batch = to_device(batch, device_of(model))
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    return model(batch)
