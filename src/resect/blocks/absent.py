"""A value that was not computed.

While a block is closed, its modules return an ``Absent`` and the user's own forward code keeps running:
every operation on an Absent gives an Absent, until the block's addition, where ``x + Absent`` is ``x``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from resect.errors import ResectError

_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_DIFFERENCES = frozenset({"sub", "sub_", "subtract", "subtract_", "__sub__", "__isub__"})
SUMS = _SUMS | _DIFFERENCES
_JOINED = frozenset({"cat", "concat", "concatenate"})
_OF_A_VALUE = frozenset({"item", "tolist", "numpy", "data_ptr", "backward", "storage", "untyped_storage"})
_OF_A_SHAPE = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous",
     "is_floating_point", "is_complex", "get_device", "shape", "ndim", "dtype", "layout", "is_cuda", "is_sparse",
     "requires_grad", "is_nested", "is_quantized", "names", "itemsize", "nbytes", "is_meta", "is_mps", "is_cpu"}
)  # fmt: skip


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
        values = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, InFlight)]
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


class Absent(InFlight):
    """A value that was not computed.

    ``pending`` additions inside the branch still swallow their operand; at 0 the next addition is the
    block's own and gives the other operand. ``source``, a function and its arguments, tells the shape where the
    model asks for it: it is then run without data, on the meta device.
    """

    def __init__(
        self, pending: float = math.inf, clone: bool = False, zeros: bool = False, source: tuple[Any, ...] | None = None
    ) -> None:
        self.pending = pending
        self.clone = clone
        self.zeros = zeros
        self.source = source

    def meet(self, func: Callable[..., Any], left: Any, right: Any, kwargs: dict[str, Any]) -> Any:
        """``x + Absent`` is ``x`` at the block's own addition, an Absent before it."""
        other: Any = right if left is self else left
        name = getattr(func, "__name__", "")
        if not isinstance(other, (Tensor, InFlight)):
            return self  # a number changes no value that was not computed
        if isinstance(other, Absent):
            nearest = self if self.pending <= other.pending else other
            return nearest if not nearest.pending else nearest._after(func, (left, right), kwargs, 1)
        if self.pending:
            return self._after(func, (left, right), kwargs, 1)
        if left is not self:
            # Written in place it stays where the model expects it. Else, if the sum is written later, that
            # must not reach the shortcut's own tensor.
            in_place = name.endswith("_") and name not in ("__add__", "__radd__", "__sub__")
            return other.clone() if self.clone and not in_place and isinstance(other, Tensor) else other
        shortcut: Any = other
        value = -shortcut if name in _DIFFERENCES else shortcut
        value = value.clone() if self.clone and isinstance(value, Tensor) else value
        if name in ("add_", "sub_", "subtract_"):
            self.result = value
        return value

    def _after(self, func: Any, args: Any, kwargs: Any, additions: int = 0) -> Absent:
        return Absent(self.pending - additions, self.clone, self.zeros, (func, args, kwargs))

    def pass_through(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Nothing is computed from a value that was not computed."""
        name = getattr(func, "__name__", str(func))
        absents = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Absent)]
        nearest = min(absents, key=lambda absent: absent.pending)
        if args and isinstance(args[0], Tensor) and (name == "__setitem__" or _writes(name)):
            raise AbsentError(f"the model writes a closed branch's value into another tensor ({name!r})")
        if nearest.zeros and name in _JOINED and any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs))):
            args, kwargs = tree_map_only(Absent, Absent.as_zeros, (args, kwargs))
            return func(*args, **kwargs)
        return nearest._after(func, args, kwargs)

    def as_zeros(self) -> Tensor:
        """Return zeros of this value's shape."""
        return torch.zeros(self.twin().shape, dtype=self.twin().dtype, device=self.device)

    def twin(self) -> Any:
        """This value without data, on the meta device; raises ``AbsentError`` where that cannot be had."""
        if self.source is None:
            raise AbsentError("a closed branch's value was not computed, and its shape is not known")
        found = self.__dict__.get("_twin")
        if found is None:
            func, args, kwargs = self.source
            args, kwargs = tree_map_only((Tensor, Absent), on_meta, (args, kwargs))
            try:
                with torch.no_grad():
                    found = _without_device(func, args, kwargs)
            except Exception as error:
                raise AbsentError(f"the shape of a value that was not computed cannot be told: {error}") from error
            self._twin = found
        return found

    @property
    def device(self) -> torch.device:
        """Where the value would be, had it been computed."""
        if self.source is not None:
            for leaf in tree_leaves(self.source):
                if isinstance(leaf, Absent) or (isinstance(leaf, Tensor) and not leaf.is_meta):
                    return leaf.device
            if (own := getattr(self.source[0], "device", None)) is not None:
                return torch.device(own)
        return torch.device("cpu")

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name, None)
        if name.startswith("__") or name.startswith("_") or method is None or name in _OF_A_VALUE:
            raise AbsentError(f"a closed branch's value was not computed, but the model asks for its {name!r}")
        if name in _OF_A_SHAPE:
            return getattr(self.twin(), name)
        if not callable(method):  # x.T, x.data, …
            return self._after(getattr, (self, name), {})
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Part of a value that was not computed is not computed either."""

    def __len__(self) -> int:
        return len(self.twin())

    def __iter__(self) -> Any:
        return (self[place] for place in range(len(self.twin())))

    def _decide(self, *_: Any) -> Any:
        raise AbsentError("a closed branch's value was not computed, but the model decides by it")

    __bool__ = __float__ = __int__ = __index__ = __contains__ = _decide

    def __repr__(self) -> str:
        return "Absent()"

    def __reduce__(self) -> Any:
        try:
            shape = tuple(self.twin().shape), self.twin().dtype
        except (AbsentError, AttributeError):
            shape = None
        return _again, (self.pending, self.clone, self.zeros, shape)


def _again(pending: float, clone: bool, zeros: bool, shape: Any) -> Absent:
    return absent_of_shape(pending, clone, zeros, *shape) if shape else Absent(pending, clone, zeros)


def absent_of_shape(pending: float, clone: bool, zeros: bool, shape: tuple[int, ...], dtype: torch.dtype) -> Absent:
    """Return an Absent that knows its shape."""
    return Absent(pending, clone, zeros, (torch.empty, (shape,), {"dtype": dtype, "device": "meta"}))


def on_meta(value: Any) -> Any:
    """Return a tensor, or a value that was not computed, without data."""
    return value.twin() if isinstance(value, Absent) else value.detach().to("meta")


def _without_device(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a function on meta tensors; a move to another device moves nothing there."""
    name = getattr(func, "__name__", "")
    if name in ("cpu", "cuda", "contiguous"):
        return args[0]
    if name == "to":
        args = tuple(arg for arg in args if not isinstance(arg, (torch.device, str)))
        kwargs = {key: value for key, value in kwargs.items() if key != "device"}
        if len(args) == 1 and not kwargs:
            return args[0]
    return func(*args, **kwargs)


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__imul__", "__itruediv__", "__ipow__", "__iand__", "__ior__")
