"""An oracle that owes nothing to the library: a run is recorded, an addition found, and one operand of it replaced.

An operation is known by the module call it ran in and its place there, ``(module, which call, which operation)``,
so that it is found again where control flow elsewhere has changed.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Key = tuple[str, int, int]
Change = Callable[[Tensor], Tensor]

_SUMS = frozenset({"aten::add", "aten::add_", "aten::sub", "aten::sub_", "aten::rsub"})
_HEAVY = frozenset(str(packet).replace(".", "::") for packet in flop_registry) | frozenset(
    "aten::" + name
    for name in (
        "native_layer_norm", "native_batch_norm", "native_group_norm", "_native_batch_norm_legit_no_training",
        "_native_batch_norm_legit", "_scaled_dot_product_flash_attention_for_cpu", "mkldnn_rnn_layer", "linear",
        "_fused_rms_norm", "cudnn_batch_norm", "_batch_norm_no_update",
    )
)  # fmt: skip


@dataclass
class Op:
    """One operation of a run."""

    key: Key
    name: str
    inputs: tuple[int, ...]
    operands: tuple[int, int] | None
    calls: tuple[int, ...]
    """The module calls it ran in, outermost first."""
    heavy: bool


@dataclass
class Call:
    """One call of one module."""

    module: str
    count: int
    """How many calls of this module came before."""
    frame: int = 0
    """How many operations it has run itself."""
    ops: list[int] = field(default_factory=list)
    outputs: tuple[int, ...] = ()


class Frames(TorchDispatchMode):
    """Knows, at every operation, which module call it runs in and its place there."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.calls: list[Call] = [Call("", -1)]
        self.stack = [0]
        self._names = {id(module): name for name, module in model.named_modules()}
        self._counts: Counter[str] = Counter()

    def enter(self, module: nn.Module, args: Any) -> None:
        """A module is called."""
        name = self._names.get(id(module), "?")
        self.calls.append(Call(name, self._counts[name]))
        self._counts[name] += 1
        self.stack.append(len(self.calls) - 1)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module returns."""
        self.stack.pop()

    def key(self, func: Any) -> Key:
        """Name the operation that runs now."""
        call = self.calls[self.stack[-1]]
        # PyTorch detaches a factory's new tensor only where somebody else holds it, as the recording does.
        call.frame += func._schema.name != "aten::detach"
        return call.module, call.count, call.frame - 1

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Follow every operation and module call of the runs inside."""
        before = nn.modules.module.register_module_forward_pre_hook(self.enter)
        after = nn.modules.module.register_module_forward_hook(self.leave)
        try:
            with self:
                yield
        finally:
            before.remove()
            after.remove()


class Recording(Frames):
    """All operations of one run, and who reads what."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.ops: list[Op] = []
        self.dependent: set[int] = set()
        self.outputs: set[int] = set()
        self.parameters = {id(parameter): name for name, parameter in model.named_parameters()}
        self.uses: dict[str, list[int]] = {}
        self._of: dict[int, int] = {}
        self._written: dict[int, int] = {}
        self._alive: list[Tensor] = []
        self._inputs: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        index, key = len(self.ops), self.key(func)
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = tuple(dict.fromkeys(node for tensor in tensors if (node := self.node(tensor)) >= 0))
        is_sum = func._schema.name in _SUMS and len(args) >= 2 and all(isinstance(arg, Tensor) for arg in args[:2])
        operands = (self.node(args[0]), self.node(args[1])) if is_sum else None
        output = func(*args, **kwargs)

        for tensor in tensors:
            if id(tensor) in self.parameters:
                self.uses.setdefault(self.parameters[id(tensor)], []).append(index)
        if self.dependent.intersection(inputs) or any(id(tensor) in self._inputs for tensor in tensors):
            self.dependent.add(index)
        self.ops.append(Op(key, func._schema.name, inputs, operands, tuple(self.stack), func._schema.name in _HEAVY))
        for call in self.stack:
            self.calls[call].ops.append(index)
        written = {argument.name for argument in func._schema.arguments if argument.is_write}
        named = [*zip((a.name for a in func._schema.arguments), args, strict=False), *kwargs.items()]
        for tensor in (value for name, value in named if name in written and isinstance(value, Tensor)):
            self._written[_storage(tensor)] = index
        for tensor in (leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)):
            self._of[id(tensor)] = index
            self._alive.append(tensor)
        return output

    def node(self, tensor: Tensor) -> int:
        """Return the operation that gave a tensor its value; negative for what was there before."""
        return max(self._of.get(id(tensor), -1), self._written.get(_storage(tensor), -1))

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        """A module returns: note what."""
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        self.calls[self.stack[-1]].outputs = tuple(node for leaf in leaves if (node := self.node(leaf)) >= 0)
        super().leave(module, args, output)

    def run(self, run: Callable[[], Any], inputs: list[Tensor]) -> Recording:
        """Record one run."""
        self._inputs = {id(tensor) for tensor in inputs}
        self._alive += inputs
        with self.watching():
            output = run()
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.outputs.add(self.node(leaf))
        self._alive.clear()
        return self

    def needed(self, cuts: set[tuple[int, int]], also: Iterable[int] = ()) -> set[int]:
        """Return the operations that the output, and others, still need when these (addition, operand) are cut off."""
        seen: set[int] = set()
        waiting = [node for node in (*self.outputs, *also) if node >= 0]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            op = self.ops[node]
            gone = [op.operands[k] for at, k in cuts if at == node and op.operands]
            keep = list(op.operands or ())
            for source in gone:
                keep.remove(source)
            waiting += [source for source in op.inputs if source not in gone or source in keep]
        return seen

    def descendants(self, sources: set[int]) -> set[int]:
        """Return every operation that read, directly or not, what these gave."""
        found = set(sources)
        for index in range(min(sources, default=0), len(self.ops)):
            if index not in found and not found.isdisjoint(self.ops[index].inputs):
                found.add(index)
        return found


class Replacing(Frames):
    """The oracle: while the model runs whole, operands of additions (or values) are replaced."""

    def __init__(self, model: nn.Module, changes: dict[tuple[Key, int], Change]) -> None:
        super().__init__(model)
        self.changes = changes
        self.applied: set[tuple[Key, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key = self.key(func)
        for operand in (0, 1):
            change = self.changes.get((key, operand))
            if change is None:
                continue
            self.applied.add((key, operand))
            if operand == 0 and func._schema.name.endswith("_"):
                args[0].copy_(change(args[0]))  # the sum is written where the model expects it
            else:
                args = (*args[:operand], change(args[operand]), *args[operand + 1 :])
        output = func(*args, **(kwargs or {}))
        change = self.changes.get((key, -1))  # the value itself, wherever it goes
        if change is not None:
            self.applied.add((key, -1))
            value = next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))  # a norm gives several
            value.copy_(change(value))
        return output


class Counting(Frames):
    """Count the heavy operations really run, and the calls of each module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.heavy: Counter[str] = Counter()
        self.called: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if func._schema.name in _HEAVY and not any(leaf.is_meta for leaf in leaves):
            self.heavy[func._schema.name] += 1
        return output

    def enter(self, module: nn.Module, args: Any) -> None:
        """A module is called."""
        super().enter(module, args)
        self.called[self.calls[-1].module] += 1


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse tensor has none
        return -id(tensor)
