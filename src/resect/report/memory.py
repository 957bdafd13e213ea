"""The memory that activations take during a forward pass."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resect.blocks.example import Example, device_of
from resect.blocks.modes import kept_modes


def activation_memory(model: nn.Module, example: Any) -> int:
    """Peak of the bytes that a forward pass without gradients holds at once, in eval mode.

    Counted is the memory of every tensor that an operation makes, from then until nothing refers to it any more;
    views and in-place operations take none. Parameters, buffers and the example are not counted, nor what a kernel
    uses inside itself.
    """
    here = Example.of(example).to(device_of(model))
    there = [*model.parameters(), *model.buffers(), *here.tensors()]
    with kept_modes(model), torch.no_grad(), _Alive(there) as alive:
        model.eval()(*here.args, **here.kwargs)
    return alive.peak


class _Alive(TorchDispatchMode):
    """Adds up the storages that operations make, and takes them off as they go."""

    def __init__(self, there: list[Tensor]) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in there)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self._free, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def _free(self, size: int) -> None:
        self.bytes -= size
