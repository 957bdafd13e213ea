"""A few hundred samples, kept and dealt out in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from resect.blocks.example import as_dict, device_of, to_device
from resect.blocks.template import tensors_in
from resect.errors import InputError

SAMPLES = 512
"""How many are kept where nothing else is said."""


def seed_problems(seed: int) -> list[str]:
    """Say what is wrong with a seed for torch's generators; nothing if it is fine."""
    if isinstance(seed, Integral) and not isinstance(seed, bool) and 0 <= int(seed) < 2**64:
        return []
    return [f"seed must be a whole number from 0 to 2**64 - 1, not {seed!r}"]


def first_batches(model: nn.Module, data: Iterable[Any], samples: int = SAMPLES) -> list[Any]:
    """Keep the first batches, until there are enough samples, on the model's device; an empty one is left out."""
    found, count, device = [], 0, device_of(model)
    for batch in data:
        if size_of(batch):
            found.append(to_device(batch, device))
        count += size_of(batch)
        if count >= samples:
            break
    if not found:
        raise InputError("The data gave no samples. Pass a list of batches or a DataLoader.")
    return found


def size_of(batch: Any) -> int:
    """Return how many samples a batch has."""
    return max((len(tensor) for tensor in tensors_in(as_dict(batch)) if tensor.dim()), default=1)


def joined(batches: list[Any]) -> Any:
    """Make one batch of several.

    Raises ``InputError`` where their tensors do not fit together: texts of different lengths.
    """
    parts, form = zip(*(tree_flatten(batch) for batch in batches), strict=True)
    try:
        whole = [torch.cat(part) if isinstance(part[0], Tensor) else part[0] for part in zip(*parts, strict=True)]
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"The batches cannot be dealt out anew, as they differ in more than their size ({error}). Take them as "
            "they are: batch_size=None."
        ) from error
    return tree_unflatten(whole, form[0])


def dealt(samples: Any, size: int, seed: int) -> Iterator[Any]:
    """Yield batches of ``size`` out of one large batch for ever: every pass in another order, without its remainder."""
    count, generator = size_of(samples), torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(count, generator=generator)
        for rows in order[: count - count % size].split(size):
            yield tree_map_only(Tensor, partial(_rows, rows), samples)


def _rows(rows: Tensor, tensor: Tensor) -> Tensor:
    return tensor[rows.to(tensor.device)]


def again_and_again(data: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches of ``data`` for ever, those without samples left out.

    Raises ``InputError`` where there are none, or none the second time.
    """
    while True:
        count = 0
        for batch in data:
            if size_of(batch):
                count += 1
                yield batch
        if not count:
            raise InputError(
                "The data gave no samples, or is an iterator that ran dry after one pass. Pass a list of batches or a "
                "DataLoader."
            )
