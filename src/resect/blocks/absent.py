"""A value that was not computed, and a branch end on its way to its addition.

While a block is closed, its modules return an ``Absent`` and the user's own forward code keeps running:
every operation on an Absent gives an Absent, until the block's addition, where ``x + Absent`` is ``x``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_any, tree_leaves, tree_map_only

from resect.errors import ResectError

_ADDITIONS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_MIXTURES = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack", "where", "sub", "sub_", "rsub"})


class AbsentError(ResectError, AttributeError):
    """The model asked a value that was not computed for something only a computed value has."""


class InFlight:
    """A branch end on its way to the addition; how it meets the shortcut is the subclass's matter."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Intercept every torch operation that meets this value."""
        kwargs = kwargs or {}
        values = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, InFlight)]
        name = getattr(func, "__name__", "")
        if "out" in kwargs:
            raise AbsentError(f"the model writes {name!r} of a branch's value into a tensor of its own (out=)")
        if name in _ADDITIONS and len(args) >= 2 and kwargs.get("alpha", 1) == 1:
            return values[0].meet(*args[:2])
        return values[0].pass_through(func, args, kwargs)

    def meet(self, left: Any, right: Any) -> Any:
        """Give the value of ``left + right``, of which one is this value."""
        raise NotImplementedError

    def pass_through(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Give the value of any other operation."""
        raise NotImplementedError

    def __add__(self, other: Any) -> Any:
        return self.meet(self, other)

    __iadd__ = __add__

    def __radd__(self, other: Any) -> Any:
        return self.meet(other, self)


class Absent(InFlight):
    """A value that was not computed.

    ``pending`` additions inside the branch still swallow their operand (infinitely many before the branch
    end); at 0 the next addition is the block's own and gives the other operand.
    """

    __slots__ = ("clone", "pending")

    def __init__(self, pending: float = math.inf, clone: bool = False) -> None:
        self.pending = pending
        self.clone = clone

    def meet(self, left: Any, right: Any) -> Any:
        """``x + Absent`` is ``x`` at the block's own addition, an Absent before it."""
        other = right if left is self else left
        if isinstance(other, Absent):
            return self if self.pending <= other.pending else other
        if self.pending:
            return Absent(self.pending - 1, self.clone)
        if isinstance(other, InFlight):
            return other
        # The sum is written in place later: that must not reach the shortcut's own tensor.
        return other.clone() if self.clone else other

    def pass_through(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Nothing is computed from a value that was not computed."""
        name = getattr(func, "__name__", str(func))
        mixed = tree_any(lambda leaf: isinstance(leaf, Tensor), (args, kwargs))
        if name == "__get__" or (name in _MIXTURES and mixed):
            raise AbsentError(f"a closed branch's value was not computed, but the model applies {name!r} to it")
        nearest = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Absent)]
        return min(nearest, key=lambda absent: absent.pending)

    def __getattr__(self, name: str) -> Any:
        # Methods of a tensor work (`absent.transpose(1, 2)`); its shape, type and values do not exist.
        method = getattr(torch.Tensor, name, None)
        known_only_to_tensors = {
            "size",
            "dim",
            "numel",
            "stride",
            "item",
            "tolist",
            "numpy",
            "nelement",
            "element_size",
        }
        if name.startswith("__") or not callable(method) or name in known_only_to_tensors:
            raise AbsentError(f"a closed branch's value was not computed, but the model asks for its {name!r}")
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def _operate(self, *others: Any) -> Absent:
        return min((self, *(other for other in others if isinstance(other, Absent))), key=lambda absent: absent.pending)

    __mul__ = __rmul__ = __imul__ = __truediv__ = __itruediv__ = __matmul__ = __neg__ = __getitem__ = _operate

    def _decide(self, *_: Any) -> Any:
        raise AbsentError("a closed branch's value was not computed, but the model unpacks it or decides by it")

    __iter__ = __bool__ = __len__ = __float__ = __int__ = __lt__ = __le__ = __gt__ = __ge__ = _decide

    def __repr__(self) -> str:
        return "Absent()"

    def __reduce__(self) -> Any:
        return Absent, (self.pending, self.clone)


class Joining(InFlight):
    """A computed branch end that meets the other operand of its addition through ``join(other, branch)``."""

    __slots__ = ("terms",)

    def __init__(self, terms: tuple[tuple[Tensor, Callable[[Tensor, Tensor], Tensor]], ...]) -> None:
        self.terms = terms

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Add as the model does: in place, where it writes the sum into one of the terms."""
        value = super().__torch_function__(func, types, args, kwargs)
        in_place = getattr(func, "__name__", "") in ("add_", "__iadd__") and isinstance(value, Tensor)
        return args[0].copy_(value) if in_place and isinstance(args[0], Tensor) else value

    def meet(self, left: Any, right: Any) -> Any:
        """Join every branch of the sum with the other operand; branches alone wait for it together."""
        other = right if left is self else left
        if isinstance(other, Joining):
            return Joining(self.terms + other.terms)
        if isinstance(other, Absent):
            return other.meet(self, other)
        for branch, join in self.terms:
            other = join(other, branch)
        return other

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name, None)
        if name.startswith("__") or name == "terms" or len(self.terms) != 1:
            raise AttributeError(name)
        if callable(method):
            return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)
        return getattr(self.terms[0][0], name)

    def pass_through(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Apply the operation to the branch end itself, and go on waiting."""
        if len(self.terms) != 1:
            raise AbsentError("operations between the branches of one sum and its addition are not supported here")
        branch, join = self.terms[0]
        args, kwargs = tree_map_only(Joining, lambda _: branch, (args, kwargs))
        return Joining(((func(*args, **kwargs), join),))


def absent_like(template: Any, pending: float, clone: bool) -> Any:
    """Build what a closed module returns: its recorded output with an Absent for every tensor.

    ``template`` is ``"absent"``, None, or a list ``[kind, item, …]`` with kind ``tuple`` or ``list``.
    """
    if template == "absent":
        return Absent(pending, clone)
    if template is None:
        return None
    items = (absent_like(item, pending, clone) for item in template[1:])
    return tuple(items) if template[0] == "tuple" else list(items)


def template_of(output: Any) -> Any:
    """Read the template off a module's output; raises ``TypeError`` for outputs it cannot describe."""
    if isinstance(output, Tensor):
        return "absent"
    if output is None:
        return None
    if type(output) in (tuple, list):
        return [type(output).__name__, *(template_of(item) for item in output)]
    raise TypeError(f"a branch module returns a {type(output).__name__}")
