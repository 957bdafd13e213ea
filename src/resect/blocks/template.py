"""The form of a module's output as plain data: where its tensors are, and what stands around them."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from resect.blocks.inflight import InFlight

_PLAIN = (bool, int, float, str)
Path = tuple[Any, ...]
"""Where a value sits in a container: keys, from the outside in."""


def template_of(output: Any, given: Mapping[int, Path] | None = None) -> Any:
    """Read the template off a module's output; raises ``TypeError`` for outputs it cannot describe.

    ``"absent"`` stands for a tensor, None for None, ``[kind, …]`` for what holds others: ``tuple``, ``list``,
    ``dict`` and dataclasses with their keys, a named tuple with its class, ``value`` for plain numbers and strings,
    ``given`` for an argument that the module hands on beside its result (their ids are in ``given``).
    """
    if isinstance(output, Tensor):
        return "absent"
    given = given or {}

    def part(value: Any) -> Any:
        plain = value is None or isinstance(value, _PLAIN)  # one object, whoever made it
        return ["given", *given[id(value)]] if id(value) in given and not plain else template_of(value, given)

    if output is None:
        return None
    if isinstance(output, _PLAIN):
        return ["value", output]
    if type(output) in (tuple, list):
        return [type(output).__name__, *(part(item) for item in output)]
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return ["named", _path(output), *(part(item) for item in output)]
    if isinstance(output, dict):
        keys = [[key, part(value)] for key, value in output.items() if isinstance(key, str)]
        if len(keys) == len(output):
            return ["dict", "builtins:dict" if type(output) is dict else _path(output), *keys]
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        fields = [field.name for field in dataclasses.fields(output) if field.init]
        return ["dict", _path(output), *([name, part(getattr(output, name))] for name in fields)]
    raise TypeError(f"a branch module returns a {type(output).__name__}, which cannot be made without computing it")


def _path(value: object) -> str:
    cls = type(value)
    if "<locals>" in cls.__qualname__:
        raise TypeError(f"a branch module returns a {cls.__name__}, a class made inside a function")
    return f"{cls.__module__}:{cls.__qualname__}"


def fill(template: Any, leaf: Callable[[Path], Any], given: Any = None, at: Path = ()) -> Any:
    """Build an output from its template, with ``leaf(path)`` for every tensor and what is handed on from ``given``."""
    if template == "absent":
        return leaf(at)
    if template is None:
        return None
    kind, *items = template
    if kind == "value":
        return items[0]
    if kind == "given":
        return pick(given, tuple(items))
    if kind == "dict":
        cls = _class(items[0])
        return cls(**{key: fill(value, leaf, given, (*at, key)) for key, value in items[1:]})
    if kind == "named":
        return _class(items[0])(*(fill(item, leaf, given, (*at, place)) for place, item in enumerate(items[1:])))
    parts = (fill(item, leaf, given, (*at, place)) for place, item in enumerate(items))
    return tuple(parts) if kind == "tuple" else list(parts)


def _class(path: str) -> Any:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def pick(output: Any, at: Path) -> Any:
    """Return what sits at a path that ``fill`` gave."""
    for key in at:
        output = getattr(output, key) if isinstance(key, str) and not isinstance(output, dict) else output[key]
    return output


def paths_of(template: Any, at: Path = ()) -> list[Path]:
    """Return the path of every tensor in a template, in order."""
    if template == "absent":
        return [at]
    if template is None or template[0] in ("value", "given"):
        return []
    kind, *items = template
    if kind == "dict":
        return [path for key, value in items[1:] for path in paths_of(value, (*at, key))]
    items = items[1:] if kind == "named" else items
    return [path for place, item in enumerate(items) for path in paths_of(item, (*at, place))]


def handed_on(template: Any, at: Path = ()) -> list[tuple[Path, Path]]:
    """Return, of every argument that a module hands on, its path in the output and in what was given."""
    if template == "absent" or template is None or template[0] == "value":
        return []
    kind, *items = template
    if kind == "given":
        return [(at, tuple(items))]
    if kind == "dict":
        return [pair for key, value in items[1:] for pair in handed_on(value, (*at, key))]
    items = items[1:] if kind == "named" else items
    return [pair for place, item in enumerate(items) for pair in handed_on(item, (*at, place))]


def replaced(output: Any, at: Path, value: Any) -> Any:
    """Return an output with another value at a path; the containers on the way are new."""
    if not at:
        return value
    key, *rest = at
    inner = replaced(pick(output, (key,)), tuple(rest), value)
    if isinstance(output, dict):
        return type(output)(**{**output, key: inner})
    if isinstance(key, str):
        return dataclasses.replace(output, **{key: inner})
    items = [*output[:key], inner, *output[key + 1 :]]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def tensors_in(value: Any, and_absent: bool = False) -> list[Any]:
    """Return every tensor inside nested containers, dataclasses included, in order; values in flight on request."""
    wanted = (Tensor, InFlight) if and_absent else (Tensor,)
    if isinstance(value, wanted):
        return [value]
    if value is None or isinstance(value, _PLAIN):
        return []
    inside: Iterable[Any]
    if type(value) in (tuple, list):  # every operation's arguments: too many for the general way
        inside = value
    elif type(value) is dict:
        inside = value.values()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        leaves = tree_leaves(value, is_leaf=dataclasses.is_dataclass)
        inside = [leaf for leaf in leaves if leaf is not value]
    return [tensor for item in inside for tensor in tensors_in(item, and_absent)]


def map_tensors(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """Return nested containers, dataclasses included, with ``function`` of every tensor in its place."""
    if isinstance(value, Tensor):
        return function(value)

    def leaf(inside: Any) -> Any:
        if not dataclasses.is_dataclass(inside) or isinstance(inside, type):
            return function(inside) if isinstance(inside, Tensor) else inside
        fields = [field.name for field in dataclasses.fields(inside) if field.init]
        return dataclasses.replace(inside, **{name: map_tensors(getattr(inside, name), function) for name in fields})

    return tree_map(leaf, value)
