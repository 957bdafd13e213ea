"""The modules that make up a branch: what is intercepted when a block is closed, and where gates act."""

from __future__ import annotations

from typing import Any

from torch import nn

from resect.blocks.block import Refusal, ResidualBlock
from resect.blocks.graph import Graph
from resect.blocks.naming import innermost, part_of, unique
from resect.blocks.sums import HEAVY, Term, drop_nested, views_back
from resect.blocks.trace import Call
from resect.blocks.weights import has_weights


def describe(graph: Graph, terms: list[Term], model: nn.Module) -> tuple[list[ResidualBlock], list[Refusal]]:
    """Turn branches into blocks; what cannot be controlled is refused with its reason."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: list[ResidualBlock] = []
    refused: list[Refusal] = []
    for term in drop_nested(graph, [term for term in terms if _matters(graph, term)], sizes):
        try:
            found.append(block_of(graph, term, sizes, names, len(found)))
        except Refused as refusal:
            refused.append(Refusal(graph.place(term.sum) or type(model).__name__, str(refusal)))
    return unique(found), refused


def _matters(graph: Graph, term: Term) -> bool:
    """Whether a sum is worth a block, or else a refusal: learned positions added to queries are neither."""
    if term.nodes:
        return _has_weights(graph, term)
    return term.weighty and any(graph.dependent[start] for start in term.starts)


def _has_weights(graph: Graph, term: Term) -> bool:
    """Whether a branch transforms: by modules with weights (quantised ones too), or by a fixed mixing.

    Parameters alone are not enough: ``x + sin(a·x)²/a`` is an activation.
    """
    return graph.count(term.nodes, HEAVY) > 0 or any(
        has_weights(call.module) and own <= term.nodes
        for call in graph.calls_at(term.nodes)
        if (own := graph.within(call))
    )


class Refused(Exception):
    """Why a residual addition is not offered as a block."""


def block_of(graph: Graph, term: Term, sizes: dict[str, int], names: dict[int, str], index: int) -> ResidualBlock:
    """Describe one branch; raises ``Refused`` with the reason why it cannot be controlled."""
    if not term.nodes:
        raise Refused("the branch's value is also used outside the addition")
    calls = _branch_calls(graph, term.nodes)
    for call in calls:
        if isinstance(call.output, TypeError):
            raise Refused(f"{call.output}, from {call.name!r}")
    # By identity, not by name: a module that several hold is named after the first of them.
    inside = {names[id(p)] for call in calls for p in call.module.parameters() if id(p) in names}
    raw = tuple(sorted(graph.parameters(term.nodes) - inside))
    entries = _entries(graph, term, calls, raw)
    shared = [name for name in raw if graph.parameters_users(name) - term.nodes]
    raw = tuple(name for name in raw if name in entries or name not in shared)
    if not calls and not entries:
        raise Refused("the branch has neither modules nor parameters of its own: what it computes serves others too")
    weights = [call for call in calls if has_weights(call.module)]
    # A model's rotary embedding that serves one attention alone is of its branch, but does not make it the model's.
    owner = innermost(graph, [graph.nodes[term.sum].call, *(call.parent for call in weights or calls)])
    name_of_owner = owner.name if owner else ""
    _check_entries(graph, term, entries, owner)
    numbers, scope, owner_call = _numbers(graph, term, calls, owner if entries else None)
    if scope is None and not set(entries).isdisjoint(shared):
        scope = name_of_owner
    ahead = graph.additions_to(term.nodes, [node for node, _ in term.exits])
    pending = (
        *(_pending_after(graph, term, ahead, call) for call in calls),
        *(_pending_of(graph, term, ahead, name) for name in raw),
    )
    own = [name for name in {*raw, *inside} if not graph.parameters_users(name) - term.nodes]
    end, leaf, exact, reason = _end(graph, term, calls, raw, entries)
    block = ResidualBlock(
        name=_name(name_of_owner, weights or calls),
        owner=name_of_owner,
        index=index,
        stage=1,
        shortcut=term.shortcut,
        part=part_of([call.module for call in weights], [call.name for call in weights], name_of_owner),
        modules=tuple(call.name for call in calls),
        calls=numbers,
        templates=tuple(call.output for call in calls),
        raw_parameters=raw,
        entries=entries,
        pending=pending,
        end=end,
        end_leaf=leaf,
        exact=exact,
        owner_call=owner_call,
        counted_in=scope,
        sum=term.sum,
        places=tuple((graph.nodes[node].op, graph.nodes[node].number, operand) for node, operand in term.exits),
        clone=graph.nodes[term.sum].written_later,
        unwrap=_is_written_into(graph, term),
        zeros=term.zeros,
        spreads=_spreads(graph, term, calls),
        shape=graph.nodes[term.sum].shape,
        parameters=sum(sizes[name] for name in own),
        flops=sum(graph.nodes[node].flops for node in term.nodes),
        reason=reason,
    )
    return block


def _name(owner: str, calls: list[Call]) -> str:
    if not calls:
        return f"{owner}/+"
    heaviest = max(calls, key=lambda call: sum(p.numel() for p in call.module.parameters()))
    return f"{owner}/{heaviest.name.removeprefix(owner + '.')}" if owner else heaviest.name


def _branch_calls(graph: Graph, inside: frozenset[int]) -> list[Call]:
    """Return the largest module calls that lie wholly inside a branch, in order, each module's once where possible."""

    def lies_inside(call: Call) -> bool:
        if call.name == "?":  # made inside forward: nothing to intercept; it passes an Absent on
            return False
        if nodes := graph.within(call):
            return nodes <= inside
        # A module that ran nothing (Identity, Dropout in eval mode) belongs where its value does.
        return bool(call.outputs) and all(node in inside for node in (*call.inputs, *call.outputs))

    found = {call.index: call for call in graph.calls_at(inside) if lies_inside(call)}
    largest = [call for call in found.values() if call.parent not in found]
    kept: list[Call] = []
    for call in largest:
        others = [other for other in graph.calls_of(call.module) if other.index not in found]
        again = sum(other.module is call.module for other in largest) > 1
        # Without weights it passes an Absent on; a module of this branch alone is intercepted at every call.
        if (others or again) and not has_weights(call.module):
            continue
        if others or all(earlier.module is not call.module for earlier in kept):
            kept.append(call)
    return kept


def _numbers(
    graph: Graph, term: Term, calls: list[Call], owner: Call | None
) -> tuple[tuple[int | None, ...], str | None, int | None]:
    """Number the calls of modules that also run outside the branch: (per module, counted in, the owner's)."""
    inside = {id(call.module) for call in calls}
    shared = [
        call for call in calls
        if any(_runs_outside(graph, term, other) for other in graph.calls_of(call.module))
    ]  # fmt: skip
    if owner is not None and len(graph.calls_of(owner.module)) > 1 and id(owner.module) not in inside:
        shared.append(owner)
    if not shared:
        return (None,) * len(calls), None, None
    around = innermost(graph, [other.parent for call in shared for other in graph.calls_of(call.module)])
    places = {call.index: graph.calls_of(call.module).index(call) for call in shared}
    owner_call = places.get(owner.index) if owner is not None else None
    return tuple(places.get(call.index) for call in calls), around.name if around else "", owner_call


def _runs_outside(graph: Graph, term: Term, call: Call) -> bool:
    """Whether a call does anything for others than the branch, be it in vain."""
    live = graph.within(call)
    return not live <= term.nodes if live else _ran(graph, call)


def _ran(graph: Graph, call: Call) -> bool:
    return bool(call.nodes) or any(_ran(graph, graph.trace.calls[child]) for child in call.children)


def _entries(graph: Graph, term: Term, calls: list[Call], raw: tuple[str, ...]) -> tuple[str, ...]:
    """Return the raw parameters that no value from a branch module ever meets: the branch begins there too."""
    made = {node for call in calls for node in (*call.outputs, *graph.within(call))} & term.nodes

    def meets(node: int) -> bool:
        return node in made or any(graph.descends(node, other) for other in made)

    return tuple(
        name for name in raw if any(not meets(user) for user in graph.parameters_users(name) if user in term.nodes)
    )


def _spreads(graph: Graph, term: Term, calls: list[Call]) -> bool:
    """Whether values of the branch's modules are written into tensors that it makes itself, outside them."""
    made = {node for call in calls for node in (*call.outputs, *graph.within(call))} & term.nodes
    targets = {graph.root(graph.nodes[node].target) for node in term.nodes if graph.nodes[node].target >= 0}
    return any(
        root in term.nodes and root not in made and not any(graph.descends(root, other) for other in made)
        for root in targets
    )


def _check_entries(graph: Graph, term: Term, entries: tuple[str, ...], owner: Call | None) -> None:
    """Raise if the owner uses a parameter that has to be absent for something else too."""
    within = graph.within(owner) if owner is not None else {node.index for node in graph.nodes}
    for name in entries:
        if (graph.parameters_users(name) & within) - term.nodes:
            raise Refused(f"parameter {name!r} is also used outside the branch, in the same call")


def _pending_after(graph: Graph, term: Term, ahead: dict[int, int], call: Call) -> int:
    # What the call itself made of its outputs is of no concern: it returns, and others go on.
    users = term.nodes - graph.within(call)
    return max((graph.sums_after(leaf, users, ahead) for _, leaf in call.leaves), default=0)


def _pending_of(graph: Graph, term: Term, ahead: dict[int, int], name: str) -> int:
    return max((graph.sums_after(node, term.nodes, ahead) for node in graph.parameter_nodes(name)), default=0)


def _end(
    graph: Graph, term: Term, calls: list[Call], raw: tuple[str, ...], entries: tuple[str, ...]
) -> tuple[int | None, tuple[Any, ...] | None, bool, str]:
    """Find what gates act on: (place, place in its output, whether it is the branch end, why there is none)."""
    outputs = {leaf for call in calls for leaf in call.outputs}
    last = views_back(graph, term.term, outputs)
    ending = [call for call in calls if last in call.outputs]
    exact = bool(ending)
    if not exact:  # functions follow: take what was made last, and let it travel to the addition
        ending = [call for call in calls if any(leaf in term.nodes for leaf in call.outputs)]
    if not ending:
        if entries:
            return len(calls) + raw.index(entries[-1]), None, False, ""
        return None, None, False, "no value of its modules reaches the addition"
    call = max(ending, key=lambda call: call.finished)
    if len(graph.calls_of(call.module)) > 1 and not _is_numbered(graph, term, call):
        return None, None, False, f"the branch ends in {call.name!r}, which runs more than once in it"
    place = calls.index(call)
    if call.output == "absent":
        return place, None, exact, ""
    if not exact:
        inside = [leaf for leaf in call.outputs if leaf in term.nodes]
        last = inside[0]
    found = _leaf(call, last)
    if found is None:
        return None, None, False, f"the output of {call.name!r} holds the same value twice"
    return place, found, exact, ""


def _is_numbered(graph: Graph, term: Term, call: Call) -> bool:
    return sum(graph.within(other) <= term.nodes for other in graph.calls_of(call.module)) == 1


def _leaf(call: Call, node: int) -> tuple[Any, ...] | None:
    """Return the path of the branch end in a module's output, when that is beyond doubt."""
    found = [path for path, leaf in call.leaves if leaf == node]
    return found[0] if len(found) == 1 else None


def _is_written_into(graph: Graph, term: Term) -> bool:
    """Whether the sum is written into the branch's value by ``f.add_(x)``, whose result the model may drop."""
    node, operand = term.exits[0]
    found = graph.nodes[node]
    return operand == 0 and found.op in ("aten::add_", "aten::sub_") and not found.function.startswith("__")
