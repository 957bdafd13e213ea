"""One batch and its loss: what the model is called with, and whether the loss is a sum over samples or a mean."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from resect.analyse.repeatable import check_repeatable
from resect.blocks.example import Example, as_dict, device_of, to_device
from resect.errors import InputError

LossFn = Callable[[Any, Any], Tensor]
"""``loss_fn(output, target)``: a scalar. Of a batch that is a mapping, the target is the whole mapping."""


@dataclass(frozen=True)
class Batch:
    """B samples: the call of the model, and what the loss function gets beside the output."""

    example: Example
    target: Any
    size: int

    @classmethod
    def of(cls, batch: Any, model: nn.Module) -> Batch:
        """Read ``(inputs, target)`` or a mapping; raises ``InputError`` for anything else and for no samples."""
        batch = as_dict(batch)
        if isinstance(batch, Mapping):
            inputs, target, counted = batch, batch, batch.get("labels", batch)
        elif isinstance(batch, (tuple, list)) and len(batch) == 2:
            (inputs, target), counted = batch, batch[1]
        else:
            raise InputError(
                "Path gradients need a batch: an (inputs, target) tuple, or a mapping that the model takes as keyword "
                f"arguments, but got {type(batch).__name__}."
            )
        sizes = [len(leaf) for leaf in tree_leaves(counted) if isinstance(leaf, Tensor) and leaf.dim()]
        if not sizes or not sizes[0]:
            raise InputError("The number of samples cannot be told: the target holds no tensor with samples in front.")
        target = to_device(target, device_of(model))
        return cls(Example.of(inputs).to(device_of(model)), target, sizes[0])

    def part(self, start: int, stop: int) -> Batch:
        """Return some of the samples: of every tensor that is as long as the batch, those rows."""

        cut = functools.partial(_rows, start, stop - start, self.size)
        return Batch(self._mapped(cut), tree_map_only(Tensor, cut, self.target), min(stop, self.size) - start)

    def parts(self, size: int) -> Iterator[Batch]:
        """Cut the batch into parts of at most ``size`` samples."""
        for start in range(0, self.size, size):
            yield self.part(start, start + size)

    def twice(self) -> Batch:
        """Return the batch with every sample a second time."""
        double = functools.partial(_twice, size=self.size)
        return Batch(self._mapped(double), tree_map_only(Tensor, double, self.target), 2 * self.size)

    def _mapped(self, function: Callable[[Tensor], Tensor]) -> Example:
        args, kwargs = tree_map_only(Tensor, function, (self.example.args, dict(self.example.kwargs)))
        return Example(args, kwargs)


def _twice(tensor: Tensor, size: int) -> Tensor:
    return torch.cat([tensor, tensor]) if tensor.dim() and len(tensor) == size else tensor


def loss_of(output: Any, target: Any, loss_fn: LossFn | None) -> Tensor:
    """Return the loss of an output: the function's, or the model's own; ``InputError`` if it is not a finite scalar."""
    loss: Any
    if loss_fn is not None:
        loss, whose = loss_fn(output, target), "What loss_fn returns"
    else:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        whose = "The model's own loss"
        if loss is None:
            raise InputError(
                "This model returned no loss. Pass loss_fn(output, target), or a batch with 'labels' to a model that "
                "computes its loss from them."
            )
    if not isinstance(loss, Tensor) or loss.dim():
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise InputError(f"{whose} must be a scalar tensor, the sum over samples, but is {shape}.")
    if not torch.isfinite(loss):
        raise InputError(f"The loss is {float(loss)} on this batch, so its gradients say nothing.")
    return loss


def loss_kind(model: nn.Module, batch: Batch, loss_fn: LossFn | None) -> Literal["sum", "mean"]:
    """Return whether the loss is a sum over samples or a mean: what it becomes with every sample a second time.

    Raises ``InputError`` for a loss that is neither (one that compares samples with each other), and for a model that
    gives another output each time.
    """
    check_repeatable(model, batch, lambda net, called: called.example.run(net))
    if batch.size == 1:
        return "sum"
    with torch.no_grad():
        output = batch.example.run(model)
        once = float(loss_of(output, batch.target, loss_fn))
        again = batch.twice()
        if loss_fn is None:
            doubled = again.example.run(model)
        else:
            doubled = tree_map_only(Tensor, functools.partial(_twice, size=batch.size), output)
        twice = float(loss_of(doubled, again.target, loss_fn))
        apart = []  # the first sample, and the others
        for part, start in ((batch.part(0, 1), 0), (batch.part(1, batch.size), 1)):
            if loss_fn is None:
                of_part = part.example.run(model)
            else:
                of_part = tree_map_only(Tensor, functools.partial(_rows, start, part.size, batch.size), output)
            apart.append(loss_of(of_part, part.target, loss_fn))
    within = 1e-3 if apart[0].dtype in (torch.float32, torch.float64) else 1e-2
    first, others = map(float, apart)
    if abs(twice - 2 * once) <= 0.01 * abs(once):
        kind, whole = "sum", first + others
    elif abs(twice - once) <= 0.01 * abs(once):
        kind, whole = "mean", (first + others * (batch.size - 1)) / batch.size
    else:
        kind, whole = "", 0.0
    if kind and (abs(whole - once) <= within * abs(once) or _counts_tokens(batch)):
        return kind  # type: ignore[return-value]
    raise InputError(
        f"The loss is neither a sum nor a mean over samples: {once:.6g} on the batch, {twice:.6g} with every sample "
        f"twice, {first:.6g} on the first one and {others:.6g} on the others. Pass a loss_fn that adds up one loss per "
        "sample."
    )


def _rows(start: int, number: int, size: int, tensor: Tensor) -> Tensor:
    return tensor[start : start + number] if tensor.dim() and len(tensor) == size else tensor


def _counts_tokens(batch: Batch) -> bool:
    """Whether samples may count differently: a mean over tokens, of which each has its own number."""
    target = batch.target.get("labels") if isinstance(batch.target, Mapping) else batch.target
    return isinstance(target, Tensor) and target.dim() > 1 and not target.is_floating_point()


def check_parts(batch: Batch, chunk: int) -> None:
    """Raise where parts of a batch would count differently: a mean over tokens, of which samples have unequal many.

    As everywhere in torch, tokens with the label -100 do not count.
    """
    if chunk >= batch.size or not _counts_tokens(batch):
        return
    target = batch.target["labels"] if isinstance(batch.target, Mapping) else batch.target
    tokens = (target != -100).flatten(1).sum(dim=1)
    if (tokens != tokens[0]).any():
        raise InputError(
            f"The loss is a mean over tokens, of which the samples have {int(tokens.min())} to {int(tokens.max())}, so "
            f"that parts of the batch would count differently. Handle it whole, chunk={batch.size}, or pass a loss_fn "
            "that adds up the tokens' losses."
        )
