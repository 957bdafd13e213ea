"""Name a residual block by hand, where the search refuses or misses it; it is verified as any other."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import nn

from resect.blocks.block import Blocks, Shortcut
from resect.blocks.branch import describe
from resect.blocks.choose import named_apart
from resect.blocks.gate import remembered
from resect.blocks.graph import Graph
from resect.blocks.look import Look, looked_at
from resect.blocks.sums import Operand, Term, operands_of, term_of
from resect.blocks.verify import verify
from resect.errors import BlocksError, InputError, quoted, unknown


class Meeting(NamedTuple):
    """An addition at which a branch meets the other operands."""

    sum: int
    operand: Operand
    others: tuple[Operand, ...]
    inside: frozenset[int]
    """The operations that serve only the branch."""


def block(
    model: nn.Module,
    example: Any,
    *,
    branch: str | Iterable[str],
    shortcut: str | Iterable[str] = (),
    addition: int | None = None,
) -> Blocks:
    """Describe one residual block by the modules of its branch, and verify it as ``find_blocks`` does.

    For what the search passes over: a block inside the branch of another, of which it offers the outer one; a long
    skip over most of the model; a shortcut that is itself deep or not linear. What else runs for the branch alone
    (norms, functions on raw parameters) belongs to it without being named.

    Parameters
    ----------
    model, example: as for ``find_blocks``.
    branch: names of modules in the branch; all that need naming is what tells it from other branches.
    shortcut: names of modules whose value the other operand is made of; only needed to tell additions apart.
    addition: which one, counted from 0 in the order of execution, where a branch's modules feed several.

    Returns
    -------
    ``Blocks`` with the one block, which ``closed``, ``remove`` and the methods take; ``blocks + resect.block(…)`` puts
    it in its place among others. Its name alone is not enough for them: pass the ``Blocks``.

    Raises
    ------
    InputError: a name is unknown, no addition or more than one fits, or the shortcut does not meet the branch there.
    BlocksError: the block cannot be controlled exactly, and why; and as for ``find_blocks``.
    """
    with looked_at(model, example) as look:
        branches, shortcuts = _named(look, branch, "branch"), _named(look, shortcut, "shortcut")
        meeting = _chosen(look.graph, _meetings(look.graph, branches, shortcuts), branches, addition)
        term = _term(look.graph, meeting)
        candidates, refused = describe(look.graph, [term], look.model)
        good, bad = verify(look.check(candidates), candidates)
    if not good:
        reasons = [refusal.reason for refusal in (*refused, *bad)]
        why = reasons[0] if reasons else "no weights and no mixing lie in it, so there is nothing to leave out"
        raise BlocksError(f"The branch of {quoted(branches)} cannot be controlled: {why}.")
    # A name that already means another block of this model would be taken for that one.
    return look.blocks([named_apart(good[0], remembered(look.model))])


def _named(look: Look, names: str | Iterable[str], what: str) -> list[str]:
    """Check the names of modules."""
    wanted = [names] if isinstance(names, str) else list(names)
    present = dict(look.model.named_modules())
    del present[""]
    for name in wanted:
        if name not in present:
            raise unknown("module", name, present)
        if not any(call.name == name for call in look.graph.trace.calls):
            raise InputError(f"Module {name!r} was not called on this example, so it is in no {what}.")
    if what == "branch" and not wanted:
        raise InputError("branch is empty. Name at least one module of the branch, as model.named_modules() does.")
    return wanted


def _meetings(graph: Graph, branches: list[str], shortcuts: list[str]) -> list[Meeting]:
    """Return every addition one of whose operands is made by the named modules, and otherwise serves nobody.

    Raises ``InputError`` where there is none, saying what becomes of the modules' value instead.
    """
    joined: set[int] = set()
    found: list[Meeting] = []
    shared: list[int] = []
    for outer in reversed([node for node in graph.nodes if node.operands and graph.live[node.index]]):
        if outer.index in joined:
            continue
        operands = operands_of(graph, outer, joined)
        for operand in operands:
            if not all(_reaches(graph, name, operand.value) for name in branches):
                continue
            inside = graph.exclusive(operand.value, [operand.addition])
            others = tuple(other for other in operands if other is not operand)
            if all(_lies_in(graph, name, inside) for name in branches):
                found.append(Meeting(outer.index, operand, others, inside))
            elif not any(_reaches(graph, name, other.value) for name in branches for other in others):
                shared.append(outer.index)
    if not found and shared:
        raise InputError(
            f"What {quoted(branches)} computes reaches the addition in {_where(graph, min(shared))}, but is also used "
            "outside it: closing the branch would take it from others too."
        )
    if not found:
        raise InputError(
            f"{quoted(branches)} {'reach' if len(branches) > 1 else 'reaches'} no addition of two tensors: sums by "
            "cat, lerp or addcmul, and by modules that add inside one operation, cannot be told from their terms. Name "
            "modules of one branch."
        )
    met = [m for m in found if all(any(_reaches(graph, name, o.value) for o in m.others) for name in shortcuts)]
    if not met:
        places = ", ".join(dict.fromkeys(_where(graph, m.sum) for m in found))
        raise InputError(
            f"The shortcut {quoted(shortcuts)} does not meet the branch {quoted(branches)}: what is added to it, in "
            f"{places}, does not come from there. Leave shortcut out, or name modules before the addition."
        )
    return sorted(met, key=lambda meeting: (meeting.sum, meeting.operand.value))


def _chosen(graph: Graph, meetings: list[Meeting], branches: list[str], addition: int | None) -> Meeting:
    """Return the addition meant: the numbered one, or else that whose branch holds least besides what was named."""
    if addition is not None:
        if addition not in range(len(meetings)):
            raise InputError(f"addition={addition!r}: {quoted(branches)} reach {len(meetings)} additions, from 0.")
        return meetings[addition]
    inside = tuple(f"{name}." for name in branches)
    unnamed = [sum(not p.startswith(inside) for p in graph.parameters(meeting.inside)) for meeting in meetings]
    nearest = [meeting for meeting, count in zip(meetings, unnamed, strict=True) if count == min(unnamed)]
    if len(nearest) > 1:
        listed = "".join(f"\n  addition={meetings.index(m)}: in {_where(graph, m.sum)}" for m in nearest)
        raise InputError(f"{quoted(branches)} reach {len(nearest)} additions. Say which one is meant:{listed}")
    return nearest[0]


def _term(graph: Graph, meeting: Meeting) -> Term:
    values = [other.value for other in meeting.others]
    if parting := [value for value in values if graph.descends(meeting.operand.value, value)]:
        return term_of(graph, meeting.sum, meeting.operand, "identity", parting)
    sides = [graph.exclusive(other.value, [other.addition]) for other in meeting.others]
    kind: Shortcut = "projection" if any(graph.parameters(side) for side in sides) else "reshape"
    return term_of(graph, meeting.sum, meeting.operand, kind, sorted(graph.forks(meeting.inside)))


def _reaches(graph: Graph, name: str, value: int) -> bool:
    """Whether what a module returned went into a value, or is it."""
    calls = [call for call in graph.trace.calls if call.name == name]
    return any(leaf == value or graph.descends(value, leaf) for call in calls for leaf in call.outputs)


def _lies_in(graph: Graph, name: str, inside: frozenset[int]) -> bool:
    """Whether a call of the module runs in a branch."""
    return any(bool(own := graph.within(call)) and own <= inside for call in graph.trace.calls if call.name == name)


def _where(graph: Graph, node: int) -> str:
    return repr(graph.place(node)) if graph.place(node) else "the model's own code"
