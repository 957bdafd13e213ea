"""What a model is called with: one example, or one batch of data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from resect.blocks.units import reshard
from resect.errors import InputError

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True)
class Example:
    """The positional and keyword arguments of one call of a model."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Any) -> Example:
        """Read an example: a tensor, a tuple or list of arguments, a mapping of kwargs, or an ``Example``.

        Raises ``InputError`` for anything else, saying what to pass instead.
        """
        if isinstance(value, Example):
            return value
        if isinstance(value, Tensor):
            return cls((value,))
        if isinstance(value, Mapping):
            odd = [key for key in value if not isinstance(key, str)]
            if odd:
                raise InputError(
                    f"A mapping is an example's keyword arguments, so its keys must be strings, not {odd[0]!r}. A "
                    "model that takes the mapping itself: resect.Example((mapping,))."
                )
            return cls((), dict(value))
        if isinstance(value, (tuple, list)):
            return cls(tuple(value))
        raise InputError(
            f"An example must be a tensor, a tuple of arguments, a mapping of keyword arguments or a "
            f"resect.Example, not {type(value).__name__}. {_instead(value)}"
        )

    def run(self, model: nn.Module) -> Any:
        """Call the model on copies of the tensors, on the model's device: what it writes in place stays with it."""
        here = self.to(device_of(model))
        output = model(*here.args, **here.kwargs)
        if not torch.is_grad_enabled():
            reshard(model)  # no backward pass will, and an optimizer made now would get whole parameters for pieces
        return output

    def to(self, device: torch.device | None) -> Example:
        """Return a copy of the example with its tensors on ``device`` (None: where they are).

        A value that occurs twice occurs twice in the copy. Other objects that a model may write into (a cache,
        a random generator) are copied too, where they can be.
        """
        copies: dict[int, Any] = {}

        def copied(leaf: Any) -> Any:
            if id(leaf) not in copies:
                copies[id(leaf)] = _copied(leaf, device)
            return copies[id(leaf)]

        args, kwargs = tree_map(copied, (self.args, dict(self.kwargs)))
        return Example(args, kwargs)

    def tensors(self) -> list[Tensor]:
        """Return every tensor of the example, in order."""
        return [leaf for leaf in tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    def __str__(self) -> str:
        shapes = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in self.tensors())
        return ", ".join(shapes) or "no tensors"


def _instead(value: Any) -> str:
    """Say what to pass instead of a value that is no example."""
    if value is None:
        return "Finding blocks means running the model once: pass what you would call it with."
    if type(value).__name__ == "ndarray":
        return "Pass torch.from_numpy(array)."
    if isinstance(value, Iterator):
        return "Pass one item of it, next(iterator); of an (inputs, target) pair the inputs."
    if hasattr(value, "__iter__") and hasattr(value, "dataset"):
        return "Pass one batch of it, next(iter(loader)); of an (inputs, target) pair the inputs."
    return "For instance: torch.randn(2, 3, 224, 224)."


def _copied(leaf: Any, device: torch.device | None) -> Any:
    if isinstance(leaf, Tensor):
        if leaf.is_meta and device is not None and device.type != "meta":
            raise InputError(
                f"The example is on the meta device, so it holds no values, and the model is on {device}. Pass a real "
                "tensor, or move the model: model.to('meta')."
            )
        copied = leaf.detach().to(leaf.device if device is None else device, copy=True)
        # Labelled tensors (torchvision's Image, MONAI's MetaTensor) come out of every operation as new objects, which
        # no trace could follow; those that compute in their own way (nested, sharded) stay what they are.
        labelled = type(copied).__torch_dispatch__ is Tensor.__torch_dispatch__
        return copied.as_subclass(Tensor) if labelled else copied
    if leaf is None or callable(leaf) or isinstance(leaf, (bool, int, float, complex, str, bytes, torch.dtype)):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # an object that cannot be copied is handed on as it is
        return leaf


def device_of(model: nn.Module) -> torch.device | None:
    """Return the device of the first parameter or buffer; None for a model without either.

    None too for a model that moves its inputs by itself (accelerate's hooks, with parts of it offloaded).
    """
    if "_hf_hook" in model.__dict__:
        return None
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return None


def to_device(value: Any, device: torch.device | None) -> Any:
    """Move every tensor of a batch, inside nested tuples, lists and dicts; None: they stay. See ``as_dict``."""
    value = as_dict(value)
    if device is None:
        return value
    return tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), value)


def as_dict(batch: Any) -> Any:
    """Return a dict for a mapping that is none (transformers' ``BatchEncoding``), in which torch sees no tensors."""
    return dict(batch) if isinstance(batch, Mapping) and not isinstance(batch, dict) else batch


def forward_batch(model: nn.Module, batch: Any) -> Any:
    """Run a batch the default way: tuple = (inputs, target), mapping = ``model(**batch)``, tensor = the input."""
    batch = to_device(batch, device_of(model))
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(batch[0])
    return model(batch)


def first_samples(batch: Any, count: int) -> Any:
    """Return the first samples of a batch, along the first dimension of all its tensors that share one."""
    sizes = [len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    if not sizes:
        return batch
    return tree_map_only(
        Tensor, lambda tensor: tensor[:count] if tensor.ndim and len(tensor) == sizes[0] else tensor, batch
    )
