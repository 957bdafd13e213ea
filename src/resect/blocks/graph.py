"""The operations of one run as a graph: who serves whom."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from torch import nn

from resect.blocks.inflight import SUMS
from resect.blocks.trace import Call, Trace

VIEWS = frozenset(
    "aten::" + op
    for op in ("view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand",
               "clone", "contiguous", "alias", "detach", "flatten", "select", "slice")
)  # fmt: skip
"""Operations that give the same numbers in another form."""


class Graph:
    """A trace with what the search needs: liveness, ancestors (as bit sets), dependence on the input."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.nodes = trace.nodes
        self.live = self._live()
        self.ancestors: list[int] = []
        self.dependent: list[bool] = []
        for node in self.nodes:
            bits = 0
            for source in node.inputs:
                bits |= self.ancestors[source] | (1 << source)
            self.ancestors.append(bits)
            self.dependent.append(node.is_input or any(self.dependent[source] for source in node.inputs))
        self._parameters: dict[str, list[int]] = {}
        for node in self.nodes:
            if node.parameter is not None:
                self._parameters.setdefault(node.parameter, []).append(node.index)
        self._calls: dict[int, list[Call]] = {}
        self._returned_by: dict[int, list[Call]] = {}
        self._within: list[frozenset[int]] = [frozenset()] * len(trace.calls)
        for call in reversed(trace.calls):  # what a call called comes after it
            own = frozenset(node for node in call.nodes if self.live[node])
            self._within[call.index] = own.union(*(self._within[child] for child in call.children))
        for call in trace.calls:
            self._calls.setdefault(id(call.module), []).append(call)
            for leaf in call.outputs:
                self._returned_by.setdefault(leaf, []).append(call)

    def _live(self) -> list[bool]:
        live = [False] * len(self.nodes)
        for node in reversed(self.nodes):
            live[node.index] = node.index in self.trace.outputs or any(live[user] for user in node.users)
        return live

    def users(self, node: int) -> list[int]:
        """Return the operations that use a value, and matter for the output."""
        return [user for user in self.nodes[node].users if self.live[user]]

    def descends(self, node: int, ancestor: int) -> bool:
        """Whether ``ancestor`` went into ``node``."""
        return bool(self.ancestors[node] >> ancestor & 1)

    def place(self, node: int) -> str:
        """Return the name of the module that ran an operation itself."""
        call = self.nodes[node].call
        return self.trace.calls[call].name if call >= 0 else ""

    def root(self, node: int) -> int:
        """Follow views and writes of a value back to where its memory was made."""
        while True:
            found = self.nodes[node]
            if found.target >= 0:
                node = found.target
            elif found.op in VIEWS:
                node = found.inputs[0]
            else:
                return node

    def exclusive(self, term: int, exits: Iterable[int]) -> frozenset[int]:
        """Return the operations that serve only this value's way into ``exits``; empty if it is used elsewhere."""
        inside: set[int] = set()
        seen = {term}
        waiting = [-term]
        exits = set(exits)
        while waiting:
            # Later nodes first: all users of a node have been decided when its turn comes.
            node = -heapq.heappop(waiting)
            if node in self.trace.outputs or not self.nodes[node].op:
                continue
            if all(user in inside or (node == term and user in exits) for user in self.users(node)):
                inside.add(node)
                for source in set(self.nodes[node].inputs) - seen:
                    seen.add(source)
                    heapq.heappush(waiting, -source)
        return frozenset(inside)

    def additions_to(self, inside: frozenset[int], exits: Iterable[int]) -> dict[int, int]:
        """Return per node of a branch the largest number of sums, as Python sees them, on a way out of it.

        A node's own sum is not counted, those after it are, the block's own is not.
        """
        exits = set(exits)
        ahead: dict[int, int] = {}
        for node in sorted(inside, reverse=True):
            after = [self._is_seen_sum(user) + ahead[user] for user in self.users(node) if user in inside]
            ahead[node] = max(after, default=0)
        return ahead

    def sums_after(self, source: int, users: frozenset[int], ahead: dict[int, int]) -> int:
        """Return the largest number of sums on a way out of the branch from a value, if only ``users`` read it."""
        return max((self._is_seen_sum(user) + ahead[user] for user in self.users(source) if user in users), default=0)

    def _is_seen_sum(self, node: int) -> bool:
        """Whether an operation is a sum of two tensors that a value which was not computed would meet."""
        found = self.nodes[node]
        return found.operands is not None and (not found.function or found.function in SUMS)

    def fork(self, left: int, right: int) -> int:
        """Return the last input-dependent value that went into both; -1 where there is none."""
        common = self.ancestors[left] & self.ancestors[right]
        return next(
            (node for node in range(min(left, right) - 1, -1, -1) if common >> node & 1 and self.dependent[node]), -1
        )

    def way(self, start: int, end: int) -> frozenset[int]:
        """Return the operations through which one value goes into another, the other's own included."""
        if start < 0 or not self.descends(end, start):
            return frozenset()
        among = [node for node in range(start + 1, end + 1) if node == end or self.descends(end, node)]
        return frozenset(node for node in among if self.descends(node, start))

    def forks(self, inside: frozenset[int]) -> set[int]:
        """Return the input-dependent values that enter a set of operations from outside."""
        sources = {source for node in inside for source in self.nodes[node].inputs}
        return {source for source in sources - inside if self.dependent[source]}

    def count(self, inside: Iterable[int], ops: tuple[str, ...]) -> int:
        """Return how many of these operations are among ``ops``."""
        return sum(self.nodes[node].op.removeprefix("aten::") in ops for node in inside)

    def parameters(self, inside: Iterable[int]) -> set[str]:
        """Return the names of the parameters that these operations use."""
        names = {self.nodes[source].parameter for node in inside for source in self.nodes[node].inputs}
        return {name for name in names if name is not None}

    def parameters_users(self, name: str) -> set[int]:
        """Return the operations that use a parameter."""
        return {user for node in self._parameters.get(name, ()) for user in self.users(node)}

    def parameter_nodes(self, name: str) -> list[int]:
        """Return the nodes that a parameter is."""
        return self._parameters.get(name, [])

    def within(self, call: Call) -> frozenset[int]:
        """Return the operations that a call ran, inside its children too, and that matter for the output."""
        return self._within[call.index]

    def calls_of(self, module: nn.Module) -> list[Call]:
        """Return every call of a module, in order."""
        return self._calls[id(module)]

    def calls_at(self, inside: Iterable[int]) -> list[Call]:
        """Return, in order, the calls that ran one of these operations or return its value."""
        found: set[int] = set()
        for node in inside:
            found.update(call.index for call in self._returned_by.get(node, ()))
            call = self.nodes[node].call
            while call >= 0 and call not in found:
                found.add(call)
                call = self.trace.calls[call].parent
        return [self.trace.calls[index] for index in sorted(found)]
