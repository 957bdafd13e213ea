"""Whether a run leaves everything as it was: then, and only then, part of it may be left out the next time."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from resect.blocks.forms import same
from resect.blocks.gate import held
from resect.blocks.state import PORT, Gate
from resect.blocks.units import is_sharded
from resect.blocks.unwrap import is_compiled, unwrap

_DEPTH = 4  # of containers and objects inside a module's attributes
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")


def why_not_still(model: nn.Module, own: list[Gate]) -> str:
    """Say why no call of a model may be left out, as far as that can be told without running it; "" if none is known.

    ``own`` are the gates that are ours.
    """
    if unwrap(model) is not model:
        return f"the model is inside a {type(model).__name__}"
    if is_sharded(model):
        return "the model is sharded, and every process must gather its parts"
    others = [gate for gate in held(model) if all(gate is not mine for mine in own) and gate.acts]
    if any(gate.changes or gate.takes_over for gate in others):  # it may count, or look at what passes
        return f"{others[0].holder} acts on the model"
    if any(getattr(torch_module, name) for name in _GLOBAL_HOOKS):
        return "there are hooks on all modules"
    for name, module in model.named_modules():
        if is_compiled(module) or type(module).__name__ == "OptimizedModule":
            return f"{name or 'the model'!r} is compiled"
        if "_hf_hook" in vars(module) or (name and any(getattr(module, hooks) for hooks in _HOOKS)):
            return f"{name or 'the model'!r} has hooks"
    return ""


def why_moved(before: list[Any], after: list[Any]) -> str:
    """Say what a run has changed, given `state_of` before and after it; "" if nothing."""
    for (name, one), (other_name, other) in zip(before, after, strict=False):
        if name != other_name or not same(one, other):
            return f"a run changes {name}" if name == other_name else f"a run changes {name} or {other_name}"
    return "" if len(before) == len(after) else "a run adds attributes to modules"


def state_of(model: nn.Module) -> list[tuple[str, Any]]:
    """Return all that a run might change and another might see: attributes, versions of tensors, random states."""
    found: list[tuple[str, Any]] = []
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key not in (PORT, "_modules"):
                found += ((f"{name}.{key}" if name else key, item) for item in _look(value, _DEPTH))
    found += (("the random state", state) for state in _random_states())
    return found


def _look(value: Any, depth: int) -> Iterator[Any]:
    yield value if not isinstance(value, (list, tuple, dict, set)) else (type(value), len(value))
    if isinstance(value, Tensor):
        yield value._version
    elif isinstance(value, nn.Module) or not depth or callable(value):
        return
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _look(item, depth - 1)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _look(item, depth - 1)
    elif hasattr(value, "__dict__"):
        yield from _look(vars(value), depth - 1)


def _random_states() -> Iterator[Any]:
    yield torch.get_rng_state().numpy().tobytes() if "numpy" in sys.modules else torch.get_rng_state().tolist()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        yield [state.tolist() for state in torch.cuda.get_rng_state_all()]
    yield random.getstate()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        kind, keys, *rest = numpy.random.get_state()
        yield [kind, keys.tobytes(), *rest]
