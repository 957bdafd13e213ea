"""A branch's value on its way to its addition, seen by every operation that meets it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from resect.errors import ResectError

_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
DIFFERENCES = frozenset({"sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"})
SUMS = _SUMS | DIFFERENCES


class AbsentError(ResectError, AttributeError):
    """The model asked a value that was not computed for something only a computed value has."""


class InFlight:
    """A branch's value on its way to its addition; how it meets the shortcut is the subclass's matter."""

    result: Any = None
    """What an addition in place, whose result the model dropped, made of this value."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Intercept every torch operation that meets this value."""
        kwargs = dict(kwargs or {})
        values = in_flight(args, kwargs)
        if any(value.result is not None for value in values):
            args, kwargs = tree_map_only(InFlight, settled, (args, kwargs))
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        args, kwargs = positional(args, kwargs) if name in SUMS else (args, kwargs)
        out = kwargs.pop("out", None)
        if name in SUMS and len(args) >= 2 and isinstance(args[0], (Tensor, InFlight)):
            result = values[0].meet(func, args[0], args[1], kwargs)
        else:
            result = values[0].pass_through(func, args, kwargs)
        if out is None:
            return result
        if not isinstance(result, Tensor):
            raise AbsentError(f"the model writes {name!r} of a branch's value into a tensor of its own (out=)")
        return out.copy_(result)

    def meet(self, func: Callable[..., Any], left: Any, right: Any, kwargs: dict[str, Any]) -> Any:
        """Give the value of ``left ± right``, of which one is this value."""
        raise NotImplementedError

    def pass_through(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Give the value of any other operation."""
        raise NotImplementedError

    def __hash__(self) -> int:
        return id(self)

    def __getitem__(self, key: Any) -> Any:
        return type(self).__torch_function__(operator.getitem, (), (self, key))


def in_flight(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return the arguments that are on their way to an addition, also out of lists and dicts."""
    given = (*args, *kwargs.values())
    if any(isinstance(value, (tuple, list, dict)) for value in given):  # walking a tree takes ten times as long
        given = tuple(tree_leaves(given))
    return [value for value in given if isinstance(value, InFlight)]


def positional(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a sum with its operands in their places, also where the model names them."""
    named = [kwargs[key] for key in ("input", "other") if key in kwargs]
    return (*args, *named), {key: value for key, value in kwargs.items() if key not in ("input", "other")}


def settled(value: InFlight) -> Any:
    """Return what became of a value that was added to in place; itself if nothing did."""
    return value if value.result is None else value.result


def _operator(func: Any, swapped: bool = False) -> Any:
    def operate(self: InFlight, *others: Any) -> Any:
        args = (*others, self) if swapped else (self, *others)
        return type(self).__torch_function__(func, (), args)

    return operate


_OPERATORS = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "truediv": torch.div, "matmul": torch.matmul,
    "pow": torch.pow, "floordiv": torch.floor_divide, "mod": torch.remainder,
    "and": torch.bitwise_and, "or": torch.bitwise_or,
}  # fmt: skip
for _name, _func in _OPERATORS.items():
    setattr(InFlight, f"__{_name}__", _operator(_func))
    setattr(InFlight, f"__r{_name}__", _operator(_func, swapped=_name not in ("add", "mul")))
for _name in ("add", "sub", "mul", "pow"):
    setattr(InFlight, f"__i{_name}__", _operator(getattr(Tensor, f"__i{_name}__")))
InFlight.__itruediv__ = _operator(Tensor.div_)  # type: ignore[attr-defined]
for _name in ("neg", "abs", "invert", "lt", "le", "gt", "ge", "eq", "ne"):
    setattr(InFlight, f"__{_name}__", _operator(getattr(torch, {"invert": "bitwise_not"}.get(_name, _name))))
