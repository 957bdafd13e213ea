"""Arguments and outputs as trees: copies of the containers, and whether two trees hold the same objects."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

_PLAIN = (
    bool, int, float, complex, str, bytes, slice, range, type(None), type(...),
    torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
)  # fmt: skip


def form(value: Any, opaque: bool = False) -> Any:
    """Return a value with new containers around the same tensors and numbers.

    Raises ``TypeError`` for other objects, which somebody may change; with ``opaque`` they are kept as they are.
    """
    if isinstance(value, (Tensor, *_PLAIN)):
        return value
    kind = type(value)
    if kind in (tuple, list):
        return kind([form(item, opaque) for item in value])
    if kind is dict:
        return {key: form(item, opaque) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [form(item, opaque) for item in value]
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: form(getattr(value, name), opaque) for name in fields})
    if opaque:
        return value
    raise TypeError(f"a {kind.__name__} may be changed by whoever holds it")


def same(one: Any, other: Any) -> bool:
    """Whether two values are containers of one form around the same objects, or equal numbers."""
    kind = type(one)
    if kind is not type(other):
        return False
    if isinstance(one, tuple) or kind is list:
        return len(one) == len(other) and all(map(same, one, other))
    if kind is dict:
        return list(one) == list(other) and all(map(same, one.values(), other.values()))
    if dataclasses.is_dataclass(one) and not isinstance(one, type):
        return all(same(getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one))
    return one is other or (isinstance(one, _PLAIN) and bool(one == other))
