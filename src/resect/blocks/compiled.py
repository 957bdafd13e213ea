"""Compile a model block by block: every state of the few gates of one owner is a graph of its own."""

from __future__ import annotations

import importlib
import inspect
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.gate import Which, held, resolve
from resect.blocks.units import is_sharded
from resect.blocks.unwrap import is_compiled, is_wrapped_compiled, unwrap
from resect.errors import AttachError, InputError, quoted

MOST = 3
"""Blocks that an owner may hold: with frozen and learning weights, n blocks have up to 4ⁿ states."""
GRAPHS = 512
"""Graphs that one owner may have; torch's own limit is 8."""


@dataclass(frozen=True)
class Compiled:
    """What ``resect.compile`` compiled, and what it left to run as written."""

    owners: tuple[str, ...]
    """Names of the modules that are compiled, each for itself."""
    eager: dict[str, str]
    """Owner of blocks -> why it is not compiled."""


def compile(model: nn.Module, blocks: Which, **options: Any) -> Compiled:
    """Compile the owner of every block in place (a ResNet's block, a transformer's layer), each for itself.

    A gate that opens or closes changes the code that runs. A model compiled as a whole has as many states as there
    are subsets of its blocks, and would be compiled in nearly every step; one owner has two or four, which
    ``method.warmup(batch)`` compiles beforehand. What is between the owners (stem, pooling, head) runs as written.
    Torch's cap on the graphs of one function, which all owners of a class share, is raised for this process.

    Parameters
    ----------
    model, blocks: the model and its blocks (``find_blocks``); no gate attached yet.
    options: of ``torch.compile``: ``backend``, ``mode``, ``dynamic``, … ``fullgraph`` is True, so that a part that
        cannot be compiled is an error when it is first called, not slow code.

    Returns ``Compiled``. Owners are left as written, with a warning, where they hold more than three blocks or
    other owners, are the model itself, or run several times in one forward pass.

    Raises
    ------
    InputError: torch is older than 2.15 (its limit of 8 graphs holds for all owners of a class together, and what is
        beyond runs uncompiled without a word), or the model, or part of it, is compiled already or sharded.
    AttachError: gates are attached.

    >>> resect.compile(model, blocks)
    >>> with resect.StochasticDepth(model, blocks, optimizer=optimizer) as method:
    ...     method.warmup(next(iter(loader)))
    """
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        raise InputError(
            f"resect.compile needs torch 2.15 or newer, this is {torch.__version__}: there, all owners of one class "
            "share 8 graphs, and what is beyond runs uncompiled without a word. Update torch, or leave this line out."
        )
    if is_sharded(model):
        raise InputError(
            "This model is sharded by fully_shard (FSDP2), whose hooks run between the parts of a block and fit in no "
            "graph. Leave out the one or the other."
        )
    if is_wrapped_compiled(model):
        raise InputError("This model is wrapped by torch.compile. Pass the model itself: resect.compile(model, …).")
    blocks, model = resolve(model, blocks), unwrap(model)
    if held(model):
        raise AttachError("resect.compile comes before anything is attached to the model: detach, compile, attach.")
    _check_uncompiled(model, blocks)
    owners = by_owner(blocks)
    eager = {owner: why for owner in owners if (why := _why_not(owner, owners))}
    compiled = tuple(owner for owner in owners if owner not in eager)
    config: Any = importlib.import_module("torch._dynamo.config")
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, GRAPHS * len(owners))
    chosen = {"fullgraph": True, "recompile_limit": GRAPHS} | options
    for owner in compiled:
        model.get_submodule(owner).compile(isolate_recompiles=True, **chosen)
    if eager:
        owner, why = next(iter(eager.items()))
        warnings.warn(
            f"{len(eager)} of {len(eager) + len(compiled)} owners of blocks are not compiled and run as written, for "
            f"instance {owner!r}: {why}.",
            stacklevel=2,
        )
    return Compiled(compiled, eager)


def by_owner(blocks: Blocks) -> dict[str, list[ResidualBlock]]:
    """Return the blocks of every owner, in order of execution."""
    owners: dict[str, list[ResidualBlock]] = {}
    for block in blocks:
        owners.setdefault(block.owner, []).append(block)
    return owners


def _why_not(owner: str, owners: dict[str, list[ResidualBlock]]) -> str:
    mine = owners[owner]
    inside = [other for other in owners if other.startswith(f"{owner}.")]
    if not owner:
        return "it is the model itself"
    if inside:
        return f"it holds {quoted(inside, 2)}, which have blocks of their own"
    if any(call is not None for block in mine for call in (*block.calls, block.owner_call)):
        return "its modules run several times in one forward pass"
    if len(mine) > MOST:
        return f"it holds {len(mine)} blocks, whose gates have too many states together"
    return ""


def _check_uncompiled(model: nn.Module, blocks: Blocks) -> None:
    owners = set(by_owner(blocks))
    for name, module in model.named_modules():
        around = [owner for owner in owners if not name or owner == name or owner.startswith(f"{name}.")]
        inside = [owner for owner in owners if owner and name.startswith(f"{owner}.")]
        if is_compiled(module) and name not in owners and (around or inside):
            what = f"{name!r}" if name else "The model"
            raise InputError(
                f"{what} is compiled already, and {quoted(around or inside, 2)} with it. Leave that out: "
                "resect.compile(model, blocks) compiles block by block."
            )
