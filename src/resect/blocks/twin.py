"""What a module that did not run would have returned, without data: for models that ask for its shape."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from resect.blocks.absent import Absent
from resect.blocks.block import ResidualBlock
from resect.blocks.inflight import AbsentError
from resect.blocks.state import PORT
from resect.blocks.template import fill, pick
from resect.blocks.units import copied_units

FORMS = 64
"""Forms of inputs that a module that was taken out remembers; then the oldest goes: texts come in every length."""
_HARMLESS = (Tensor, Absent, bool, int, float, str, torch.dtype, torch.device, torch.Size, slice, type(None), type(...))


def meta_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module on the meta device, made without copying any data."""
    tensors = [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        with torch._C.DisableTorchFunctionSubclass():  # quantised weights may know no more than their own layer needs
            empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    for part in module.modules():  # neither gates nor hooks come along
        memo |= {id(value): type(value)() for key, value in part.__dict__.items() if key.endswith("_hooks") and value}
        memo[id(part.__dict__.get(PORT))] = None
    copied_units(module, memo)
    return copy.deepcopy(module, memo)


class Output:
    """One tensor of the output of a module that was called but did not run."""

    def __init__(self, module: nn.Module, at: tuple[Any, ...]) -> None:
        self.module = module
        self.at = at

    @property
    def device(self) -> torch.device | None:
        """Where the module is; None for one without parameters and buffers."""
        for tensors in (self.module.parameters(), self.module.buffers()):
            for tensor in tensors:
                return tensor.device
        return None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a copy of the module on meta tensors."""
        if not all(isinstance(leaf, _HARMLESS) for leaf in tree_leaves((args, kwargs))):
            raise AbsentError(f"{type(self.module).__name__} takes more than tensors and numbers, and might change it")
        twin = self.module.__dict__.get("_resect_twin")
        if twin is None or torch.compiler.is_compiling():
            return self._run(twin or meta_copy(self.module), args, kwargs)
        # A module that was taken out never changes: what it makes of inputs of these forms is known after one run.
        known, key = self.module.__dict__.setdefault("_resect_forms", {}), self._key(args, kwargs)
        form = known.get(key)
        if form is None:
            found = self._run(twin, args, kwargs)
            if not isinstance(found, Tensor):
                return found
            form = known[key] = found.shape, found.stride(), found.dtype
            if len(known) > FORMS:
                known.pop(next(iter(known)), None)
        shape, stride, dtype = form
        return torch.empty_strided(shape, stride, dtype=dtype, device="meta")

    def _run(self, twin: nn.Module, args: Any, kwargs: Any) -> Any:
        twin.train(self.module.training)
        with torch.random.fork_rng(devices=[]):
            return pick(twin.forward(*args, **kwargs), self.at)

    def _key(self, args: Any, kwargs: Any) -> Any:
        leaves, form = tree_flatten((args, kwargs))
        told = ((leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
        return self.at, self.module.training, repr(form), *told


def absent_output(block: ResidualBlock, position: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Build what a module returns that does not run: its recorded output with an Absent for every tensor."""
    pending, training = block.pending[position], module.training

    def leaf(at: tuple[Any, ...]) -> Absent:
        return Absent(pending, block, training, (Output(module, at), args, kwargs))

    return fill(block.templates[position], leaf, {"args": args, "kwargs": kwargs})
