"""A value that was not computed.

While a block is closed, its modules return an ``Absent`` and the user's own forward code keeps running:
every operation on an Absent gives an Absent, until the block's addition, where ``x + Absent`` is ``x``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map_only

from resect.blocks.block import ResidualBlock
from resect.blocks.inflight import DIFFERENCES, AbsentError, InFlight, in_flight
from resect.blocks.making import makes

_JOINED = frozenset({"cat", "concat", "concatenate"})
_OF_A_VALUE = frozenset({"item", "tolist", "numpy", "data_ptr", "backward", "storage", "untyped_storage"})
_OF_A_SHAPE = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "is_contiguous",
     "is_floating_point", "is_complex", "get_device", "shape", "ndim", "dtype", "layout", "is_cuda", "is_sparse",
     "requires_grad", "is_nested", "is_quantized", "names", "itemsize", "nbytes", "is_meta", "is_mps", "is_cpu"}
)  # fmt: skip


class Absent(InFlight):
    """A value that was not computed.

    ``pending`` additions inside the branch still swallow their operand; at 0 the next addition is the
    block's own and gives the other operand. ``source``, a function and its arguments, tells the shape where the
    model asks for it: it is then run without data, on the meta device.
    """

    def __init__(
        self, pending: float, block: ResidualBlock, training: bool = False, source: tuple[Any, ...] | None = None
    ) -> None:
        self.pending = pending
        self.block = block
        self.training = training
        self.source = source

    def meet(self, func: Callable[..., Any], left: Any, right: Any, kwargs: dict[str, Any]) -> Any:
        """``x + Absent`` is ``x`` at the block's own addition, an Absent before it."""
        other: Any = right if left is self else left
        name = getattr(func, "__name__", "")
        if not isinstance(other, (Tensor, InFlight)):
            return self  # a number changes no value that was not computed
        in_place = name.endswith("_") and name not in ("__add__", "__radd__", "__sub__")
        nearest = other if isinstance(other, Absent) and other.pending < self.pending else self
        if nearest.pending or isinstance(other, Absent):
            value = nearest._after(func, (left, right), kwargs, 1) if nearest.pending else nearest
            if not (in_place and isinstance(left, Absent)):
                return value
            left.pending = value.pending  # the model may drop the result and go on with what was written
            return left
        if left is not self:
            # Written in place it stays where the model expects it.
            return other if in_place else self._alone(other)
        shortcut: Any = other
        value = self._alone(-shortcut if name in DIFFERENCES else shortcut)
        if name in ("add_", "sub_", "subtract_"):
            self.result = value
        return value

    def _alone(self, shortcut: Any) -> Any:
        """Return the shortcut as the sum: a copy where the sum is written later, or lies closer in memory."""
        if not isinstance(shortcut, Tensor):
            return shortcut
        if _has_gaps(shortcut):
            return shortcut.clone()
        # In train mode the sum may be written where the trace, in eval mode, saw no write (in-place dropout).
        return copied(shortcut) if self.block.clone or self.training else shortcut

    def _after(self, func: Any, args: Any, kwargs: Any, additions: int = 0) -> Absent:
        return Absent(self.pending - additions, self.block, self.training, (func, args, kwargs))

    def pass_through(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Nothing is computed from a value that was not computed."""
        name = getattr(func, "__name__", str(func))
        absents = [value for value in in_flight(args, kwargs) if isinstance(value, Absent)]
        nearest = min(absents, key=lambda absent: absent.pending)
        if args and (name == "__setitem__" or _writes(name)):
            if isinstance(args[0], Tensor):
                return nearest._written_into(args[0])
            if isinstance(args[0], Absent):
                args[0].pending = nearest.pending
        if (
            nearest.block.zeros
            and name in _JOINED
            and any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        ):
            args, kwargs = tree_map_only(Absent, Absent.as_zeros, (args, kwargs))
            return func(*args, **kwargs)
        return nearest._after(func, args, kwargs)

    def _written_into(self, target: Tensor) -> Any:
        """Write nothing; what is made for this branch alone is then not computed either."""
        if not (self.block.spreads and makes(self.block.name, target)):
            if (found := _unwritten.get()) is not None:
                found.append(target)
            return target
        for tensor in (target._base, target):
            if tensor is not None:
                shape, dtype = tuple(tensor.shape), tensor.dtype
                tensor.__class__ = Spoiled
                tensor.absent = absent_of_shape(self.pending, self.block, self.training, shape, dtype)  # type: ignore[attr-defined]
        return target.absent  # type: ignore[attr-defined]

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
                with torch.no_grad(), _OnMeta():
                    found = func(*args, **kwargs)
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
        """Part of a value that was not computed is not computed either, and has as many additions before it."""
        if isinstance(value, Absent):
            self.pending = min(self.pending, value.pending)

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
        return _again, (self.pending, self.block, self.training, shape)


def _again(pending: float, block: ResidualBlock, training: bool, shape: Any) -> Absent:
    return absent_of_shape(pending, block, training, *shape) if shape else Absent(pending, block, training)


def absent_of_shape(
    pending: float, block: ResidualBlock, training: bool, shape: tuple[int, ...], dtype: torch.dtype
) -> Absent:
    """Return an Absent that knows its shape."""
    return Absent(pending, block, training, (torch.empty, (shape,), {"dtype": dtype, "device": "meta"}))


class Spoiled(Tensor):
    """A tensor into which a value was written that was not computed: every operation takes it for one too."""

    absent: Absent

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Go on with the absent value; what only concerns the form is answered by the tensor."""
        name = getattr(func, "__name__", "")
        if name in _OF_A_SHAPE or name == "__get__":
            with torch._C.DisableTorchFunctionSubclass():
                found = func(*args, **(kwargs or {}))
            if not isinstance(found, Tensor):
                return found
        args, kwargs = tree_map_only(Spoiled, lambda tensor: tensor.absent, (args, kwargs or {}))
        return Absent.__torch_function__(func, types, args, kwargs)


_unwritten: ContextVar[list[Tensor] | None] = ContextVar("unwritten", default=None)


@contextmanager
def unwritten() -> Iterator[list[Tensor]]:
    """Collect the tensors of others into which a closed branch would have written its state."""
    found: list[Tensor] = []
    token = _unwritten.set(found)
    try:
        yield found
    finally:
        _unwritten.reset(token)


def on_meta(value: Any) -> Any:
    """Return a tensor, or a value that was not computed, without data."""
    return value.twin() if isinstance(value, Absent) else value.detach().to("meta")


class _OnMeta(TorchFunctionMode):
    """Run functions on meta tensors, where nothing has a device of its own and strides are not those of real ones."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("cpu", "cuda", "contiguous"):
            return args[0]
        if name == "to":
            args = tuple(arg for arg in args if not isinstance(arg, (torch.device, str)))
            kwargs = {key: value for key, value in kwargs.items() if key != "device"}
            if len(args) == 1 and not kwargs:
                return args[0]
        if name == "view" and len(args) > 1 and not isinstance(args[1], torch.dtype):
            func = Tensor.reshape  # another kernel than the real one may have left other strides
        return func(*args, **kwargs)


def copied(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor: one whose data is copied when either is first written, where that is safe.

    Most sums are never written, and then a closed block moves no data at all. Only values made in this forward pass
    are shared like that: others may hold the memory of an input or a parameter (numpy, another process), and on an
    accelerator other streams.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return tensor.clone()  # what is recorded here may have to run elsewhere
    made = tensor._base if tensor._base is not None else tensor
    known = type(tensor) is Tensor and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not known or made.grad_fn is None or torch._C._functorch.peek_interpreter_stack() is not None:
        return tensor.clone()
    if tensor.untyped_storage().nbytes() > 2 * tensor.nbytes:
        return tensor.clone()  # a slice would keep the whole
    lazily: Tensor = torch._lazy_clone(tensor)
    return lazily


def _has_gaps(tensor: Tensor) -> bool:
    """Whether a tensor is a slice with gaps: a sum has none, and another layout may mean other rounding later."""
    if tensor.layout != torch.strided or tensor.is_contiguous():
        return False
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return extent != tensor.numel()


def _writes(name: str) -> bool:
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place or name in ("__imul__", "__itruediv__", "__ipow__", "__iand__", "__ior__")
