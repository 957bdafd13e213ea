"""Compare two models by what they are made of, and outputs bit for bit."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def differences(
    built: nn.Module, small: nn.Module, skip: Iterable[str] = (), within: Iterable[nn.Module] = ()
) -> list[str]:
    """Say where a freshly built model is made otherwise than ``small``: modules and shapes.

    Weights are not compared, so ``built`` may be on the meta device. What lies at or under a path of ``skip``
    is left out. In the modules ``within`` (of ``small``), plain attributes (numbers, strings) are compared too.
    """
    gone, close = tuple(skip), {id(module) for layer in within for module in layer.modules()}
    found = []
    shapes = [_shapes(model) for model in (built, small)]
    for key in sorted(set(shapes[0]) | set(shapes[1])):
        there, here = (shape.get(key) for shape in shapes)
        if there != here and not under(key, gone):
            found.append(f"{key!r} is {there or 'missing'} there, {here or 'missing'} here")
    modules = dict(built.named_modules())
    for path, module in small.named_modules():
        if under(path, gone) or path not in modules:
            continue
        if type(module).__qualname__ != type(modules[path]).__qualname__:
            found.append(f"{path!r} is a {type(modules[path]).__name__} there, a {type(module).__name__} here")
        elif id(module) in close:
            found += _attributes(path, modules[path], module)
    return found


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def under(path: str, prefixes: Iterable[str]) -> bool:
    """Say whether a path is one of these, or lies inside one."""
    return any(path == prefix or path.startswith(prefix + ".") for prefix in prefixes)


def _attributes(path: str, built: nn.Module, small: nn.Module) -> Iterator[str]:
    for name, here in vars(small).items():
        if name.startswith("_") or name in ("training", "gradient_checkpointing") or name not in vars(built):
            continue
        there = vars(built)[name]
        if _plain(here) and _plain(there) and there != here:
            yield f"{path}.{name} is {there!r} there, {here!r} here"


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_plain(item) for item in value)
    return value is None or isinstance(value, (int, float, str))


def standard(model: nn.Module) -> nn.Module | None:
    """Build what a transformers model's class makes of its ``config``, without weights; None for other models."""
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        return None
    build: Any = type(model)
    with torch.random.fork_rng():
        try:
            with torch.device("meta"):
                return build(copy.deepcopy(model.config))
        except (RuntimeError, NotImplementedError):  # its constructor computes with real values
            return build(copy.deepcopy(model.config))


def values(output: Any) -> list[Tensor]:
    """Return copies of the tensors in a model's output, in order; key-value caches are no part of it."""
    return [tensor.detach().clone() for tensor in _tensors(output)]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for item in output.values():
            yield from _tensors(item)
    elif isinstance(output, (list, tuple)):
        for item in output:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        yield from _tensors(vars(output))


def same(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors are equal bit for bit, NaN in the same places."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all()) if a.is_floating_point() else torch.equal(a, b)


def unequal(expected: list[Tensor], got: list[Tensor]) -> str:
    """Say how two lists of tensors differ; nothing where they are equal bit for bit."""
    if len(expected) != len(got):
        return f"{len(got)} output tensors instead of {len(expected)}"
    for place, (a, b) in enumerate(zip(expected, got, strict=True)):
        if not same(a, b):
            if a.shape != b.shape:
                return f"output {place} has shape {tuple(b.shape)} instead of {tuple(a.shape)}"
            return f"output {place} differs by up to {(a.float() - b.float()).abs().max().item():.3g}"
    return ""
