"""A copy of a model that computes the same in fewer steps: BatchNorms folded into the layers before, another dtype."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from resect.blocks.example import Example
from resect.blocks.gate import detach
from resect.blocks.template import map_tensors
from resect.blocks.trace import Call, quiet, trace
from resect.blocks.units import is_sharded
from resect.blocks.unwrap import is_compiled, unwrap
from resect.errors import InputError

_BEFORE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def folded(model: nn.Module, example: Any, *, dtype: torch.dtype | None = None) -> nn.Module:
    """Return a copy of a model, in eval mode, for studies: its BatchNorms are folded into the layers before them.

    The copy computes the same but for rounding, and takes less time; the model's blocks are the copy's by name. A
    BatchNorm is folded into a convolution or linear layer where a run on the example shows that each of the two runs
    once, and that the one's output goes into the other and nowhere else; where neither shares weights or has hooks.
    All else stays as it is. Convolutions of images get their weights in the channels-last layout, where that runs.

    Parameters
    ----------
    model: left as it is; gates and methods that are attached to it are not the copy's.
    example: what the model is called with, as for ``find_blocks``.
    dtype: compute in it, ``torch.bfloat16``: floating-point inputs are cast to it, outputs to float32.

    Raises ``InputError`` for a model that is wrapped, sharded or compiled, and for a dtype that is not floating-point.

    >>> study = resect.lesion_study(resect.folded(model, x, dtype=torch.bfloat16), blocks, data)
    """
    if unwrap(model) is not model or is_sharded(model) or any(map(is_compiled, model.modules())):
        raise InputError(
            f"folded copies the model and changes its layers; this {type(model).__name__} is wrapped, sharded or "
            "compiled. Pass the model itself, before that."
        )
    if dtype is not None and not dtype.is_floating_point:
        raise InputError(f"dtype must be a floating-point type such as torch.bfloat16, not {dtype}.")
    given = Example.of(example)
    twin = detach(copy.deepcopy(model)).eval()
    for before, norm in list(_pairs(twin, given)):
        layer: Any = twin.get_submodule(before)
        fuse: Any = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        _put(twin, before, fuse(layer, twin.get_submodule(norm)).eval())
        _put(twin, norm, nn.Identity().eval())
    if dtype is not None:
        _compute_in(twin, dtype)
    return _channels_last(twin, given)


def _channels_last(model: nn.Module, example: Example) -> nn.Module:
    """Return a copy whose weights lie the way convolutions are fastest; the model itself where that does not run."""
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return model
    laid_out = copy.deepcopy(model).to(memory_format=torch.channels_last)
    try:
        with quiet(laid_out):
            example.run(laid_out)
    except RuntimeError:  # a view() that wants the other layout
        return model
    return laid_out


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, module)


def _fused(before: Any, norm: Any) -> nn.Module:
    fused: nn.Module = (fuse_linear_bn_eval if isinstance(before, nn.Linear) else fuse_conv_bn_eval)(before, norm)
    return fused


def _compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    def cast(value: Any, kind: torch.dtype) -> Any:
        return map_tensors(value, lambda tensor: tensor.to(kind) if tensor.is_floating_point() else tensor)

    model.to(dtype)
    model.register_forward_pre_hook(lambda _, *given: cast(given, dtype), with_kwargs=True, prepend=True)
    model.register_forward_hook(lambda _, args, output: cast(output, torch.float32))


def _pairs(model: nn.Module, example: Example) -> Iterator[tuple[str, str]]:
    """Yield the names of layers and of the BatchNorms that can be folded into them."""
    with quiet(model):
        seen = trace(model, example)
    runs = Counter(id(call.module) for call in seen.calls)
    holders = Counter(id(p) for _, m in model.named_modules(remove_duplicate=False) for p in m._parameters.values())
    made_by = {call.outputs[0]: call for call in seen.calls if len(call.outputs) == 1 and not call.children}

    def plain(call: Call, kinds: tuple[type, ...]) -> bool:
        module = call.module
        hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        own = all(holders[id(p)] == 1 for p in module._parameters.values() if p is not None)
        return type(module) in kinds and runs[id(module)] == 1 and own and not hooks

    for call in seen.calls:
        before = made_by.get(call.inputs[0]) if len(call.inputs) == 1 else None
        if before is None or not (plain(call, _NORMS) and plain(before, _BEFORE)):
            continue
        node = seen.nodes[call.inputs[0]]
        alone = all(seen.nodes[user].call == call.index for user in node.users) and node.index not in seen.outputs
        norm: Any = call.module
        fits = norm.running_mean is not None and (type(before.module) is not nn.Linear or len(node.shape) == 2)
        if alone and fits:
            yield before.name, call.name
