"""Check that closing a block, and acting on its branch end, do exactly what they say.

The oracle knows nothing of modules or interception: it runs the model whole and replaces one operand of
one addition in the stream of operations.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from resect.blocks.absent import Absent, unwritten
from resect.blocks.block import Blocks, Refusal, ResidualBlock
from resect.blocks.example import Example
from resect.blocks.gate import Gates
from resect.blocks.inflight import InFlight
from resect.blocks.template import tensors_in

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
    """Replace operands of operations while a model runs: ``{(operation, how many ran before, operand): change}``."""

    def __init__(self, changes: Mapping[tuple[str, int, int], Change]) -> None:
        super().__init__()
        self._changes = changes
        self._names = {name for name, _, _ in changes}
        self._seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in self._names:
            number = self._seen[name]
            self._seen[name] += 1
            operands = list(args)
            for operand in range(len(operands)):
                change = self._changes.get((name, number, operand))
                if change is None:
                    continue
                changed = change(operands[operand])
                if operand == 0 and name.endswith("_"):
                    operands[0].copy_(changed)  # the sum must still be written where the model expects it
                else:
                    operands[operand] = changed
            args = tuple(operands)
        return func(*args, **(kwargs or {}))


class Check(Protocol):
    """How blocks are compared with what they should be; both ways say how they differ, "" if they do not."""

    @property
    def verified(self) -> Literal["values", "structure"]:
        """What is compared."""
        ...

    def closing_differs(self, candidates: Sequence[ResidualBlock]) -> str:
        """Compare the model with these blocks closed."""
        ...

    def acting_differs(self, candidates: Sequence[ResidualBlock]) -> str:
        """Compare the model with a function on the branch end of each of these blocks."""
        ...

    def opening_differs(self, candidates: Sequence[ResidualBlock]) -> str:
        """Compare the model with an open gate on each of these blocks."""
        ...


def verify(
    check: Check, candidates: Sequence[ResidualBlock], *, each: bool = False
) -> tuple[list[ResidualBlock], list[Refusal]]:
    """Split candidates into verified blocks and refusals; call it inside ``quiet``.

    All are compared at once, or each alone too. On disagreement the list is halved until the blocks at fault
    stand alone; what is not the branch end may still be carried to the addition.
    """
    bad_close = at_fault(candidates, check.closing_differs, each)
    good = [block for block in candidates if block.name not in bad_close]
    bad_end = at_fault([block for block in good if block.scalable], check.acting_differs, each)
    good = [replace(block, exact=False) if block.name in bad_end else block for block in good]
    carried = [block for block in good if block.name in bad_end]
    still_bad = at_fault(carried, check.acting_differs, each)
    out_of_reach = {name: reason for name, reason in bad_end.items()
                    if name in still_bad or all(block.name != name for block in carried)}  # fmt: skip
    blocks = [
        replace(block, end=None, end_leaf=None, reason=out_of_reach[block.name])
        if block.name in out_of_reach
        else block
        for block in good
    ]
    # Where a function acts as it should, the gate that holds it is no hindrance; elsewhere that is still to be seen.
    bad_open = at_fault([block for block in blocks if not block.scalable], check.opening_differs, each)
    blocks = [block for block in blocks if block.name not in bad_open]
    where = {block.name: block.owner for block in candidates}
    return (
        [replace(block, index=index, verified=check.verified) for index, block in enumerate(blocks)],
        [Refusal(where[name] or name, reason) for name, reason in (bad_close | bad_open).items()],
    )


def at_fault(
    candidates: Sequence[ResidualBlock], differs: Callable[[Sequence[ResidualBlock]], str], each: bool
) -> dict[str, str]:
    """Return ``{name: reason}`` of the candidates that disagree with the oracle."""
    if not candidates:
        return {}
    if each:
        found = {c.name: differs([c]) for c in candidates}
        return {name: reason for name, reason in found.items() if reason}
    reason = differs(candidates)
    if not reason:
        return {}
    if len(candidates) == 1:
        return {candidates[0].name: reason}
    half = len(candidates) // 2
    found = at_fault(candidates[:half], differs, each) | at_fault(candidates[half:], differs, each)
    # Alone each agrees, together they do not: none of them can be trusted.
    return found or {c.name: "it agrees with the oracle alone, but not with other blocks" for c in candidates}


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
        stateful = stack.enter_context(unwritten())
        for owner in sorted({block.owner for block in blocks if block.owner}):
            hook = model.get_submodule(owner).register_forward_hook(
                lambda _, args, output: seen.append(_copied(output))
            )
            stack.callback(hook.remove)
        if any(not block.owner for block in blocks):
            for name, child in model.named_children():
                # What has no weights (one ReLU for everything) may also run on values that are not computed.
                if name not in inside and any(True for _ in child.parameters()):
                    hook = child.register_forward_pre_hook(lambda _, args: seen.append(_copied(args)))
                    stack.callback(hook.remove)
        return _copied(example.run(model), stateful), seen


class ValueCheck:
    """Runs the model with gates and under the oracle, and compares every value to the bit.

    Closing: all blocks at once and a random subset. Acting on the branch end: all at once, each by its own function.
    """

    verified: Literal["values"] = "values"

    def __init__(self, model: nn.Module, example: Example, blocks: Sequence[ResidualBlock]) -> None:
        self.model = model
        self.example = example
        self.blocks = blocks

    def closing_differs(self, candidates: Sequence[ResidualBlock]) -> str:
        """Say how closing disagrees with the oracle, "" if it does not."""
        draw = random.Random(0)
        subsets = [list(candidates)]
        if len(candidates) > 1:
            subsets.append([candidate for candidate in candidates if draw.random() < 0.5])
        for subset in subsets:
            expected = self.run({place: torch.zeros_like for c in subset for place in c.places})
            handle = Gates(self.model, Blocks(subset))
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
            difference = compare(expected, output) or _absent_result(output[0])
            if difference:
                return f"closing it does not give the model without it: {difference}"
        return ""

    def acting_differs(self, candidates: Sequence[ResidualBlock]) -> str:
        """Say how a function on the branch end disagrees with the oracle, "" if it does not."""
        draw = random.Random(1)
        functions = [Affine(draw.uniform(0.5, 1.0), draw.uniform(0.05, 0.1)) for _ in candidates]
        expected = self.run({place: f for c, f in zip(candidates, functions, strict=True) for place in c.places})
        handle = Gates(self.model, Blocks(candidates))
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

    def opening_differs(self, candidates: Sequence[ResidualBlock]) -> str:
        """Say how the model with open gates differs from itself, "" if it does not."""
        expected = self.run()
        handle = Gates(self.model, Blocks(candidates))
        try:
            difference = compare(expected, self.run())
        except Exception as error:
            return f"looking for its gate breaks the model's own code: {type(error).__name__}: {error}"
        finally:
            handle.detach()
        return f"a gate changes the model even while open: {difference}" if difference else ""

    def run(self, changes: Mapping[tuple[str, int, int], Change] | None = None) -> Any:
        """Return the model's output and those of the blocks' owners, with operands of additions replaced."""
        if changes is None:
            return observe(self.model, self.example, self.blocks)
        with Oracle(changes):
            return observe(self.model, self.example, self.blocks)


def _copied(output: Any, unwritten: Sequence[Tensor] = ()) -> Any:
    """Copy tensors: what a module returned may be written in place later.

    Nothing for a state of closed branches that they did not write: nobody else reads it, and what comes of it
    is compared.
    """
    stale = {tensor.untyped_storage()._cdata for tensor in unwritten}
    return [
        (InFlight() if stale and leaf.untyped_storage()._cdata in stale else leaf.clone())
        if isinstance(leaf, Tensor)
        else leaf
        for leaf in tensors_in(output, and_absent=True)
    ]


def _absent_result(output: Any) -> str:
    """Say that the model itself returns what was not computed, "" if it does not."""
    found = any(isinstance(leaf, Absent) for leaf in tensors_in(output, and_absent=True))
    return "the model returns a value of the branch" if found else ""


def compare(expected: Any, output: Any) -> str:
    """Say how two model outputs differ, "" when they are equal to the bit (NaN equals NaN)."""
    left, right = tensors_in(expected, and_absent=True), tensors_in(output, and_absent=True)
    if len(left) != len(right):
        return f"{len(right)} output tensors instead of {len(left)}"
    for place, (a, b) in enumerate(zip(left, right, strict=True)):
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            continue  # not computed, or not written: a layer hands it on (attention weights), and nobody uses it
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"output {place} is {tuple(b.shape)} {b.dtype} instead of {tuple(a.shape)} {a.dtype}"
        if not ((a == b) | (a.isnan() & b.isnan())).all():
            largest = (a.double() - b.double()).abs().max().item()
            return f"output {place} differs by up to {largest:.3g} (largest value {a.abs().max().item():.3g})"
    return ""
