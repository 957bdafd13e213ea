"""Which tensors a block's owner has made in the call that is running: only those are its branch's to spoil."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_made: ContextVar[dict[str, set[int]]] = ContextVar("made", default={})  # noqa: B039  # replaced, never changed
"""Per block, the storages that its owner made in its running call."""


def makes(block: str, tensor: Tensor) -> bool:
    """Whether the running call of this block's owner made a tensor, so that it is no buffer and was not handed in."""
    return _storage(tensor) in _made.get().get(block, ())


@contextmanager
def making(blocks: Iterable[str]) -> Iterator[None]:
    """Take down what is made meanwhile, for each of these blocks."""
    with ExitStack() as stack:
        for block in blocks:
            mode = _Making()
            token = _made.set({**_made.get(), block: mode.storages})
            stack.callback(_made.reset, token)
            stack.enter_context(mode)
        yield


class _Making(TorchFunctionMode):
    """Take down the memory of every result that shares none with an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if type(leaf) is Tensor}
        output = func(*args, **(kwargs or {}))
        self.storages |= {_storage(leaf) for leaf in tree_leaves(output) if type(leaf) is Tensor} - before
        return output


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sparse tensor has none
        return -id(tensor)
