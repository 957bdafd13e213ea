"""Nested state (dicts, lists, tuples, tensors, numbers) as JSON plus a flat dict of tensors, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resect.errors import InputError

TENSOR, TUPLE, ITEMS = "__tensor__", "__tuple__", "__items__"


def flatten(value: Any, tensors: dict[str, Tensor], path: str) -> Any:
    """``value`` as JSON-able data; its tensors go into ``tensors`` under names that begin with ``path``.

    Tensors are copied to the CPU, each with memory of its own. Tuples and dicts with other than string keys
    (an optimizer's) keep their type.

    Raises:
        InputError: something that is neither a tensor nor JSON, with its path.
    """
    if isinstance(value, Tensor):
        tensors[path] = value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        return {TENSOR: path}
    if isinstance(value, dict):
        inner = {key: flatten(item, tensors, f"{path}/{key}") for key, item in value.items()}
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return inner
        return {ITEMS: [[key, item] for key, item in inner.items()]}
    if isinstance(value, list | tuple):
        items = [flatten(item, tensors, f"{path}/{index}") for index, item in enumerate(value)]
        return {TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(f"State {path!r} is a {type(value).__name__}: only tensors and JSON data can be saved.")


def unflatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    """What `flatten` was given: equal values, tensors on the CPU."""
    if isinstance(value, list):
        return [unflatten(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if TUPLE in value:
        return tuple(unflatten(item, tensors) for item in value[TUPLE])
    if ITEMS in value:
        return {key: unflatten(item, tensors) for key, item in value[ITEMS]}
    return {key: unflatten(item, tensors) for key, item in value.items()}
