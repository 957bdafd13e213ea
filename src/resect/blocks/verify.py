"""Check that closing a block, and acting on its branch end, do exactly what they say.

The oracle knows nothing of modules or interception: it runs the model whole and replaces one operand of
one addition in the stream of operations.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from resect.blocks.block import Blocks, Refusal, ResidualBlock
from resect.blocks.branch import Candidate
from resect.blocks.example import Example
from resect.blocks.gate import Gates
from resect.blocks.trace import is_addition

Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Affine:
    """``a·f + b``: tells a gate on the wrong value from one on the branch end, also where f is all zeros."""

    a: float
    b: float

    def __call__(self, branch: Tensor) -> Tensor:
        """Return ``a * branch + b``."""
        return branch * self.a + self.b


class Oracle(TorchDispatchMode):
    """Replace operands of additions while a model runs: ``{(addition number, operand): change}``."""

    def __init__(self, changes: dict[tuple[int, int], Change]) -> None:
        super().__init__()
        self._changes = changes
        self._seen = -1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_addition(func, args, kwargs):
            self._seen += 1
            operands = list(args)
            for operand in (0, 1):
                change = self._changes.get((self._seen, operand))
                if change is None:
                    continue
                changed = change(operands[operand])
                if operand == 0 and func._schema.name.endswith("add_"):
                    operands[0].copy_(changed)  # the sum must still be written where the model expects it
                else:
                    operands[operand] = changed
            args = tuple(operands)
        return func(*args, **kwargs)


def verify(
    model: nn.Module, example: Example, candidates: Sequence[Candidate], *, each: bool = False
) -> tuple[list[ResidualBlock], list[Refusal]]:
    """Split candidates into verified blocks and refusals; call it inside ``quiet``.

    Closing: a few random subsets and all blocks at once must equal the oracle to the bit. Acting on the
    branch end: all blocks at once, each with its own function. On disagreement the list is halved until
    the blocks at fault stand alone.
    """
    check = _Check(model, example, [candidate.block for candidate in candidates])
    bad_close = check.at_fault(candidates, check.closing_differs, each)
    good = [candidate for candidate in candidates if candidate.block.name not in bad_close]
    scalable = [candidate for candidate in good if candidate.block.end is not None]
    bad_end = check.at_fault(scalable, check.acting_differs, each)

    blocks: list[ResidualBlock] = []
    for candidate in good:
        block = candidate.block
        if block.name in bad_end:
            block = replace(block, end=None, end_leaf=None, reason=bad_end[block.name])
        blocks.append(replace(block, index=len(blocks)))
    where = {candidate.block.name: candidate.block.owner for candidate in candidates}
    return blocks, [Refusal(where[name] or name, reason) for name, reason in bad_close.items()]


def observe(model: nn.Module, example: Example, blocks: Sequence[ResidualBlock]) -> Any:
    """Run a model; return copies of its output and of what the owners of the blocks return.

    The output alone proves nothing where a zero-initialised head hides everything. Blocks that belong to
    the model itself have no owner to look at: there, what enters the modules outside the branches is taken.
    Call it inside ``quiet``.
    """
    torch.manual_seed(0)
    seen: list[Any] = []
    inside = {name.split(".")[0] for block in blocks for name in block.modules}
    with ExitStack() as stack:
        for owner in sorted({block.owner for block in blocks if block.owner}):
            hook = model.get_submodule(owner).register_forward_hook(
                lambda _, args, output: seen.append(_copied(output))
            )
            stack.callback(hook.remove)
        if any(not block.owner for block in blocks):
            for name, child in model.named_children():
                if name not in inside:
                    hook = child.register_forward_pre_hook(lambda _, args: seen.append(_copied(args)))
                    stack.callback(hook.remove)
        return _copied(example.run(model)), seen


class _Check:
    def __init__(self, model: nn.Module, example: Example, blocks: Sequence[ResidualBlock]) -> None:
        self.model = model
        self.example = example
        self.blocks = blocks

    def at_fault(
        self, candidates: Sequence[Candidate], differs: Callable[[Sequence[Candidate]], str], each: bool
    ) -> dict[str, str]:
        """Return ``{name: reason}`` of the candidates that disagree with the oracle."""
        if not candidates:
            return {}
        if each:
            found = {c.block.name: differs([c]) for c in candidates}
            return {name: reason for name, reason in found.items() if reason}
        reason = differs(candidates)
        if not reason:
            return {}
        if len(candidates) == 1:
            return {candidates[0].block.name: reason}
        half = len(candidates) // 2
        found = self.at_fault(candidates[:half], differs, each) | self.at_fault(candidates[half:], differs, each)
        # Alone each agrees, together they do not: none of them can be trusted.
        return found or {c.block.name: "it agrees with the oracle alone, but not with other blocks" for c in candidates}

    def closing_differs(self, candidates: Sequence[Candidate]) -> str:
        """Say how closing disagrees with the oracle, "" if it does not."""
        draw = random.Random(0)
        subsets = [list(candidates)]
        if len(candidates) > 1:
            subsets.append([candidate for candidate in candidates if draw.random() < 0.5])
        for subset in subsets:
            expected = self.run({(c.addition, c.operand): torch.zeros_like for c in subset})
            handle = Gates(self.model, Blocks(c.block for c in subset))
            try:
                for gate in handle:
                    gate.close()
                output = self.run()
                silent = [gate.block.name for gate in handle if not gate.served]
            except Exception as error:
                return f"closing it breaks the model's own code: {type(error).__name__}: {error}"
            finally:
                handle.detach()
            if silent:
                return "the model does not call its modules, so closing has no effect"
            difference = compare(expected, output)
            if difference:
                return f"closing it does not give the model without it: {difference}"
        return ""

    def acting_differs(self, candidates: Sequence[Candidate]) -> str:
        """Say how a function on the branch end disagrees with the oracle, "" if it does not."""
        draw = random.Random(1)
        functions = [Affine(draw.uniform(0.5, 1.0), draw.uniform(0.05, 0.1)) for _ in candidates]
        expected = self.run({(c.addition, c.operand): f for c, f in zip(candidates, functions, strict=True)})
        handle = Gates(self.model, Blocks(c.block for c in candidates))
        try:
            for gate, function in zip(handle, functions, strict=True):
                gate.apply(function)
            output = self.run()
        except Exception as error:
            return f"acting on its branch end fails: {type(error).__name__}: {error}"
        finally:
            handle.detach()
        difference = compare(expected, output)
        return f"its last module's output is not the branch end: {difference}" if difference else ""

    def run(self, changes: dict[tuple[int, int], Change] | None = None) -> Any:
        """Return the model's output and those of the blocks' owners, with operands of additions replaced."""
        if changes is None:
            return observe(self.model, self.example, self.blocks)
        with Oracle(changes):
            return observe(self.model, self.example, self.blocks)


def _copied(output: Any) -> Any:
    """Copy tensors: what a module returned may be written in place later."""
    return tree_map_only(Tensor, torch.clone, output)


def compare(expected: Any, output: Any) -> str:
    """Say how two model outputs differ, "" when they are equal to the bit (NaN equals NaN)."""
    left = [leaf for leaf in tree_leaves(expected) if isinstance(leaf, Tensor)]
    right = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
    if len(left) != len(right):
        return f"{len(right)} output tensors instead of {len(left)}"
    for place, (a, b) in enumerate(zip(left, right, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {place} is {tuple(b.shape)} {b.dtype} instead of {tuple(a.shape)} {a.dtype}"
        if not ((a == b) | (a.isnan() & b.isnan())).all():
            largest = (a.double() - b.double()).abs().max().item()
            return f"output {place} differs by up to {largest:.3g} (largest value {a.abs().max().item():.3g})"
    return ""
