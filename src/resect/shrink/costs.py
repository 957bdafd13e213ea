"""What each block costs: parameters, FLOPs, and milliseconds of the network that is left without it, measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from resect.blocks.block import Blocks
from resect.blocks.cost import count_flops, resized, samples_in
from resect.blocks.example import Example, device_of
from resect.blocks.gate import Which, check_detached, resolve
from resect.blocks.modes import kept_buffers
from resect.blocks.unwrap import unwrap
from resect.errors import BlocksError, InputError, check_all, check_counts, nearest, quoted, unknown
from resect.shrink.remove import take_out
from resect.shrink.timed import Latency, inside, timed

QUANTITIES = ("latency", "flops", "parameters")


@dataclass(frozen=True)
class BlockCosts:
    """What the whole network costs, and what goes with each of its blocks; costs of several blocks add up.

    A block inside another's branch counts once where both go.
    """

    names: tuple[str, ...]
    whole: Mapping[str, int]
    """``flops`` (of one sample) and ``parameters`` of the whole network."""
    each: Mapping[str, Mapping[str, int]]
    """The same of each block: ``costs.each["flops"]["layer3.4/conv1"]``."""
    latencies: Mapping[int, Latency]
    """Milliseconds by batch size: of what is left without any block, and of each block."""
    outer: Mapping[str, Collection[str]] = field(default_factory=dict)
    """The blocks in whose branches a block lies: where one of them goes, its costs hold those of the inner one."""

    def latency(self, without: Iterable[str] = (), batch: int | None = None) -> tuple[float, float]:
        """Return the milliseconds of the network without some blocks, and ±: the half-width of their 95 % interval.

        ``batch``: one of the batch sizes measured, by default the first. A block alone in its owner may go by the
        owner's name. Raises ``InputError`` for another batch size, or for unknown names.
        """
        batch = next(iter(self.latencies), None) if batch is None else batch
        if batch is None or batch not in self.latencies:
            measured = ", ".join(map(str, self.latencies)) or "none"
            raise InputError(f"No latency was measured at batch size {batch}; measured: {measured}.")
        return self.latencies[batch].of(self._kept(without))

    def gain(self, without: Iterable[str]) -> float:
        """Return the mean share of latency that goes with some blocks, over all batch sizes; of FLOPs where none is."""
        without = list(without)
        if not self.latencies:
            return self.saved("flops", without)
        return fmean(1 - self.latency(without, batch)[0] / self.latency((), batch)[0] for batch in self.latencies)

    def saved(self, quantity: str, without: Iterable[str]) -> float:
        """Return the share of a quantity, 0 to 1, that goes with some blocks; of latency the least of all batch sizes.

        ``quantity``: ``"latency"``, ``"flops"`` or ``"parameters"``. Raises ``InputError`` for another one, or for one
        that these costs do not hold.
        """
        without = list(without)
        if quantity not in QUANTITIES:
            raise unknown("quantity", quantity, QUANTITIES)
        if quantity == "latency":
            if not self.latencies:
                raise InputError("These costs hold no latency: block_costs(…, batches=(1, 32)) measures it.")
            return min(1 - self.latency(without, batch)[0] / self.latency((), batch)[0] for batch in self.latencies)
        gone = {name for name, kept in zip(self.names, self._kept(without), strict=True) if not kept}
        saved = sum(self.each[quantity][name] for name in gone if gone.isdisjoint(self.outer.get(name, ())))
        return saved / max(1, self.whole[quantity])

    def _kept(self, without: Iterable[str]) -> Tensor:
        gone = {self._meant(name) for name in without}
        return torch.tensor([float(name not in gone) for name in self.names], dtype=torch.float64)

    def _meant(self, name: str) -> str:
        """A block's name, or its owner's alone where that holds no other block."""
        owned = [other for other in self.names if name == other.partition("/")[0]]
        if name not in self.names and len(owned) > 1:
            raise InputError(f"{name!r} holds {len(owned)} residual blocks. Name one of them: {', '.join(owned)}.")
        if name not in self.names and not owned:
            raise unknown("block in these costs", name, self.names)
        return name if name in self.names else owned[0]

    def __str__(self) -> str:
        heads = ["parameters", "FLOPs", *(f"ms at batch {batch}" for batch in self.latencies)]
        whole = [self.whole["parameters"], self.whole["flops"], *(sum(v.ms.tolist()) for v in self.latencies.values())]
        rows = [("whole network", whole)] + [
            (name, [self.each["parameters"][name], self.each["flops"][name],
                    *(float(v.ms[1 + place]) for v in self.latencies.values())])
            for place, name in enumerate(self.names)
        ]  # fmt: skip
        width = max(len(name) for name, _ in rows)
        lines = [" " * width + "".join(f"{head:>17}" for head in heads)]
        for name, row in rows:
            lines.append(name.ljust(width) + "".join(f"{v:>17,}" if isinstance(v, int) else f"{v:>17.3f}" for v in row))
        return "\n".join(lines)


def block_costs(
    model: nn.Module,
    blocks: Which,
    example: Any = None,
    batches: Sequence[int] = (1, 32),
    *,
    rounds: int = 15,
    progress: Callable[[int, int], None] | None = None,
) -> BlockCosts:
    """Measure what goes with each block: parameters, FLOPs, and milliseconds here, now, as the model runs in eval mode.

    Parameters and FLOPs are counted. Of milliseconds, a block has what passes between the beginning of its branch and
    that of the next block's, less what still passes there in the network without any block (shortcuts, norms after
    the addition): see `shrink.timed`. They are told apart within single passes, so that a busy
    machine slows them alike.

    Parameters
    ----------
    model, blocks: left exactly as they are.
    example: what the model runs on, by default the blocks' own example; its samples are cycled to each batch size.
    batches: batch sizes to measure at; () counts only.
    rounds: passes that are timed at each batch size, of the whole network and of that without any block.
    progress: called as ``progress(done, total)``, in batch sizes.

    Raises
    ------
    BlocksError: no blocks, blocks of another model, no example; with ``batches``, blocks inside one another, or one
        whose beginning cannot be seen.
    InputError: a list of batches for an example; batch sizes that are no whole numbers from 1, fewer than 2 rounds.
    AttachError: a gate or method is still attached.

    >>> costs = resect.block_costs(model, blocks, x, batches=(1, 32))
    >>> costs.latency(["layer3.4"], batch=32)
    """
    blocks = resolve(model, blocks)
    model = unwrap(model)
    if not blocks:
        raise BlocksError("There is nothing to weigh: the selection of residual blocks is empty.")
    if example is None and blocks.example is None:
        raise BlocksError("These blocks carry no example to run. Pass one: block_costs(model, blocks, example).")
    if isinstance(example, list) and example and all(isinstance(item, (Mapping, tuple, list)) for item in example):
        raise InputError(
            f"block_costs takes one example, not batches, and this is a list of {len(example)}. Pass one of them, "
            "data[0]; of an (inputs, target) pair the inputs, data[0][0]."
        )
    if not isinstance(batches, Iterable) or isinstance(batches, str):
        raise InputError(f"batches are several batch sizes, as (1, 32), or () to count only, not {batches!r}.")
    batches = list(batches)
    for batch in batches:
        check_counts(**{"a batch size": (batch, 1)})
    check_counts(rounds=(rounds, 2))
    check_detached(model)
    example = Example.of(blocks.example if example is None else example).to(device_of(model))
    one = resized(example, 1) if samples_in(example) else example
    latencies = {}
    with kept_buffers(model):  # the copies share them
        flops = count_flops(model, one)
        gone = {block.name: flops - count_flops(without(model, blocks, [block.name]), one) for block in blocks}
        for number, batch in enumerate(batches, start=1):
            nets = without(model, blocks, ()), without(model, blocks, blocks.names)
            latencies[batch] = timed(*nets, blocks, resized(example, batch), rounds)
            if progress:
                progress(number, len(batches))
    return BlockCosts(
        tuple(blocks.names),
        {"flops": flops, "parameters": sum(parameter.numel() for parameter in model.parameters())},
        {"flops": gone, "parameters": {block.name: block.parameters for block in blocks}},
        latencies,
        {block.name: [other.name for other in blocks if inside(block, other)] for block in blocks},
    )


def without(model: nn.Module, blocks: Blocks, names: Collection[str]) -> nn.Module:
    """Return a copy of a model without some blocks that shares its weights: for measuring, not for keeping."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    net = copy.deepcopy(model, shared)
    if names:
        take_out(net, blocks.select(names))
    return net


def check_shares(fewer: Any) -> None:
    """Raise ``InputError`` unless ``fewer`` is ``{quantity: share}``, with everything that is wrong with it."""
    if not isinstance(fewer, Mapping) or not fewer:
        raise InputError(f"fewer must name shares, for instance {{'latency': 0.3}}, not {fewer!r}.")
    check_all(share_mistakes(fewer), "fewer")


def share_mistakes(fewer: Mapping[Any, Any]) -> list[str]:
    """Say what is wrong with shares of quantities, each of which is to be above 0 and below 1."""
    wrong = []
    for quantity, share in fewer.items():
        if quantity not in QUANTITIES:
            near = nearest(str(quantity), QUANTITIES)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            wrong.append(f"{quantity!r} is none of {quoted(QUANTITIES)}{hint}")
        elif isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share < 1:
            wrong.append(f"{quantity}: {share!r} must be a share above 0 and below 1, 0.3 for 30 %")
    return wrong
