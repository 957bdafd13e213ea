"""A branch computed on some samples of a batch: its values on their way to the addition, seen by every operation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from resect.blocks.axes import Axes, Place, arguments, is_leaf
from resect.blocks.carried import Carried, is_in_place
from resect.blocks.inflight import AbsentError, InFlight
from resect.blocks.rows import Rows
from resect.blocks.template import map_tensors
from resect.errors import AttachError


class Cut(Carried):
    """A value of some rows of the batch: operations on it are carried out on those rows, its addition adds to them."""

    def __init__(self, value: Tensor, rows: Rows, pending: float, axes: Axes) -> None:
        super().__init__(((value, rows),), pending)
        self.axes = axes

    @property
    def rows(self) -> Rows:
        """The rows that this value holds."""
        return self.terms[0][1]  # type: ignore[return-value]

    def meet(self, func: Callable[..., Any], left: Any, right: Any, kwargs: dict[str, Any]) -> Any:
        """Add to the rows of the other operand; in place where the model does."""
        if not self.pending and isinstance(left, Tensor) and is_in_place(func) and self.rows.count < self.rows.samples:
            sign = -1 if "sub" in func.__name__ else 1
            return self.rows.join_(left, self.terms[0][0], sign * kwargs.get("alpha", 1))
        return super().meet(func, left, right, kwargs)

    def pass_through(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Apply the operation to these rows, also of tensors from outside, and go on waiting."""
        others = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, InFlight)]
        if any(not isinstance(other, Cut) or other.rows is not self.rows for other in others):
            raise AbsentError("the values of two branches meet before either meets its shortcut")
        output = on_rows(func, (getattr(func, "__name__", str(func)),), self.rows, self.axes, args, kwargs)
        pending = min(other.pending for other in others)  # type: ignore[attr-defined]
        return map_tensors(output, lambda value: Cut(value, self.rows, pending, self.axes))


def call_on_rows(
    function: Callable[..., Any],
    where: Place,
    rows_of: Callable[[int, Any], Rows],
    axes: Axes,
    pending: float,
    args: Any,
    kwargs: Any,
) -> Any:
    """Call a module of a branch on the rows that ``rows_of(samples, device)`` says, of everything it is given.

    A module that is given nothing of the batch (a table of positions) runs as it is.
    """
    leaves = arguments(where, args, kwargs)
    flying: list[Any] = [leaf for _, leaf in leaves if isinstance(leaf, InFlight)]
    if any(not isinstance(leaf, Cut) or leaf.axes is not axes or leaf.rows is not flying[0].rows for leaf in flying):
        raise AbsentError(f"a value of another branch, which was not computed in full, enters {where[0]!r}")
    rows = flying[0].rows if flying else _rows_of(leaves, where, rows_of, axes)
    if rows is None:
        return function(*args, **kwargs)
    output = on_rows(function, where, rows, axes, args, kwargs)
    return map_tensors(output, lambda value: Cut(value, rows, pending, axes))


def _rows_of(leaves: list[tuple[Place, Any]], where: Place, rows_of: Callable[[int, Any], Rows], axes: Axes) -> Any:
    """Return the rows for a module that is given whole tensors; None if nothing of them is of the batch."""
    tensors = [(place, leaf) for place, leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim]
    found = {size: leaf.device for place, leaf in tensors if (size := axes.samples(place, leaf)) is not None}
    if len(found) > 1:
        found.pop(1, None)  # one row for all samples
    if len(found) > 1 or not (found or all(axes.known(place) for place, _ in tensors)):
        raise AttachError(
            f"{where[0]!r} is called with {[tuple(leaf.shape) for _, leaf in tensors]}, otherwise than on the example, "
            'so the samples that it drops cannot be left out. Use compute="mask", or find the blocks on an example '
            "like the batches."
        )
    return rows_of(*found.popitem()) if found else None


def on_rows(function: Callable[..., Any], where: Place, rows: Rows, axes: Axes, args: Any, kwargs: Any) -> Any:
    """Call a function of values in flight, which hold some rows, and of tensors from outside, cut to the same rows.

    Where it cannot be told whether one of those has a batch axis, the function runs on as many samples as they have:
    what is computed then is what is right either way.
    """
    leaves = arguments(where, args, kwargs)
    each = [axes.each(place, leaf, rows) if isinstance(leaf, Tensor) else 0 for place, leaf in leaves]
    whole = None in each and rows.count != rows.samples
    taken: dict[int, Tensor] = {}  # one tensor given twice stays one: attention asks whether key and query are the same

    def given(leaf: Any, each: int | None) -> Any:
        if isinstance(leaf, InFlight):
            value = leaf.terms[0][0]  # type: ignore[attr-defined]
            return rows.spread(value) if whole and value.ndim and len(value) == rows.count else value
        if not each or whole:
            return leaf
        if id(leaf) not in taken:
            taken[id(leaf)] = rows.take(leaf, each)
        return taken[id(leaf)]

    values = iter([given(leaf, count) for (_, leaf), count in zip(leaves, each, strict=True)])

    def rebuilt(argument: Any) -> Any:
        return next(values) if is_leaf(argument) else tree_map(lambda _: next(values), argument)

    output = function(*[rebuilt(value) for value in args], **{name: rebuilt(value) for name, value in kwargs.items()})
    if not whole:
        return output
    return map_tensors(output, lambda value: rows.take(value) if value.ndim and len(value) == rows.samples else value)
