"""One family built, its blocks found, and every block found again with the oracle's own eyes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from coverage_models import Family
from coverage_record import Call, Change, Key, Recording, Replacing
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import resect


@dataclass
class Case:
    """One family, built, with its blocks and where the oracle finds them."""

    family: Family
    model: nn.Module
    example: Any
    blocks: resect.Blocks
    recording: Recording
    places: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Block name -> (operation, operand); operand -1: the operation's value itself."""
    notes: dict[str, Any] = field(default_factory=dict)

    def run(self, model: nn.Module | None = None, example: Any = None) -> Any:
        """Run with a fixed seed; return copies of the outputs."""
        torch.manual_seed(0)
        call = resect.Example.of(self.example if example is None else example)
        output = (model or self.model)(*fresh(call.args), **fresh(dict(call.kwargs)))
        return [leaf.clone() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]

    def oracle(self, changes: dict[str, Change]) -> Any:
        """Run the whole model, with the branch ends of these blocks replaced in the stream of operations."""
        wanted = {self.address(name): change for name, change in changes.items()}
        replacing = Replacing(self.model, wanted)
        with replacing.watching():
            output = self.run()
        if missed := set(wanted) - replacing.applied:
            raise RuntimeError(f"the oracle did not meet {missed}")
        return output

    def address(self, name: str) -> tuple[Key, int]:
        """Return the oracle's name for the branch end of a block."""
        index, operand = self.places[name]
        return self.recording.ops[index].key, operand

    def closed(self, names: Iterable[str], model: nn.Module | None = None, example: Any = None) -> Any:
        """Run with these blocks closed."""
        model = model or self.model
        with resect.closed(model, self.blocks.select(names)):
            return self.run(model, example)

    @property
    def names(self) -> list[str]:
        """The names of the blocks that the oracle can find."""
        return [name for name in self.blocks.names if name in self.places]

    def kinds(self) -> dict[tuple[Any, ...], list[str]]:
        """Group the blocks by what they are made of."""
        modules = dict(self.model.named_modules())
        groups: dict[tuple[Any, ...], list[str]] = {}
        for block in self.blocks:
            inside = tuple(type(modules[name]).__name__ for name in block.modules)
            groups.setdefault((type(modules[block.owner]).__name__, block.shortcut, block.part, inside), []).append(
                block.name
            )
        return groups


def fresh(value: Any) -> Any:
    """Copy an example: some models write into their inputs, or their caches."""
    return copy.deepcopy(value) if not isinstance(value, Tensor) else value.clone()


@contextmanager
def steady() -> Iterator[None]:
    """No gradients, and no fused layers in which a branch cannot be seen."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def differs(expected: list[Tensor], output: list[Tensor], tolerance: float = 0.0) -> str:
    """Say how outputs differ, ``""`` if they are equal to the bit (or within a share of the largest value)."""
    if len(expected) != len(output):
        return f"{len(output)} output tensors instead of {len(expected)}"
    for place, (a, b) in enumerate(zip(expected, output, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {place} is {tuple(b.shape)} {b.dtype} instead of {tuple(a.shape)} {a.dtype}"
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"output {place} ({a.dtype}) differs"
        elif distance(a, b) > tolerance:
            return f"output {place} differs by {distance(a, b):.2g} of the largest value"
    return ""


def distance(a: Tensor, b: Tensor) -> float:
    """Return the largest difference as a share of the largest value; NaN and inf equal themselves."""
    a, b = a.double(), b.double()
    same = (a == b) | (a.isnan() & b.isnan())
    if same.all():
        return 0.0
    scale = a[a.isfinite()].abs().max().item() if a.isfinite().any() else 1.0
    gap = (a - b)[~same].abs().max().item()
    return gap / max(scale, 1e-30) if gap == gap else float("inf")


def calls_of(recording: Recording, block: resect.ResidualBlock) -> list[Call]:
    wanted = list(zip(block.modules, block.calls, strict=True))
    return [c for c in recording.calls for module, k in wanted if c.module == module and k in (None, c.count)]


def _raw_uses(recording: Recording, block: resect.ResidualBlock) -> set[int]:
    """Return the operations on the block's raw parameters, in the right call of its owner."""
    uses = {op for name in block.raw_parameters for op in recording.uses.get(name, ())}
    if block.owner_call is None:
        return uses
    return {
        op
        for c in recording.calls
        if c.module == block.owner and c.count == block.owner_call
        for op in uses & set(c.ops)
    }


def locate(recording: Recording, block: resect.ResidualBlock) -> tuple[int, int] | None:
    """Find the operand of the addition that the whole branch serves, from nothing but the branch's modules.

    It is the first addition after them such that cutting that operand off leaves none of their heavy operations
    needed, and whose other operand depends on the input but not on them. Where the value goes on beside the sum
    (a concatenation), it is the value itself.
    """
    calls = calls_of(recording, block)
    inside = {op for call in calls for op in call.ops}
    anchors = inside or _raw_uses(recording, block)
    outputs = {op for call in calls for op in call.outputs if op in inside}
    needed = recording.needed(set())
    work = {op for op in anchors if recording.ops[op].heavy} & needed or anchors & needed
    if not work:
        return None
    below = recording.descendants(outputs or anchors)
    for index in range(min(work) + 1, len(recording.ops)):
        op = recording.ops[index]
        if op.operands is None or index in inside or index not in needed:
            continue
        for operand in (0, 1):
            one, other = op.operands[operand], op.operands[1 - operand]
            if one not in below or other in below or (other >= 0 and other not in recording.dependent):
                continue
            # `f(x) - x` is not the block's addition: a branch is added to the shortcut, or taken from it.
            if op.name.startswith(("aten::sub", "aten::rsub")) and operand == int(op.name.startswith("aten::rsub")):
                continue
            if not work & recording.needed({(index, operand)}):
                return index, operand
    last = max(outputs, default=-1)
    return (last, -1) if last >= 0 else None


def agrees(recording: Recording, block: resect.ResidualBlock, place: tuple[int, int]) -> bool:
    """Whether the library says the same about where the branch ends."""
    seen: Counter[str] = Counter()
    for index, op in enumerate(recording.ops):
        if index == place[0]:
            return place[1] < 0 or (op.name, seen[op.name], place[1]) in block.places
        seen[op.name] += 1
    return False


def prepare(family: Family) -> Case:
    """Build a family, find its blocks, and find the blocks again with the oracle's own eyes."""
    model, example = family.build()
    blocks = resect.find_blocks(model, example)
    case = Case(family, model, example, blocks, Recording(model))
    call = resect.Example.of(example)
    args, kwargs = fresh(call.args), fresh(dict(call.kwargs))
    case.run()  # caches that the first run builds

    def run() -> Any:
        torch.manual_seed(0)
        return model(*args, **kwargs)

    with steady():
        case.recording.run(run, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)])
    elsewhere = 0
    for block in blocks:
        if place := locate(case.recording, block):
            case.places[block.name] = place
            elsewhere += not agrees(case.recording, block, place)
    case.notes["elsewhere"] = elsewhere  # right all the same where the checks pass: an inner sum of parallel branches
    return case
