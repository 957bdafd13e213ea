"""Find the residual sums of a trace.

A sum one of whose terms is an ancestor of another term is a residual addition (identity shortcut). Where
both terms grow out of one fork, the lighter side is the shortcut if it holds at most one convolution and
no nonlinearity (projection, or reshape when it has no weights).
"""

from __future__ import annotations

from dataclasses import dataclass

from resect.blocks.block import Shortcut
from resect.blocks.graph import Graph
from resect.blocks.trace import Node

_HEAVY = ("convolution", "addmm", "bmm", "mm", "baddbmm", "linear", "einsum")
_NONLINEAR = (
    "relu", "relu_", "gelu", "silu", "silu_", "sigmoid", "sigmoid_", "tanh", "hardtanh", "hardtanh_", "hardswish",
    "hardswish_", "leaky_relu", "leaky_relu_", "elu", "elu_", "mish", "softplus", "_softmax", "clamp_min",
    "clamp_min_", "hardsigmoid", "native_layer_norm", "max_pool2d_with_indices",
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_attention_math",
)  # fmt: skip


@dataclass(frozen=True)
class Term:
    """One branch of one sum, as nodes of the trace."""

    sum: int
    """The node of the (outermost) addition."""
    term: int
    addition: int
    """The node of the addition that this term enters."""
    operand: int
    """Which operand of that addition it is: 0 or 1."""
    shortcut: Shortcut
    nodes: frozenset[int]


def find_terms(graph: Graph) -> list[Term]:
    """Return every branch of every residual sum, nested ones included, in order of execution."""
    found: list[Term] = []
    joined: set[int] = set()
    sums = [node for node in graph.nodes if node.operands and graph.live[node.index]]
    for outer in reversed(sums):
        if outer.index not in joined and graph.dependent[outer.index]:
            terms = _terms_of(graph, outer, joined)
            found += _identity(graph, outer, terms) or _forked(graph, outer, terms)
    return sorted(found, key=lambda term: (term.sum, term.term))


def _terms_of(graph: Graph, outer: Node, joined: set[int]) -> list[tuple[int, int, int]]:
    """Flatten ``(a + b) + c`` into terms (term, addition it enters, which operand)."""
    terms: list[tuple[int, int, int]] = []
    for operand, index in enumerate(outer.operands or ()):
        inner = graph.nodes[index]
        # The same call, and nobody else looks at the partial sum: one n-ary sum.
        if inner.operands and inner.call == outer.call and graph.users(index) == [outer.index]:
            joined.add(index)
            terms += _terms_of(graph, inner, joined)
        else:
            terms.append((index, outer.index, operand))
    return terms


def _identity(graph: Graph, outer: Node, terms: list[tuple[int, int, int]]) -> list[Term]:
    """Find the terms that descend from another term: branches over an identity shortcut."""
    shortcuts = [a for a, *_ in terms if any(graph.descends(b, a) for b, *_ in terms)]
    if not shortcuts:
        return []
    return [
        Term(outer.index, term, addition, operand, "identity", graph.exclusive(term, addition))
        for term, addition, operand in terms
        if term not in shortcuts and any(graph.descends(term, shortcut) for shortcut in shortcuts)
    ]


def _forked(graph: Graph, outer: Node, terms: list[tuple[int, int, int]]) -> list[Term]:
    """Of two terms that grow out of one fork, find the branch; the shortcut is the light one."""
    if len(terms) != 2:
        return []
    sides = [(graph.exclusive(term, addition), term, addition, operand) for term, addition, operand in terms]
    forks = [graph.forks(side[0]) for side in sides]
    if not all(side[0] for side in sides) or forks[0] != forks[1] or len(forks[0]) != 1:
        return []
    weights = [(graph.count(side[0], _HEAVY), len(graph.parameters(side[0]))) for side in sides]
    if weights[0] == weights[1]:
        return []
    light, heavy = (0, 1) if weights[0] < weights[1] else (1, 0)
    if weights[light][0] > 1 or graph.count(sides[light][0], _NONLINEAR):
        return []
    if not graph.count(sides[heavy][0], _NONLINEAR):
        return []  # a re-parametrised convolution, not a residual block
    kind: Shortcut = "projection" if weights[light][1] else "reshape"
    inside, term, addition, operand = sides[heavy]
    return [Term(outer.index, term, addition, operand, kind, inside)]


def drop_nested(graph: Graph, terms: list[Term], parameters: dict[str, int]) -> list[Term]:
    """Of branches inside branches keep the outermost, unless it spans most of the model (a long skip)."""
    total = max(1, sum(parameters.values()))

    def share(term: Term) -> float:
        return sum(parameters[name] for name in graph.parameters(term.nodes)) / total

    kept: list[Term] = []
    for term in sorted(terms, key=lambda term: -len(term.nodes)):
        inside = [other for other in terms if other is not term and other.sum in term.nodes]
        is_long = bool(inside) and share(term) > 0.5 and any(graph.parameters(other.nodes) for other in inside)
        if not is_long and not any(term.sum in outer.nodes for outer in kept):
            kept.append(term)
    return sorted(kept, key=lambda term: (term.sum, term.term))
