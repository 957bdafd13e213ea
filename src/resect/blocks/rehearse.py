"""Runs around the recorded one: whether the example fits the model, and whether the model repeats itself."""

from __future__ import annotations

import dataclasses
import sys
import traceback
from itertools import pairwise, zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from resect.blocks.example import Example, device_of
from resect.blocks.trace import Trace
from resect.errors import BlocksError, InputError, ResectError


def run_once(model: nn.Module, example: Example) -> Any:
    """Run the model as a user would, which fills lazy caches; return its output. Call it inside ``quiet``.

    Raises ``InputError``, with the model's own error as cause, for an example that does not fit, and for an
    output without tensors.
    """
    torch.manual_seed(0)
    try:
        output = example.run(model)
    except ResectError:
        raise
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot run on this example ({example}): {type(error).__name__}: {error} "
            f"({_raised_in(model, error)}). {_hint(model, example, error)}"
        ) from error
    if not tensors_in(output):
        raise InputError(
            f"{type(model).__name__} returns no tensor on this example but {type(output).__name__}, so nothing can be "
            "compared. Pass a model whose forward returns tensors (in tuples, lists, mappings or dataclasses)."
        )
    return output


def tensors_in(output: Any) -> list[Tensor]:
    """Return every tensor of a model's output, in order; dataclasses are looked into too."""
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)])
    return found


def check_repeats(model: nn.Module, example: Example, trace: Trace, output: Any) -> None:
    """Raise ``BlocksError`` unless another run does what the recorded one did; show the first difference.

    ``output`` is what ``run_once`` returned. Costs one run where all is well, two where the model draws random
    numbers: its operations must not hang on them. Call it inside ``quiet``.
    """
    random = _random_state(model, seed=0)
    steps, again = _stream(model, example, seed=0)
    # The recorder keeps every tensor alive, which makes torch detach new ones.
    recorded = [node.op for node in trace.nodes if node.op not in ("", "aten::detach")]
    runs = [steps]
    if _random_state(model) != random:
        runs.append(_stream(model, example, seed=1)[0])
    if any([step[0] for step in run if step[0] != "aten::detach"] != recorded for run in runs):
        # Being recorded may itself change what a model does: only runs observed alike count.
        runs += [_stream(model, example, seed)[0] for seed in (0, 1)]
        for first, second in pairwise(runs):
            _raise_at_difference(model, first, second, "does not run the same operations every time")
    # Torch's random numbers are the same for one seed; numpy's, Python's, and what the model remembers are not.
    if not _equal(output, again):
        (first, left), (second, right) = (_stream(model, example, seed=0, values=True) for _ in range(2))
        if not _equal(left, right):
            _raise_at_difference(model, first, second, "gives another output every time")
            raise BlocksError(f"{type(model).__name__} gives another output every time. {_STEADY}.")


def _random_state(model: nn.Module, seed: int | None = None) -> list[bytes]:
    """Return the state of torch's generators, after seeding them where a seed is given."""
    if seed is not None:
        torch.manual_seed(seed)
    device = device_of(model)
    states = [torch.get_rng_state()]
    if device is not None and device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return [state.numpy().tobytes() for state in states]


_STEADY = (
    "Blocks are found and proven by running the model several times, so it must repeat itself: in eval mode, with the "
    "same seed of torch's generator, the same operations and the same numbers. Look for random numbers from another "
    "source, a coin thrown in eval mode too, and state that each call changes (a growing cache: use_cache=False)"
)

_Step = tuple[str, str, Any]
"""(operation, the module that ran it, what came out)"""


class _Stream(TorchDispatchMode):
    """Note every operation, where it ran, and where ``values`` are wanted what came out."""

    def __init__(self, model: nn.Module, values: bool) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self._names = _names(model)
        self._values = values

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        op = func._schema.name
        # What stands in memory that nobody has written yet says nothing.
        value = _digest(output) if self._values and "empty" not in op else None
        self.steps.append((op, self._where(), value))
        return output

    def _where(self) -> str:
        frame = sys._getframe(2)
        while frame is not None:
            if frame.f_code.co_varnames[:1] == ("self",):
                name = self._names.get(id(frame.f_locals.get("self")))
                if name is not None:
                    return name
            frame = frame.f_back  # type: ignore[assignment]
        return "the model"


def _names(model: nn.Module) -> dict[int, str]:
    return {id(module): repr(name) if name else type(model).__name__ for name, module in model.named_modules()}


def _stream(model: nn.Module, example: Example, seed: int, values: bool = False) -> tuple[list[_Step], Any]:
    here = example.to(device_of(model))
    torch.manual_seed(seed)
    stream = _Stream(model, values)
    with stream:
        output = model(*here.args, **here.kwargs)
    return stream.steps, output


def _raise_at_difference(model: nn.Module, first: list[_Step], second: list[_Step], what: str) -> None:
    for number, (left, right) in enumerate(zip_longest(first, second)):
        if left == right:
            continue
        if left and right and left[0] == right[0] and left[1] == right[1]:
            seen = f"{left[0]} in {left[1]} gave other values"
        else:
            seen = f"{_told(left)} in one run and {_told(right)} in the next"
        raise BlocksError(f"{type(model).__name__} {what}: operation {number} was {seen}. {_STEADY}.")


def _told(step: _Step | None) -> str:
    return f"{step[0]} in {step[1]}" if step else "none (it had ended)"


def _digest(output: Any) -> Any:
    found = []
    for tensor in tree_leaves(output):
        if isinstance(tensor, Tensor):
            try:
                plain = torch.view_as_real(tensor) if tensor.is_complex() else tensor
                found.append((tuple(tensor.shape), str(plain.double().sum().item())))
            except (RuntimeError, NotImplementedError):  # on meta, or of a kind without sums
                found.append((tuple(tensor.shape), ""))
    return found


def _equal(left: Any, right: Any) -> bool:
    pairs = list(zip_longest(tensors_in(left), tensors_in(right)))
    if any(a is None or b is None or a.shape != b.shape or a.dtype != b.dtype for a, b in pairs):
        return False
    try:
        return all(a.is_meta or bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)
    except RuntimeError:  # tensors of a kind that cannot be compared
        return True


def _raised_in(model: nn.Module, error: BaseException) -> str:
    """Say in which module of the model an error was raised."""
    names = _names(model)
    where, kind = type(model).__name__, ""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            where, kind = names[id(module)], type(module).__name__
    return f"raised in {where}" + (f", a {kind}" if kind and where != kind else "")


def _hint(model: nn.Module, example: Example, error: Exception) -> str:
    """Say what to do about an example that does not fit."""
    if any(parameter.is_meta for parameter in model.parameters()) and "meta" in str(error):
        return (
            "The model is on the meta device, where nothing has a value, and it asks for one: leave out the argument "
            "or option that makes it (attention_mask and use_cache=False do in transformers), or find the blocks of a "
            "small version with weights: the names are the same."
        )
    given = example.tensors()
    wanted = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    floats = [tensor for tensor in given if tensor.is_floating_point()]
    if isinstance(error, TypeError) and "positional argument" in str(error) and "missing" not in str(error):
        return (
            "A tuple is the model's positional arguments. If this is a batch of inputs and targets, pass the inputs "
            "alone: batch[0]."
        )
    if "indices" in str(error) and floats:
        return "The model looks up indices: pass whole numbers, for instance torch.randint(0, 100, (2, 16))."
    if wanted is not None and any(tensor.dtype != wanted for tensor in floats):
        other = next(str(tensor.dtype) for tensor in floats if tensor.dtype != wanted)
        return f"The model's weights are {wanted} and the example is {other}: pass example.to({wanted})."
    if wanted is not None and given and not floats and "dtype" in str(error):
        return f"The model's weights are {wanted} and the example holds whole numbers: pass example.to({wanted})."
    return "Pass what you would call the model with, for instance torch.randn(2, 3, 224, 224)."
