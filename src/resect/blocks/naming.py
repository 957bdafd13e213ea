"""Where a block lives, what it mostly is, and a name of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from resect.blocks.block import ResidualBlock
from resect.blocks.graph import Graph
from resect.blocks.trace import Call


def innermost(graph: Graph, calls: Iterable[int]) -> Call | None:
    """Return the innermost module call that holds all of these (each itself included); None: the model's code alone."""

    def chain(index: int) -> list[int]:
        above = []
        while index >= 0:
            above.append(index)
            index = graph.trace.calls[index].parent
        return above[::-1]

    chains = [chain(call) for call in calls]
    common = [level[0] for level in zip(*chains, strict=False) if len(set(level)) == 1]
    named = [graph.trace.calls[index] for index in common if graph.trace.calls[index].name != "?"]
    return named[-1] if named else None


def part_of(modules: list[nn.Module], names: list[str], owner: str) -> str:
    """Return what a branch mostly is: attention, conv or mlp; ``names`` are those of its modules inside ``owner``."""
    inside = [pair for name, module in zip(names, modules, strict=True) for pair in module.named_modules(prefix=name)]
    words = [
        f"{name.rpartition('.')[2]} {type(module).__name__}".lower()
        for name, module in inside
        if "norm" not in type(module).__name__.lower()  # a norm may be called post_attention_layernorm
    ]
    above = {part.lower() for name in names for part in name.removeprefix(owner).split(".")[:-1]}
    words += [part for part in above if "norm" not in part]
    if any("attn" in word or "attention" in word for word in words):
        return "attention"
    if any(isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for _, module in inside):
        return "conv"
    return "mlp"


def unique(found: list[ResidualBlock]) -> list[ResidualBlock]:
    """Number equal names apart (``…@1``, ``…@2``), and blocks without modules (``…/+0``, ``…/+1``)."""
    seen: dict[str, int] = {}
    out = []
    for block in found:
        count = seen[block.name] = seen.get(block.name, -1) + 1
        if block.name.endswith("/+"):
            block = replace(block, name=f"{block.name}{count}")
        elif count:
            block = replace(block, name=f"{block.name}@{count}")
        out.append(block)
    return out
