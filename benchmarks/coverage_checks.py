"""What closing, scaling and removing a block must mean, one small function per claim.

Every check returns ``{block name: what is wrong}``; ``"*"`` stands for all blocks together.
"""

from __future__ import annotations

import copy
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from coverage_case import Case, calls_of, differs, distance, prepare, steady
from coverage_models import Family
from coverage_record import Counting
from torch import Tensor
from torch.utils._pytree import tree_map_only

import resect

Problems = dict[str, str]
SCALED_TOLERANCE = 1e-4  # of the largest value; operations between a module and its addition round differently


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
    # What one branch alone needs is free; what several share (a common norm) may still be computed, and so may the
    # blocks of a stream of its own that ends in a closed branch.
    streams = [index for name, (index, operand) in case.places.items() if operand >= 0 and name not in names]
    free: set[int] = set()
    for name in names:
        if case.places[name][1] >= 0:
            free |= whole - recording.needed({case.places[name]}, streams)
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
        for call in calls_of(recording, block):
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


def _misplaced(case: Case) -> str:
    """Say where additions stand in other classes' code than the architecture's."""
    modules = dict(case.model.named_modules())
    keys = [case.recording.ops[index].key for index, operand in case.places.values() if operand >= 0]
    seen = Counter(type(modules[module]).__name__ for module, _, _ in keys if module in modules)
    extra = {name: count for name, count in seen.items() if count > case.family.sums.get(name, 0)}
    return f"additions in other code than the architecture's: {extra}" if case.family.sums and extra else ""


CHECKS: dict[str, Callable[[Case], Problems]] = {
    "kept": kept,
    "each closed": each_closed,
    "all closed": all_closed,
    "scaled": scaled,
    "removed": removed,
    "other batch": other_batch,
    "trained": trained,
}


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
