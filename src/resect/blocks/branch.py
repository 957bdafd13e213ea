"""The modules that make up a branch: what is intercepted when a block is closed, and where gates act."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from resect.blocks.block import Refusal, ResidualBlock
from resect.blocks.graph import Graph
from resect.blocks.sums import Term, drop_nested
from resect.blocks.trace import Call

_VIEWS = frozenset(
    "aten::" + op
    for op in ("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand",
               "clone", "contiguous", "alias", "detach", "flatten",  "select")
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A block together with where the oracle finds it: addition number and operand."""

    block: ResidualBlock
    addition: int
    operand: int


def describe(graph: Graph, terms: list[Term], model: nn.Module) -> tuple[list[Candidate], list[Refusal]]:
    """Turn branches into blocks; what cannot be controlled is refused with its reason."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    found: list[Candidate] = []
    refused: list[Refusal] = []
    for term in drop_nested(graph, [term for term in terms if graph.parameters(term.nodes) or not term.nodes], sizes):
        where = _call_of(graph, term)
        try:
            found.append(_candidate(graph, term, sizes, len(found)))
        except _Refused as refusal:
            refused.append(Refusal(where or type(model).__name__, str(refusal)))
    return _unique(found), refused


class _Refused(Exception):
    """Why a residual addition is not offered as a block."""


def _call_of(graph: Graph, term: Term) -> str:
    return graph.trace.calls[graph.nodes[term.addition].call].name if graph.nodes[term.addition].call >= 0 else ""


def _candidate(graph: Graph, term: Term, sizes: dict[str, int], index: int) -> Candidate:
    if not term.nodes:
        raise _Refused("the branch's value is also used outside the addition")
    calls = _branch_calls(graph, term.nodes)
    weights = [call for call in calls if any(True for _ in call.module.parameters())]
    if not weights:
        raise _Refused("the branch has no module of its own (only functions on raw parameters)")
    for call in calls:
        if isinstance(call.output, TypeError):
            raise _Refused(f"{call.output}, from {call.name!r}")
    used = graph.parameters(term.nodes)
    inside = tuple(f"{call.name}." for call in calls)
    raw = tuple(sorted(name for name in used if not name.startswith(inside)))
    own = (*raw, *(name for name in sizes if name.startswith(inside)))
    shared = [name for name in own if graph.parameters_users(name) - term.nodes]
    if shared:
        raise _Refused(f"parameter {shared[0]!r} is also used outside the branch")
    modules = list({call.name: call for call in calls}.values())
    owner = _owner(graph, term, calls)
    if isinstance(_module(graph, owner), nn.TransformerEncoderLayer):
        raise _Refused(
            "nn.TransformerEncoderLayer's inference fast path bypasses its children; "
            "write the layer out, or use a model whose layers call their parts"
        )
    end, leaf, reason = _end(graph, term, calls)
    heaviest = max(weights, key=lambda call: sum(p.numel() for p in call.module.parameters()))
    name = f"{owner}/{heaviest.name.removeprefix(owner + '.')}" if owner else heaviest.name
    addition = graph.nodes[term.addition]
    block = ResidualBlock(
        name=name,
        owner=owner,
        index=index,
        shortcut=term.shortcut,
        part=_part(weights),
        modules=tuple(call.name for call in modules),
        end=end,
        templates=tuple(call.output for call in modules),
        end_leaf=leaf,
        sum=term.sum,
        clone=graph.nodes[term.sum].written_later,
        inner_adds=_inner_adds(graph, term, calls),
        raw_parameters=raw,
        parameters=sum(sizes[name] for name in sizes if name in raw or name.startswith(inside)),
        reason=reason,
    )
    return Candidate(block, addition.number, term.operand)


def _branch_calls(graph: Graph, inside: frozenset[int]) -> list[Call]:
    """Return the largest module calls that lie wholly inside a branch, in order."""
    calls = graph.trace.calls
    own = {call.index: _all_nodes(graph, call) for call in calls}

    def lies_inside(call: Call) -> bool:
        if call.name == "?":  # made inside forward: nothing to intercept; it passes an Absent on
            return False
        nodes = own[call.index]
        if nodes:
            return all(node in inside for node in nodes)
        # A module that ran nothing (Identity, Dropout in eval mode) belongs where its value does.
        return bool(call.outputs) and all(node in inside for node in (*call.inputs, *call.outputs))

    within = {call.index for call in calls if lies_inside(call)}
    largest = [calls[index] for index in sorted(within) if calls[index].parent not in within]
    return [call for call in largest if not _serves_others_too(graph, call, within)]


def _serves_others_too(graph: Graph, call: Call, within: set[int]) -> bool:
    """Whether the module also runs outside the branch: fine without weights (it passes an Absent on)."""
    others = [other for other in graph.trace.calls if other.module is call.module and other.index not in within]
    if others and any(True for _ in call.module.parameters()):
        raise _Refused(f"module {call.name!r} with its weights is also called outside the branch (shared)")
    return bool(others)


def _all_nodes(graph: Graph, call: Call) -> list[int]:
    nodes = [node for node in call.nodes if graph.live[node]]
    for child in call.children:
        nodes += _all_nodes(graph, graph.trace.calls[child])
    return nodes


def _end(graph: Graph, term: Term, calls: list[Call]) -> tuple[str | None, int | None, str]:
    """Find the module whose output is the branch end: (name, place in its output, why there is none)."""
    last = term.term
    while graph.nodes[last].op in _VIEWS and not any(last in call.outputs for call in calls):
        last = graph.nodes[last].inputs[0]
    ending = [call for call in calls if last in call.outputs]
    if not ending:
        return (
            None,
            None,
            "operations outside any module lie between the branch's last module and the addition",
        )
    call = max(ending, key=lambda call: call.finished)
    if sum(other.module is call.module for other in graph.trace.calls) > 1:
        return None, None, f"the branch ends in {call.name!r}, which runs more than once"
    if call.output == "absent":
        return call.name, None, ""
    leaf = _leaf(call, last)
    if leaf is None:
        return None, None, f"the output of {call.name!r} is nested too deeply"
    return call.name, leaf, ""


def _leaf(call: Call, node: int) -> int | None:
    """Return the place of the branch end in a tuple, when that is beyond doubt."""
    absents = [place for place, item in enumerate(call.output[1:]) if item == "absent"]
    nested = any(isinstance(item, list) for item in call.output[1:])
    if nested or len(absents) != len(call.outputs):
        return None
    return absents[call.outputs.index(node)]


def _inner_adds(graph: Graph, term: Term, calls: list[Call]) -> int:
    """Count the additions between the branch's last module and the block's own addition."""
    inside = {node for call in calls for node in _all_nodes(graph, call)}
    last = max(inside)
    return sum(node > last and bool(graph.nodes[node].operands) for node in term.nodes - inside)


def _owner(graph: Graph, term: Term, calls: list[Call]) -> str:
    """Return the innermost module call that holds the addition and every module of the branch."""

    def chain(index: int) -> list[int]:
        above = []
        while index >= 0:
            above.append(index)
            index = graph.trace.calls[index].parent
        return above[::-1]

    chains = [chain(graph.nodes[term.sum].call), *(chain(call.parent) for call in calls)]
    common = [level[0] for level in zip(*chains, strict=False) if len(set(level)) == 1]
    return graph.trace.calls[common[-1]].name if common else ""


def _module(graph: Graph, name: str) -> nn.Module | None:
    return next((call.module for call in graph.trace.calls if call.name == name), None)


def _part(weights: list[Call]) -> str:
    """Return what a branch mostly is: attention, conv or mlp."""
    inside = [(name, module) for call in weights for name, module in call.module.named_modules(prefix=call.name)]
    words = [f"{name.rpartition('.')[2]} {type(module).__name__}".lower() for name, module in inside]
    if any("attn" in word or "attention" in word for word in words):
        return "attention"
    if any(isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) for _, module in inside):
        return "conv"
    return "mlp"


def _unique(found: list[Candidate]) -> list[Candidate]:
    """Number equal names apart (``…@1``, ``…@2``), so that each block has one of its own."""
    seen: dict[str, int] = {}
    out = []
    for candidate in found:
        name = candidate.block.name
        seen[name] = seen.get(name, -1) + 1
        block = candidate.block
        if seen[name]:
            block = replace(block, name=f"{name}@{seen[name]}")
        out.append(Candidate(block, candidate.addition, candidate.operand))
    return out
