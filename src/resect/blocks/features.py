"""What a model has computed at a place: what enters its head, or what a named module returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from resect.blocks.hooks import Hook
from resect.blocks.recompute import is_recomputing
from resect.blocks.template import tensors_in
from resect.errors import InputError, unknown


@dataclass(frozen=True)
class Place:
    """What a module returns, or what enters it; "" is the model itself."""

    module: str
    enters: bool = False


def before_head(model: nn.Module, run: Callable[[], Any]) -> Place:
    """Return where the features of a model are: before the last ``nn.Linear`` that ``run`` calls, the head.

    Where what that returns is not the model's output (a model without a head, or with two), the output itself is taken.
    """
    names = {module: name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    last: list[tuple[str, Tensor]] = []
    with ExitStack() as hooks, torch.no_grad():
        for module in names:
            hook = module.register_forward_hook(lambda module, _, output: last.append((names[module], output)))
            hooks.callback(hook.remove)
        output = run()
    outputs = {tensor.untyped_storage()._cdata for tensor in tensors_in(output)}
    if last and last[-1][1].untyped_storage()._cdata in outputs:
        return Place(last[-1][0], enters=True)
    return Place("")


def check_place(model: nn.Module, name: str) -> None:
    """Raise ``InputError`` unless the model has a module of this name, with the nearest that it has."""
    modules = [path for path, _ in model.named_modules() if path]
    if name not in modules:
        owner = name.partition("/")[0]
        if owner != name and owner in modules:
            raise InputError(f"{name!r} is a residual block, and features are what a module returns. Name {owner!r}.")
        raise unknown("module", name, modules)


@contextmanager
def tapped(model: nn.Module, places: Mapping[str, Place]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict that holds, after each forward pass until the ``with`` is left, the values at places by key.

    Of several tensors the first of floating point counts that is no single number.
    """
    taken: dict[str, Tensor] = {}

    def take(key: str, value: Any) -> None:
        if is_recomputing():
            return
        found = [tensor for tensor in tensors_in(value) if tensor.is_floating_point() and tensor.ndim]
        if not found:
            raise InputError(f"There is no tensor of numbers to compare at {key!r}. Name another module.")
        taken[key] = found[0]

    with ExitStack() as hooks:
        for key, place in places.items():
            module = model.get_submodule(place.module)
            if place.enters:
                entering = Hook(lambda _, args, kwargs, key=key: take(key, (args, kwargs)))
                hook = module.register_forward_pre_hook(entering, with_kwargs=True)
            else:
                hook = module.register_forward_hook(Hook(lambda _, args, output, key=key: take(key, output)))
            hooks.callback(hook.remove)
        yield taken
