"""What closing, scaling and removing a block must mean, one small function per claim.

Every check returns ``{block name: what is wrong}``; ``"*"`` stands for all blocks together.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from coverage_models import Family
from coverage_record import Call, Change, Counting, Key, Recording, Replacing
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import resect

Problems = dict[str, str]
SCALED_TOLERANCE = 1e-4  # of the largest value; operations between a module and its addition round differently


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


# ------------------------------------------------------------------------------------------ where a block is


def _calls_of(recording: Recording, block: resect.ResidualBlock) -> list[Call]:
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
    calls = _calls_of(recording, block)
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


def _misplaced(case: Case) -> str:
    """Say where additions stand in other classes' code than the architecture's."""
    modules = dict(case.model.named_modules())
    keys = [case.recording.ops[index].key for index, operand in case.places.values() if operand >= 0]
    seen = Counter(type(modules[module]).__name__ for module, _, _ in keys if module in modules)
    extra = {name: count for name, count in seen.items() if count > case.family.sums.get(name, 0)}
    return f"additions in other code than the architecture's: {extra}" if case.family.sums and extra else ""


def agrees(recording: Recording, block: resect.ResidualBlock, place: tuple[int, int]) -> bool:
    """Whether the library says the same about where the branch ends."""
    seen: Counter[str] = Counter()
    for index, op in enumerate(recording.ops):
        if index == place[0]:
            return place[1] < 0 or (op.name, seen[op.name], place[1]) in block.places
        seen[op.name] += 1
    return False


# ------------------------------------------------------------------------------------------------- the checks


def kept(case: Case) -> Problems:
    """An attached, open model computes the very same bits, and nothing is left behind afterwards."""
    expected, keys = case.run(), list(case.model.state_dict())
    classes = [type(module) for module in case.model.modules()]
    with resect.gates(case.model, case.blocks):
        problem = differs(expected, case.run())
        if list(case.model.state_dict()) != keys:
            problem = problem or "the state_dict's keys change"
    if [type(module) for module in case.model.modules()] != classes:
        problem = problem or "modules keep another class after detaching"
    problem = problem or differs(expected, case.run())
    return {"*": problem} if problem else {}


def each_closed(case: Case) -> Problems:
    """Every block closed singly gives what the oracle gives, and no operation that served it alone is run."""
    found: Problems = {}
    unseen = 0
    plain = case.run()
    for name in case.names:
        expected = case.oracle({name: torch.zeros_like})
        unseen += all(torch.equal(a, b) for a, b in zip(plain, expected, strict=False))
        problem = _attempt(lambda name=name, expected=expected: differs(expected, case.closed([name])))
        if problem or (problem := _attempt(lambda name=name: _still_runs(case, [name]))):
            found[name] = problem
    case.notes["unseen"] = unseen  # closing them changes no bit of the output: equality says little there
    return found


def all_closed(case: Case) -> Problems:
    """All blocks closed, and random subsets, give what the oracle gives."""
    draw = random.Random(0)
    subsets = [case.names] + [[name for name in case.names if draw.random() < 0.5] for _ in range(2)]
    for names in filter(None, subsets):
        expected = case.oracle(dict.fromkeys(names, torch.zeros_like))
        problem = _attempt(lambda names=names, expected=expected: differs(expected, case.closed(names)))
        problem = problem or _attempt(lambda names=names: _still_runs(case, names))
        if problem:
            return {"*": f"{len(names)} closed together: {problem}"}
    return {}


def _still_runs(case: Case, names: list[str]) -> str:
    """Count the heavy operations and module calls of a run with closed blocks against what the others need."""
    recording = case.recording
    whole = recording.needed(set())
    # What one branch alone needs is free; what several share (a common norm) may still be computed.
    free: set[int] = set()
    for name in names:
        if case.places[name][1] >= 0:
            free |= whole - recording.needed({case.places[name]})
    counting = Counting(case.model)
    with resect.closed(case.model, case.blocks.select(names)), counting.watching():
        case.run()
    saved = sum(recording.ops[index].heavy for index in free)
    expected = sum(op.heavy for op in recording.ops) - saved
    ran = counting.heavy.total()
    if ran > expected:  # which experts run, and so how many, depends on the values
        whole_run = Counting(case.model)
        with whole_run.watching():
            case.oracle(dict.fromkeys(names, torch.zeros_like))
        expected = whole_run.heavy.total() - saved
    if ran > expected:
        return f"{ran - expected} of {ran} heavy operations ran that only closed branches need"
    for block in case.blocks.select(names):
        for call in _calls_of(recording, block):
            others = [c for c in recording.calls if c.module == call.module and not set(c.ops) <= free]
            if counting.called[call.module] > len(others) and set(call.ops) <= free:
                return f"module {call.module!r} still ran (its hooks too)"
    return ""


def scaled(case: Case) -> Problems:
    """A scaled branch end gives what the oracle gives: one of each kind alone, then all at once."""
    names = [name for name in case.names if case.blocks[name].scalable]
    draw = random.Random(1)
    factors = {name: draw.uniform(0.5, 1.0) for name in names}
    first = [group[0] for group in case.kinds().values()]
    found: Problems = {}
    worst = 0.0
    for subset in [*([name] for name in names if name in first), names]:
        if not subset:
            continue
        expected = case.oracle({name: (lambda end, name=name: end * factors[name]) for name in subset})

        def run(subset: list[str] = subset) -> Any:
            with resect.gates(case.model, case.blocks.select(subset)) as handle:
                for name in subset:
                    handle[name].scale(factors[name])
                return case.run()

        try:
            output = run()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        else:
            problem = differs(expected, output, SCALED_TOLERANCE)
            pairs = [(a, b) for a, b in zip(expected, output, strict=False) if a.is_floating_point()]
            if not problem:
                worst = max([worst, *(distance(a, b) for a, b in pairs)])
        if problem:
            found[subset[0] if len(subset) == 1 else "*"] = f"scaled: {problem}"
    case.notes["scaled_error"] = worst
    case.notes["not_scalable"] = len(case.names) - len(names)
    return found


def removed(case: Case) -> Problems:
    """The cut model, and the one loaded from its file, equal the closed one: each kind alone, and all at once."""
    found: Problems = {}
    first = [group[0] for group in case.kinds().values()]
    for names in [*([name] for name in first), case.blocks.names]:
        key = names[0] if len(names) == 1 else "*"
        try:
            expected = case.closed(names)
            small = resect.remove(case.model, case.blocks, names)
            problem = differs(expected, case.run(small))
            before = set(case.model.state_dict())
            if set(small.state_dict()) - before:
                problem = problem or "the cut model has keys that the model has not"
            gone = {n for n, _ in case.model.named_parameters()} - {n for n, _ in small.named_parameters()}
            own = [name for name in names if case.blocks[name].parameters]  # a Fourier transform has none
            if not gone and any(call is None for name in own for call in case.blocks[name].calls):
                problem = problem or "no parameter is gone"
            with tempfile.TemporaryDirectory() as folder:
                resect.save(small, f"{folder}/cut")
                again = resect.load(f"{folder}/cut", case.family.build()[0])
            problem = problem or differs(expected, case.run(again.eval()))
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            found[key] = f"removed: {problem}"
    return found


def other_batch(case: Case) -> Problems:
    """Another batch size than the example's works closed, removed and scaled alike."""
    double = lambda tensor: torch.cat([tensor, tensor.flip(0)]) if tensor.dim() else tensor  # noqa: E731
    again = case.family.batch or (lambda example: tree_map_only(Tensor, double, example))
    call = resect.Example.of(case.example)
    example = (
        case.family.batch(case.example) if case.family.batch else resect.Example(*again((call.args, dict(call.kwargs))))
    )
    case.run(example=example)  # the example itself must fit
    names = case.blocks.names[::2]
    try:
        expected = case.closed(names, example=example)
        small = resect.remove(case.model, case.blocks, names)
        problem = differs(expected, case.run(small, example))
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return {"*": f"another batch size: {problem}"} if problem else {}


def trained(case: Case) -> Problems:
    """In train mode: closed and cut agree in output and gradients; closed branches get none, their buffers rest."""
    for names in (case.blocks.names[1::2], case.blocks.names):
        if names and (problem := _attempt(lambda names=names: _trained(case, names))):
            return {"*": f"train mode: {problem}"}
    return {}


def _trained(case: Case, names: list[str]) -> str:
    model = copy.deepcopy(case.model)
    small = resect.remove(case.model, case.blocks, names).train()
    model.train()
    with torch.enable_grad():
        with resect.closed(model, case.blocks.select(names)):
            outputs = case.run(model)
            _backward(outputs)
        others = case.run(small)
        _backward(others)
    if problem := differs([t.detach() for t in outputs], [t.detach() for t in others]):
        return problem
    kept = dict(small.named_parameters())
    for name, parameter in model.named_parameters():
        if name not in kept or kept[name].grad is None:
            if parameter.grad is not None:
                return f"{name} of a closed branch has a gradient"
        elif parameter.grad is None or differs([kept[name].grad], [parameter.grad]):
            return f"the gradient of {name} is not that of the cut model"
    own, before = dict(small.named_buffers()), dict(case.model.named_buffers())
    for name, buffer in model.named_buffers():
        if not torch.equal(buffer.nan_to_num(), own.get(name, before[name]).nan_to_num()):
            return f"buffer {name} is not that of the {'cut model' if name in own else 'untouched branch'}"
    return ""


def _backward(outputs: list[Tensor]) -> None:
    loss = sum((t.float().square().mean() for t in outputs if t.requires_grad), torch.zeros(()))
    if loss.requires_grad:  # a model all of whose parameters are in its branches has none left
        loss.backward()


def _attempt(check: Callable[[], str]) -> str:
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


CHECKS: dict[str, Callable[[Case], Problems]] = {
    "kept": kept,
    "each closed": each_closed,
    "all closed": all_closed,
    "scaled": scaled,
    "removed": removed,
    "other batch": other_batch,
    "trained": trained,
}


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


def check(family: Family, only: Iterable[str] = CHECKS) -> tuple[Case, dict[str, Problems]]:
    """Run the checks of one family; return what is wrong, by check."""
    with steady():
        case = prepare(family)
        found: dict[str, Problems] = {}
        lost = [name for name in case.blocks.names if name not in case.places]
        if lost:
            found["located"] = dict.fromkeys(lost, "the oracle does not find the block's addition")
        if problem := _misplaced(case):
            found["where"] = {"*": problem}
        for name in only:
            if len(case.blocks) == 0 or (name == "trained" and family.trains):
                continue
            if problems := CHECKS[name](case):
                found[name] = problems
    return case, found
