"""Verify blocks of a model that holds no values (the meta device), by what is executed.

The outline of a run is a list of the operations that matter for its output: what each is called, its shape, and which
earlier operations, parameters and inputs it reads. The outline of the model with blocks closed must be that of the
recorded run in which the block's one addition hands on its shortcut, and what then serves nobody is gone. That proves
which operations run on what; their numbers, what is no tensor (an axis, a factor) and what they write beside the
output (a buffer, a cache) are not compared: blocks verified so say it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from resect.blocks.block import Blocks, ResidualBlock
from resect.blocks.example import Example
from resect.blocks.gate import Gates
from resect.blocks.graph import VIEWS
from resect.blocks.trace import Node, Trace, trace

_SAME = frozenset({"aten::clone", "aten::detach", "aten::alias", "aten::lift_fresh"})
_MARK = "aten::lgamma"  # stands for a function on the branch end: no model uses it

Place = tuple[str, int, int]
"""Operation, how many of its name ran before, operand."""


@dataclass(frozen=True)
class Step:
    """One operation of an outline; what it reads is told by place in the outline, or by name, sorted in a sum."""

    op: str
    shape: tuple[int, ...]
    reads: tuple[tuple[int | str, bool], ...]
    """Per value read: what it is, and whether a function acted on it."""

    def __str__(self) -> str:
        return f"{self.op} {self.shape}"


def outline(run: Trace, without: Sequence[Place] = (), marked: Sequence[Place] = ()) -> list[Step]:
    """Return what matters of a run: with the operands at some places left out, and those at others acted on."""
    index = {(node.op, node.number): node.index for node in run.nodes if node.op}
    left_out = {(index[op, number], operand) for op, number, operand in without}
    acted_on = {(index[op, number], operand) for op, number, operand in marked}

    sources: dict[int, list[tuple[int, bool]]] = {}
    same: dict[int, int] = {}
    marks: set[int] = set()
    gone: set[int] = set()
    for node in run.nodes:
        found = sources[node.index] = _sources(node, left_out, acted_on, gone)
        if node.operands and not found:
            gone.add(node.index)  # a sum of branches alone, all of them left out
        elif (node.operands and len(found) == 1) or node.op in _SAME or node.op in ("aten::copy_", _MARK):
            source, mark = found[-1]
            same[node.index] = same.get(source, source)
            if mark or source in marks or node.op == _MARK:
                marks.add(node.index)
        elif node.op in VIEWS and (found[0][1] or found[0][0] in marks):
            marks.add(node.index)  # a function acts on a view as on what it is a view of

    live = {same.get(node, node) for node in run.outputs}
    steps: dict[int, int | str] = {}
    for node in reversed(run.nodes):
        if node.index in live and node.index not in same:
            live |= {same.get(source, source) for source, _ in sources[node.index]}
    kept: list[Step] = []
    for node in run.nodes:
        if node.index not in live or node.index in same:
            continue
        if not node.op:
            steps[node.index] = node.parameter or ("input" if node.is_input else "constant")
            continue
        moves = node.op in VIEWS and node.index in marks
        reads = [(steps[same.get(s, s)], (mark or s in marks) and not moves) for s, mark in sources[node.index]]
        op, reads = (node.op.rstrip("_"), sorted(reads, key=str)) if node.operands else (node.op, reads)
        steps[node.index] = len(kept)
        kept.append(Step(op, node.shape, tuple(reads)))
    return kept


def _sources(
    node: Node, left_out: set[tuple[int, int]], acted_on: set[tuple[int, int]], gone: set[int]
) -> list[tuple[int, bool]]:
    """Return the values that an operation reads, each with whether a function acted on it before."""
    if node.operands is None:
        return [(source, False) for source in node.inputs]
    places = [(source, (node.index, place)) for place, source in enumerate(node.operands)]
    return [(source, at in acted_on) for source, at in places if at not in left_out and source not in gone]


def difference(expected: Sequence[Step], found: Sequence[Step]) -> str:
    """Say where two outlines part, "" if they do not."""
    for number, (left, right) in enumerate(zip(expected, found, strict=False)):
        if left != right:
            seen = f"{left} on other values" if str(left) == str(right) else f"{right} instead of {left}"
            return f"operation {number} is {seen}"
    if len(expected) != len(found):
        return f"{len(found)} operations matter for the output instead of {len(expected)}"
    return ""


class OutlineCheck:
    """Compares outlines where ``ValueCheck`` compares values."""

    verified: Literal["structure"] = "structure"

    def __init__(self, model: nn.Module, example: Example, recorded: Trace) -> None:
        self.model = model
        self.example = example
        self.recorded = recorded

    def closing_differs(self, candidates: Sequence[ResidualBlock]) -> str:
        """Say how closing disagrees with the recorded run, "" if it does not."""
        if any(block.zeros for block in candidates):
            return "part of its value goes on beside the sum: that takes a model with values to verify"
        expected = outline(self.recorded, without=[place for block in candidates for place in block.places])
        handle = Gates(self.model, Blocks(candidates))
        try:
            for gate in handle:
                gate.close()
            found = outline(trace(self.model, self.example))
            silent = [gate for gate in handle if not gate.served]
        except Exception as error:
            return f"closing it breaks the model's own code: {type(error).__name__}: {error}"
        finally:
            handle.detach()
        if silent:
            return "the model does not call its modules, so closing has no effect"
        problem = difference(expected, found)
        return f"closing it does not give the model without it: {problem}" if problem else ""

    def opening_differs(self, candidates: Sequence[ResidualBlock]) -> str:
        """Say how the run with open gates differs from the recorded one, "" if it does not."""
        handle = Gates(self.model, Blocks(candidates))
        try:
            problem = difference(outline(self.recorded), outline(trace(self.model, self.example)))
        except Exception as error:
            return f"looking for its gate breaks the model's own code: {type(error).__name__}: {error}"
        finally:
            handle.detach()
        return f"a gate changes the model even while open: {problem}" if problem else ""

    def acting_differs(self, candidates: Sequence[ResidualBlock]) -> str:
        """Say how a function on the branch end disagrees with the recorded run, "" if it does not."""
        expected = outline(self.recorded, marked=[place for block in candidates for place in block.places])
        handle = Gates(self.model, Blocks(candidates))
        try:
            for gate in handle:
                gate.apply(Tensor.lgamma)
            found = outline(trace(self.model, self.example))
        except Exception as error:
            return f"acting on its branch end fails: {type(error).__name__}: {error}"
        finally:
            handle.detach()
        problem = difference(expected, found)
        return f"its last module's output is not the branch end: {problem}" if problem else ""
