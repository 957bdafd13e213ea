"""A computed branch on its way to its addition, where a function or another way of joining takes over."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from resect.blocks.absent import Absent
from resect.blocks.inflight import AbsentError, InFlight
from resect.blocks.rows import Rows
from resect.blocks.state import Acting


def is_in_place(func: Callable[..., Any]) -> bool:
    """Whether a sum is written into its first operand."""
    name = getattr(func, "__name__", "")
    return (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


class Carried(InFlight):
    """A value whose every operation is carried out, until its addition: there its gates act.

    Branches of one sum that meet before the shortcut does wait for it together, as several ``terms``.
    """

    def __init__(self, terms: tuple[tuple[Tensor, Acting | Rows], ...], pending: float = 0) -> None:
        self.terms = terms
        self.pending = pending

    def meet(self, func: Callable[..., Any], left: Any, right: Any, kwargs: dict[str, Any]) -> Any:
        """Join every branch of the sum with the other operand."""
        other: Any = right if left is self else left
        if not isinstance(other, (Tensor, InFlight)):
            return self.pass_through(func, (left, right), kwargs)
        if self.pending:
            if isinstance(other, Absent):
                raise AbsentError("a closed branch meets an open one before either meets its shortcut")
            carried = self.pass_through(func, (left, right), kwargs)
            carried.pending -= 1
            if is_in_place(func) and isinstance(left, Carried):  # the model may drop the result and go on with this
                left.pending = carried.pending
            return carried
        if isinstance(other, Carried):
            return Carried(self.terms + other.terms)
        if isinstance(other, Absent):
            return other.meet(func, left, right, kwargs)
        name = getattr(func, "__name__", "")
        sign, alpha = (-1 if "sub" in name else 1), kwargs.get("alpha", 1)
        value: Any = other
        if left is self and (sign != 1 or alpha != 1):
            value = other * (sign * alpha)
        for branch, acting in self.terms:
            changed = acting.change(branch)
            value = acting.join(value, changed if left is self or sign * alpha == 1 else changed * (sign * alpha))
        in_place = is_in_place(func)
        if in_place and left is self:
            self.result = value
        return left.copy_(value) if in_place and isinstance(left, Tensor) else value

    def pass_through(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Apply the operation to the branch's value itself, and go on waiting."""
        carried = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Carried)]
        if any(isinstance(leaf, Absent) for leaf in tree_leaves((args, kwargs))):
            raise AbsentError("a closed branch meets an open one before either meets its shortcut")
        if len(self.terms) != 1 or any(other.terms[0][1] is not self.terms[0][1] for other in carried):
            raise AbsentError("operations between the branches of one sum and its addition are not supported here")
        acting, pending = self.terms[0][1], min(other.pending for other in carried)
        args, kwargs = tree_map_only(Carried, lambda value: value.terms[0][0], (args, kwargs))
        output = func(*args, **kwargs)
        return tree_map_only(Tensor, lambda value: Carried(((value, acting),), pending), output)

    def __getattr__(self, name: str) -> Any:
        method = getattr(torch.Tensor, name, None)
        if name.startswith("__") or name in ("terms", "pending") or len(self.terms) != 1:
            raise AttributeError(name)
        if callable(method):
            return lambda *args, **kwargs: self._called(method, args, kwargs)
        return getattr(self.terms[0][0], name)

    def _called(self, method: Any, args: Any, kwargs: Any) -> Any:
        return self.__torch_function__(method, (), (self, *args), kwargs)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._called(Tensor.__setitem__, (key, value), {})

    def __len__(self) -> int:
        return len(self.terms[0][0])

    def __iter__(self) -> Any:
        return (self[place] for place in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self.terms[0][0])
