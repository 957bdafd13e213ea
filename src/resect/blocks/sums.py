"""Find the residual sums of a trace.

A sum one of whose terms is an ancestor of another term is a residual addition (identity shortcut). Where
both terms grow out of one fork, the lighter side is the shortcut if it holds at most one convolution and
no nonlinearity (projection, or reshape when it has no weights).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from resect.blocks.block import Shortcut
from resect.blocks.choose import layer_of
from resect.blocks.graph import VIEWS, Graph
from resect.blocks.trace import Node

HEAVY = (
    "convolution", "addmm", "bmm", "mm", "baddbmm", "linear", "einsum", "_fft_c2c", "_fft_r2c", "_fft_c2r",
)  # fmt: skip
"""Operations that mix many values into one, by weights or by fixed factors."""
_NONLINEAR = ("relu", "elu", "silu", "sigmoid", "tanh", "swish", "mish", "softplus", "softmax", "attention", "clamp")
"""Parts of the names of operations that no projection contains; norms it may."""

_ELEMENTWISE = ("mul", "mul_", "rsub", "sub", "neg", "add", "add_")


@dataclass(frozen=True)
class Term:
    """One branch of one sum, as nodes of the trace."""

    sum: int
    """The node of the (outermost) addition."""
    term: int
    """The node of the branch's value."""
    exits: tuple[tuple[int, int], ...]
    """Where that value leaves the branch: (node, operand); the first is the addition, or a slice of it."""
    shortcut: Shortcut
    starts: tuple[int, ...]
    """The nodes at which shortcut and branch part."""
    nodes: frozenset[int]
    zeros: bool = False
    """Part of the value goes on beside the sum."""
    weighty: bool = True
    """Whether weights lie between the shortcut and the value, also where the value is used elsewhere."""


@dataclass(frozen=True)
class Operand:
    """One value of a sum, the addition it enters, at which place, and whether it is subtracted or weighted there."""

    value: int
    addition: int
    place: int
    plain: bool = True


def find_terms(graph: Graph) -> list[Term]:
    """Return every branch of every residual sum, nested ones included, in order of execution."""
    found: list[Term] = []
    joined: set[int] = set()
    sums = [node for node in graph.nodes if node.operands and graph.live[node.index]]
    for outer in reversed(sums):
        if outer.index not in joined:
            terms = operands_of(graph, outer, joined)
            identity = _identity(graph, outer, terms)
            # What begins with learned queries depends on no input at first, and is a residual stream nevertheless.
            if identity or not graph.dependent[outer.index]:
                found += identity
            else:
                found += _forked(graph, outer, terms) or _weighed(graph, outer, terms)
    return sorted(found, key=lambda term: (term.sum, term.term))


def operands_of(graph: Graph, outer: Node, joined: set[int]) -> list[Operand]:
    """Flatten ``(a + b) - c`` into its operands."""
    terms: list[Operand] = []
    difference = outer.op.startswith("aten::sub")
    for place, index in enumerate(outer.operands or ()):
        inner = graph.nodes[index]
        plain = place == 0 or not (difference or outer.weighted)
        # The same call, and nobody else looks at the partial sum: one n-ary sum.
        alone = inner.call == outer.call and graph.users(index) == [outer.index]
        if inner.operands and plain and alone and not _has_bias(graph, inner, outer, place):
            joined.add(index)
            terms += operands_of(graph, inner, joined)
        else:
            terms.append(Operand(index, outer.index, place, plain))
    return terms


def _has_bias(graph: Graph, inner: Node, outer: Node, place: int) -> bool:
    """Whether a partial sum is a branch and its bias: ``x + (x @ w + b)``."""
    other = (outer.operands or ())[1 - place]
    return graph.descends(inner.index, other) and not all(graph.dependent[node] for node in inner.operands or ())


def _identity(graph: Graph, outer: Node, terms: list[Operand]) -> list[Term]:
    """Find the terms that descend from another term: branches over an identity shortcut."""
    shortcuts = [a.value for a in terms if a.plain and any(graph.descends(b.value, a.value) for b in terms)]
    return [
        term_of(graph, outer.index, operand, "identity", shortcuts)
        for operand in terms
        if operand.value not in shortcuts and any(graph.descends(operand.value, shortcut) for shortcut in shortcuts)
    ]


def term_of(graph: Graph, sum_: int, operand: Operand, shortcut: Shortcut, shortcuts: list[int]) -> Term:
    """Return the branch that ends in one operand of a sum."""
    between = [
        node
        for node in range(min(shortcuts, default=operand.value), operand.value + 1)
        if (node == operand.value or graph.descends(operand.value, node))
        and any(graph.descends(node, start) for start in shortcuts)
    ]
    weighty = bool(graph.parameters(between))
    exits = ((operand.addition, operand.place),)
    inside = graph.exclusive(operand.value, [operand.addition])
    if not graph.parameters(inside):
        partial = _partial(graph, operand)
        if partial is not None:
            return Term(sum_, partial[0], partial[1], shortcut, tuple(shortcuts), partial[2], zeros=True)
    return Term(sum_, operand.value, exits, shortcut, tuple(shortcuts), inside, weighty=weighty)


def _partial(graph: Graph, operand: Operand) -> tuple[int, tuple[tuple[int, int], ...], frozenset[int]] | None:
    """Follow a slice back to the whole value, if every other slice of it is only put beside the sum (rexnet)."""
    value = operand.value
    if graph.nodes[value].op != "aten::slice":
        return None
    while graph.nodes[value].op == "aten::slice":
        value = graph.nodes[value].inputs[0]
    first: list[int] = [operand.addition]
    slices: list[int] = []
    waiting = [value]
    while waiting:
        for user in graph.users(waiting.pop()):
            if graph.nodes[user].op == "aten::slice":
                waiting.append(user)
                slices.append(user)
            elif user != operand.addition and not (
                graph.nodes[user].op == "aten::cat" and graph.descends(user, operand.addition)
            ):
                return None
            else:
                first.append(user)
    entering = [node for node in slices if value in graph.nodes[node].inputs]
    if len(slices) < 2 or value in graph.trace.outputs:
        return None
    inside = graph.exclusive(value, entering)
    return value, tuple((node, 0) for node in entering), inside


def _forked(graph: Graph, outer: Node, terms: list[Operand]) -> list[Term]:
    """Of two terms that grow out of one fork, find the branch; the shortcut is the light one.

    What the shortcut is made of may serve others too (one pooled input for two trees); the branch may not.
    """
    terms = [operand for operand in terms if graph.dependent[operand.value]]  # a bias is no term
    if len(terms) != 2:
        return []
    fork = graph.fork(*(operand.value for operand in terms))
    found = []
    for shortcut, branch in (terms, terms[::-1]):
        inside = graph.exclusive(branch.value, [branch.addition])
        light, heavy = (graph.way(fork, operand.value) for operand in (shortcut, branch))
        alone = graph.forks(light) == graph.forks(heavy) == {fork}
        if not (inside and alone and shortcut.plain and _is_projection(graph, light) and _nonlinear(graph, heavy)):
            continue  # no nonlinearity in the branch: a re-parametrised convolution, not a residual block
        weights = [(graph.count(side, HEAVY), len(graph.parameters(side))) for side in (light, heavy)]
        if weights[0] < weights[1]:
            kind: Shortcut = "projection" if weights[0][1] else "reshape"
            exits = ((branch.addition, branch.place),)
            found.append(Term(outer.index, branch.value, exits, kind, (fork,), inside))
    return found


def _is_projection(graph: Graph, light: frozenset[int]) -> bool:
    """Whether a way is linear, but for an activation first; it pools only to get smaller, and joins nothing else."""
    weights = [node for node in light if graph.count([node], HEAVY)]
    first = all(node < min(weights, default=-1) for node in _nonlinear(graph, light))
    return first and not any(graph.nodes[node].stays or _joins(graph, node) for node in light)


def _joins(graph: Graph, node: int) -> bool:
    """Whether an operation adds another way, or learned positions; a bias joins nothing."""
    operands = graph.nodes[node].operands or ()
    positions = any(
        graph.nodes[value].parameter is not None and sum(size > 1 for size in graph.nodes[value].shape) > 1
        for value in operands
    )
    return positions or (bool(operands) and all(graph.dependent[value] for value in operands))


def _nonlinear(graph: Graph, inside: frozenset[int]) -> list[int]:
    """Return the nonlinearities among some operations; a norm is none."""
    return [node for node in inside if any(word in graph.nodes[node].op for word in _NONLINEAR)]


def _weighed(graph: Graph, outer: Node, terms: list[Operand]) -> list[Term]:
    """Find the branch of ``t·f(x) + (1 - t)·x``: the shortcut is an ancestor, weighed by weightless operations."""
    if len(terms) != 2:
        return []
    for shortcut, branch in (terms, terms[::-1]):
        light = graph.exclusive(shortcut.value, [shortcut.addition])
        heavy = graph.exclusive(branch.value, [branch.addition])
        if not light or not graph.count(heavy, HEAVY) or graph.parameters(light) or not shortcut.plain:
            continue
        plain = all(graph.nodes[node].op.removeprefix("aten::") in _ELEMENTWISE for node in light)
        sources = {source for node in light for source in graph.nodes[node].inputs} - light
        gated = sum(graph.dependent[source] for source in sources) > 1  # by a value, not by a number
        if (
            plain
            and gated
            and any(graph.descends(branch.value, source) and _is_factor(graph, light, source) for source in sources)
        ):
            exits = ((branch.addition, branch.place),)
            return [Term(outer.index, branch.value, exits, "reshape", tuple(sources), heavy)]
    return []


def _is_factor(graph: Graph, light: frozenset[int], source: int) -> bool:
    """Whether a value enters the weighed shortcut by a multiplication."""
    return any(graph.nodes[user].op.startswith("aten::mul") for user in graph.users(source) if user in light)


def views_back(graph: Graph, node: int, stop: set[int]) -> int:
    """Follow views of a value back to where it was made, or to the first node of ``stop``."""
    while graph.nodes[node].op in VIEWS and node not in stop:
        node = graph.nodes[node].inputs[0]
    return node


def without_others(graph: Graph, term: Term, terms: list[Term]) -> Term:
    """Take out of a branch the residual streams that do not begin where it does, and only end in it.

    The queries of a last cross-attention are all that an encoder is for: its blocks are not part of that branch.
    """
    streams = {
        other.sum
        for other in terms
        if other.sum in term.nodes and not any(s == other.sum or graph.descends(other.sum, s) for s in term.starts)
    }
    if not streams:
        return term
    others = {
        node
        for node in term.nodes
        if node in streams
        or (
            any(graph.descends(stream, node) for stream in streams)
            and not any(graph.descends(node, start) for start in term.starts)
        )
    }
    return replace(term, nodes=term.nodes - others)


def drop_nested(graph: Graph, terms: list[Term], parameters: dict[str, int]) -> list[Term]:
    """Of branches inside branches keep the outermost, unless it is a long skip.

    That is one around most of the model, or around blocks of other layers than its own.
    """
    total = max(1, sum(parameters.values()))
    terms = [without_others(graph, term, terms) for term in terms]

    def share(term: Term) -> float:
        return sum(parameters[name] for name in graph.parameters(term.nodes)) / total

    def is_long(term: Term) -> bool:
        inside = [other for other in terms if other is not term and other.sum in term.nodes]
        inside = [other for other in inside if graph.parameters(other.nodes)]
        layer = layer_of(graph.place(term.sum))
        elsewhere = any(layer and not f"{graph.place(other.sum)}.".startswith(f"{layer}.") for other in inside)
        return bool(inside) and (elsewhere or share(term) > 0.5)

    kept: list[Term] = []
    for term in sorted(terms, key=lambda term: -len(term.nodes)):
        if not is_long(term) and not any(term.sum in outer.nodes for outer in kept):
            kept.append(term)
    return sorted(kept, key=lambda term: (term.sum, term.term))
