"""Whether a model in eval mode gives the same output twice: what is measured must not be luck."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from resect.blocks.example import Forward, device_of, first_samples, to_device
from resect.blocks.modes import kept_buffers, kept_modes
from resect.errors import InputError

TOLERANCE = 1e-3
"""Relative difference of two outputs that is still rounding: sums on a GPU may change their order."""

_FEW = 16  # samples on which that is tried


def check_repeatable(model: nn.Module, batch: Any, forward: Forward) -> None:
    """Raise ``InputError`` if two runs of one batch differ in eval mode, naming the module where that begins."""
    with kept_modes(model), kept_buffers(model), torch.no_grad():
        model.eval()
        batch = to_device(batch, device_of(model))

        def values() -> list[Tensor]:
            return _tensors(forward(model, batch))

        with suppress(Exception):  # few samples will not do: an error of the model's own comes again
            few = first_samples(batch, _FEW)
            forward(model, few)
            batch = few
        if not _differ(values(), values()):
            return
        first, second = _by_module(model, values), _by_module(model, values)
    names = {module: name for name, module in model.named_modules()}
    where = next((m for (m, a), (_, b) in zip(first, second, strict=False) if _differ(a, b)), model)
    place = f"in {names[where]!r} ({type(where).__name__})" if names.get(where) else "outside its modules"
    raise InputError(
        f"Two runs of one batch through this {type(model).__name__} differ, though it is in eval mode: something "
        f"random is on, first {place}. What is measured could not be told from it. A functional dropout needs "
        "training=self.training; other randomness a fixed generator."
    )


def _by_module(model: nn.Module, run: Callable[[], Any]) -> list[tuple[nn.Module, list[Tensor]]]:
    """Every module's outputs in one run, in the order in which the calls end: inner ones first."""
    seen: list[tuple[nn.Module, list[Tensor]]] = []

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        seen.append((module, [tensor.clone() for tensor in _tensors(output)]))

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _differ(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) != len(other) or any(
        a.shape != b.shape or not bool((a - b).double().norm() <= TOLERANCE * a.double().norm())
        for a, b in zip(one, other, strict=True)
        if torch.isfinite(a).all()
    )
