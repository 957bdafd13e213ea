"""Run a model once and record its operations and module calls.

Operations are seen below autograd, as they are executed, so any Python control flow is fine. A value is
known by the node that last wrote it: in-place operations and views are followed through their storage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from resect.blocks.example import Example, device_of
from resect.blocks.modes import kept_buffers, kept_modes
from resect.blocks.template import paths_of, pick, template_of, tensors_in

SUMS = frozenset({"aten::add", "aten::add_", "aten::sub", "aten::sub_"})
"""The operations that join a branch to its shortcut: ``x + f`` and ``x - f``."""


@dataclass
class Node:
    """One executed operation, or (``op == ""``) a tensor that was there before: input, parameter, buffer."""

    index: int
    op: str
    inputs: tuple[int, ...]
    call: int
    number: int = -1
    """How many operations of its name ran before it."""
    users: list[int] = field(default_factory=list)
    parameter: str | None = None
    is_input: bool = False
    flops: int = 0
    function: str = ""
    """The outermost torch function under which it ran, as Python sees it: ``add``, ``linear``, …"""
    arguments: tuple[int, ...] = ()
    """Per positional argument, the node of the tensor it is, else -1."""
    shape: tuple[int, ...] = ()
    """Of its first result."""
    stays: bool = False
    """A pooling over several values that goes on by one: nothing gets smaller."""
    target: int = -1
    """The value that it wrote over, if it is in place."""
    # For a sum or difference of two tensors only:
    operands: tuple[int, int] | None = None
    weighted: bool = False
    """Its second operand is multiplied (``alpha``)."""
    written_later: bool = False
    """Its result is later changed in place."""


@dataclass
class Call:
    """One call of one module; ``nodes`` are the operations it ran itself, outside its children."""

    index: int
    name: str
    module: nn.Module
    parent: int
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    output: Any = None
    """A template of the output (see ``absent_like``), or the ``TypeError`` that says why there is none."""
    leaves: tuple[tuple[tuple[Any, ...], int], ...] = ()
    """Per tensor of the output, its path in the template and its node."""
    finished: int = -1
    """How many calls had returned before it."""
    nodes: list[int] = field(default_factory=list)
    children: list[int] = field(default_factory=list)


@dataclass
class Trace:
    """Everything one run did; node numbers are in the order of execution."""

    nodes: list[Node]
    calls: list[Call]
    outputs: frozenset[int]
    """Nodes of the model's outputs."""


def is_sum(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation adds or subtracts two tensors."""
    return func._schema.name in SUMS and len(args) == 2 and all(isinstance(arg, Tensor) for arg in args)


class _Recorder(TorchDispatchMode):
    """Record each operation, and keep every tensor alive so that no id is used twice."""

    def __init__(self, model: nn.Module, example: Example) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.calls: list[Call] = []
        self.function = ""
        self._stack: list[int] = []
        self._names = {id(module): name for name, module in model.named_modules()}
        self._returned = 0
        self._numbers: Counter[str] = Counter()
        self._alive: list[Tensor] = []
        self._of_tensor: dict[int, int] = {}
        self._last_write: dict[int, int] = {}
        self._sums_in: dict[int, list[int]] = {}
        for name, parameter in model.named_parameters():
            self.nodes[self._node_of(parameter)].parameter = name
        for tensor in example.tensors():
            self.nodes[self._node_of(tensor)].is_input = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = self.nodes_in((args, kwargs))
        arguments = tuple(self._node_of(arg) if isinstance(arg, Tensor) else -1 for arg in args)
        output = func(*args, **kwargs)

        node = self._add(func._schema.name, inputs)
        node.arguments, node.function = arguments, self.function
        if func._overloadpacket in flop_registry:
            node.flops = int(flop_registry[func._overloadpacket](*args, **kwargs, out_val=output))
        if "pool" in node.op and len(args) > 1 and isinstance(args[1], list):
            strides = args[2] if len(args) > 2 and args[2] else args[1]
            node.stays = max(args[1]) > 1 and max(strides) == 1
        named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
        for argument in func._schema.arguments:
            if argument.is_write and isinstance(named.get(argument.name), Tensor):
                node.target = self._node_of(named[argument.name])
                self._write(named[argument.name], node)
        for tensor in reversed(tensors_in(output)):
            self._remember(tensor, node.index)
            node.shape = tuple(tensor.shape)
        if is_sum(func, args):
            node.operands, node.weighted = (arguments[0], arguments[1]), kwargs.get("alpha", 1) != 1
            self._sums_in.setdefault(_storage(output), []).append(node.index)
        return output

    def _add(self, op: str, inputs: tuple[int, ...]) -> Node:
        node = Node(len(self.nodes), op, inputs, self._stack[-1] if self._stack else -1, self._numbers[op])
        self._numbers[op] += 1
        self.nodes.append(node)
        for source in inputs:
            self.nodes[source].users.append(node.index)
        if self._stack and op:
            self.calls[self._stack[-1]].nodes.append(node.index)
        return node

    def _write(self, tensor: Tensor, node: Node) -> None:
        storage = _storage(tensor)
        self._last_write[storage] = node.index
        for earlier in self._sums_in.get(storage, ()):
            self.nodes[earlier].written_later = True

    def _remember(self, tensor: Tensor, node: int) -> None:
        self._of_tensor[id(tensor)] = node
        self._alive.append(tensor)

    def _node_of(self, tensor: Tensor) -> int:
        known = self._of_tensor.get(id(tensor))
        if known is None:
            known = self._add("", ()).index
            self.nodes[known].shape = tuple(tensor.shape)
            self._remember(tensor, known)
        return max(known, self._last_write.get(_storage(tensor), -1))

    def nodes_in(self, value: Any) -> tuple[int, ...]:
        """Return the nodes of every tensor inside a value, each once."""
        return tuple(dict.fromkeys(self._node_of(tensor) for tensor in tensors_in(value)))

    def run_module(self, run: Any, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Stand in for ``nn.Module.__call__``: record the call around ``run``, the original one."""
        parent = self._stack[-1] if self._stack else -1
        call = Call(len(self.calls), self._names.get(id(module), "?"), module, parent)
        self.calls.append(call)
        if parent >= 0:
            self.calls[parent].children.append(call.index)
        call.inputs = self.nodes_in((args, kwargs))
        given = {("args", place): value for place, value in enumerate(args)}
        given |= {("kwargs", key): value for key, value in kwargs.items()}
        before = {path: self.nodes_in(value) for path, value in given.items()}
        self._stack.append(call.index)
        try:
            output = run(module, *args, **kwargs)
        finally:
            self._stack.pop()
        call.outputs = self.nodes_in(output)
        call.finished, self._returned = self._returned, self._returned + 1
        try:
            untouched = {id(v): path for path, v in given.items() if self.nodes_in(v) == before[path]}
            call.output = template_of(output, untouched)
            call.leaves = tuple((path, self._node_of(pick(output, path))) for path in paths_of(call.output))
        except TypeError as error:
            call.output = error
        return output


class _Functions(TorchFunctionMode):
    """Tell the recorder which torch function the model called: inside one, this mode is off."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._recorder.function = getattr(func, "__name__", str(func))
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._recorder.function = ""


def trace(model: nn.Module, example: Example) -> Trace:
    """Run ``model`` on ``example`` and record every operation and module call; call it inside ``quiet``."""
    example = example.to(device_of(model))
    recorder = _Recorder(model, example)
    original = nn.Module.__call__

    def recorded(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return recorder.run_module(original, module, args, kwargs)

    nn.Module.__call__ = recorded  # type: ignore[method-assign]
    try:
        with _Functions(recorder), recorder:
            output = model(*example.args, **example.kwargs)
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
    return Trace(recorder.nodes, recorder.calls, frozenset(recorder.nodes_in(output)))


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, a fixed seed, the attention fast path off; all restored afterwards, buffers too."""
    fast = torch.backends.mha.get_fastpath_enabled()
    # The fast path computes a whole layer in one operation, in which no branch can be seen.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with kept_modes(model), kept_buffers(model), torch.no_grad(), torch.random.fork_rng():
            model.eval()
            torch.manual_seed(0)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse tensor has none
        return -id(tensor)
