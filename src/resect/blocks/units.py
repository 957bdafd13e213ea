"""Which modules FSDP2 has made units, each of which gathers its parameters while it runs."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch.distributed
from torch import nn


def is_unit(module: nn.Module) -> bool:
    """Whether FSDP2 shards this module as a unit; where nobody imported it, nothing is."""
    kind: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    return isinstance(module, kind)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards any part of the model."""
    return any(is_unit(module) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Let every unit register its pieces: a forward pass without a backward pass leaves some with whole parameters.

    Those are other objects, with no gradient, and nothing done to them lasts.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):  # asked in every step
        return
    for module in model.modules():
        if is_unit(module):
            unit: Any = module
            unit.reshard()


def copied_units(module: nn.Module, memo: dict[int, Any]) -> None:
    """Put a copy of every unit inside ``module`` into ``memo``, as it was before sharding: FSDP2 refuses to copy it."""
    for part in reversed(list(module.modules())):  # inner ones first
        if is_unit(part):
            bare: Any = next(kind for kind in type(part).__mro__ if _plain(kind))
            twin = bare.__new__(bare)
            memo[id(part)] = twin
            kept = {key: value for key, value in part.__dict__.items() if "composable_api" not in key}
            twin.__dict__.update(copy.deepcopy(kept, memo))


def _plain(kind: type) -> bool:
    return not any(ancestor.__name__ in ("FSDPModule", "Intercepted") for ancestor in kind.__mro__)
