"""Models sharded by FSDP2 (``torch.distributed.fsdp.fully_shard``): a closed branch is not even gathered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from resect.blocks.block import Blocks
from resect.blocks.gate import Which, resolve
from resect.blocks.units import is_sharded
from resect.blocks.unwrap import is_compiled, unwrap
from resect.errors import AttachError

Model = TypeVar("Model", bound=nn.Module)


def fully_shard(model: Model, blocks: Which, **options: Any) -> Model:
    """Shard a model by FSDP2 in such units that a closed branch costs no all-gather.

    Every module of a branch that holds a matrix is a unit of its own, gathered when it runs: in a transformer one per
    branch, in a ResNet one per convolution. All else, what of a branch holds vectors only (norms, layer scales)
    included, is gathered with the whole model, once per forward pass. A module whose weights other parts use too (tied
    weights), or that runs for several blocks, stays with the whole as well.

    Parameters
    ----------
    model: the model itself, in no wrapper and not compiled. It is changed in place. Methods may be
        attached before or after; make the optimizer after.
    blocks: its blocks; find them before.
    options: of ``torch.distributed.fsdp.fully_shard``, for every unit: ``mesh``, ``mp_policy``,
        ``reshard_after_forward``, …

    Returns the model.

    Raises ``AttachError`` for a model that is wrapped, compiled or sharded already.

    >>> blocks = resect.find_blocks(model, example)
    >>> resect.fully_shard(model, blocks)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    """
    from torch.distributed.fsdp import fully_shard as shard

    if unwrap(model) is not model:
        raise AttachError(
            f"resect.fully_shard takes the model itself, not inside a {type(model).__name__}: shard it first; "
            "DistributedDataParallel is not needed then."
        )
    if any(is_compiled(module) for module in model.modules()):
        raise AttachError(
            f"Parts of this {type(model).__name__} are compiled, and the hooks by which FSDP2 gathers fit in no graph. "
            "Leave out the one or the other."
        )
    if is_sharded(model):
        raise AttachError(f"This {type(model).__name__} is sharded already. Build it anew, and shard that.")
    for module in units(model, resolve(model, blocks)):
        shard(module, **options)
    shard(model, **options)
    return model


def units(model: nn.Module, blocks: Blocks) -> Iterator[nn.Module]:
    """Yield the modules that are to be units of their own, inner ones first."""
    modules = dict(model.named_modules())
    calls: dict[str, list[int | None]] = {}
    for block in blocks:
        for name, call in zip(block.modules, block.calls, strict=True):
            calls.setdefault(name, []).append(call)
    once = [name for name, of_blocks in calls.items() if of_blocks == [None]]
    for name in sorted(once, key=lambda name: -name.count(".")):
        module = modules[name]
        inside = set(module.modules())
        elsewhere = {id(p) for other in modules.values() if other not in inside for p in other._parameters.values()}
        own = list(module.parameters())
        if any(p.ndim > 1 for p in own) and not any(id(p) in elsewhere for p in own):
            yield module
