"""What the rest of a model counts on from a module that is not run: cache lengths, places in recorded outputs.

A language model reads how many tokens came before off its key-value cache, mostly off the first layer of it;
a closed attention would never write there, and every later token would get the wrong position and mask.
transformers records attention weights in the order in which its modules run; a closed one would shift them.
Everything is recognised by its attributes: nothing here imports transformers.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from resect.blocks.absent import Absent
from resect.errors import AttachError

_CAPTURING = "transformers.utils.output_capturing"
_STATES = frozenset({"update_conv_state", "update_recurrent_state"})
_CROSSING = ("is_cross_attention", "encoder_decoder_attention")  # such attention has a cache of its own
_CROSS = ("key_value_states", "encoder_hidden_states", "cross_attention_states")


@dataclass(frozen=True)
class Upkeep:
    """What a module keeps up besides its output. False where that is nothing; plain data, valid for any copy."""

    layers: tuple[int, ...] = ()
    """Layers of a key-value cache to which it adds keys and values, were it handed one."""
    states: tuple[int, ...] = ()
    """Layers of such a cache in which it keeps a state of fixed size (state-space models, convolutions)."""
    records: tuple[str, ...] = ()
    """Recorded outputs (``attentions`` …) that get an entry each time it runs."""

    @classmethod
    def of(cls, model: nn.Module, name: str) -> Upkeep:
        """Read off a module, by its dotted name, before it is closed or taken out."""
        module = model.get_submodule(name)
        crossing = any(getattr(m, flag, False) for m in module.modules() for flag in _CROSSING)
        kinds: list[tuple[int | None, Any]] = [(_index(m), type(m)) for m in module.modules()]
        indexed = [(index, _calls(kind)) for index, kind in kinds if index is not None]
        layers = {index for index, calls in indexed if "update" in calls and not crossing}
        states = {index for index, calls in indexed if not calls.isdisjoint(_STATES)}
        return cls(tuple(sorted(layers)), tuple(sorted(states)), tuple(_records(model, name)))

    def __bool__(self) -> bool:
        return bool(self.layers or self.states or self.records)

    def shifted(self, by: int) -> Upkeep:
        """Return the same for a module whose layer has moved by so many places."""
        return replace(
            self, layers=tuple(layer + by for layer in self.layers), states=tuple(layer + by for layer in self.states)
        )

    def keep(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Do what the module would have done for others in this call.

        Raises
        ------
        AttachError: the cache is of a kind that cannot grow without keys and values.
        """
        _keep_places(self.records)
        if not (self.layers or self.states) or any(kwargs.get(name) is not None for name in _CROSS):
            return
        values = [kwargs["hidden_states"]] if "hidden_states" in kwargs else []
        values += [*args, *kwargs.values()]
        cache = next((value for value in values if is_cache(value)), None)
        if cache is None:
            given = (value for name, value in kwargs.items() if name.startswith("past_"))
            if (unknown := next(filter(_may_grow, given), None)) is not None:
                raise AttachError(
                    f"A closed attention cannot keep up a {type(unknown).__name__}, a cache of the model's own kind. "
                    "Call the model with use_cache=False."
                )
            return
        hidden = next(value for value in values if isinstance(value, (Tensor, Absent)))
        own = getattr(cache, "self_attention_cache", cache)
        # One module for several layers is told which one it is.
        told = next((value for value in (kwargs.get("layer_idx"), *args) if type(value) is int), 0)
        for index in self.layers:
            _advance(own, index if index >= 0 else told, hidden)
        for index in self.states:
            _mark(own, index)


def _index(module: nn.Module) -> int | None:
    index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
    return index if type(index) is int else None


@functools.cache
def _calls(cls: Any) -> frozenset[str]:
    """Return the names of all attributes that the functions of a class look up: what a class may do to a cache."""
    own = [vars(base).values() for base in cls.__mro__ if base not in (nn.Module, object)]
    functions = [inspect.unwrap(value) for values in own for value in values if inspect.isfunction(value)]
    return frozenset(name for function in functions for name in function.__code__.co_names)


def is_cache(value: Any) -> bool:
    """Say whether an argument is a key-value cache, an encoder-decoder's pair of them included."""
    if isinstance(value, (Tensor, Absent)):
        return False
    own = getattr(value, "self_attention_cache", value)
    return hasattr(own, "layers") and hasattr(own, "update") and hasattr(own, "get_seq_length")


def _may_grow(value: Any) -> bool:
    return not isinstance(value, (Tensor, Absent, dict)) and callable(getattr(value, "update", None))


def _advance(cache: Any, index: int, hidden: Any) -> None:
    """Let one layer of a cache see as many new tokens as ``hidden`` (batch, tokens, width) has.

    The states are zeros of one head of width 1: nobody reads them, but their number is counted (a width
    of 0 would be counted as no token). In a layer that holds real states they have those states' shape.
    """
    layer = cache.layers[index] if index < len(cache.layers) else None
    if layer is not None and not hasattr(layer, "get_seq_length"):
        return
    if hasattr(layer, "q_group_size"):
        raise AttachError(
            f"A closed attention cannot keep the length of a {type(layer).__name__}: it quantises groups of real keys. "
            "Use a DynamicCache, a StaticCache or the fp8 QuantizedCache, or use_cache=False."
        )
    if len(hidden.shape) != 3:
        raise AttachError(
            f"A closed attention cannot tell the number of new tokens from hidden states of shape "
            f"{tuple(hidden.shape)}; it needs (batch, tokens, width). Call the model with use_cache=False."
        )
    states = [_like(getattr(layer, name, None), hidden) for name in ("keys", "values")]
    cache.update(*states, index)


def _mark(cache: Any, index: int) -> None:
    """Let a layer of a cache that has no length, but a state, count as seen before."""
    layer = cache.layers[index] if index < len(cache.layers) else None
    previous = getattr(layer, "has_previous_state", None)
    if isinstance(previous, dict):
        previous.update(dict.fromkeys(previous, True))


def _like(held: Any, hidden: Any) -> Tensor:
    batch, tokens = hidden.shape[:2]
    heads, width = (held.shape[1], held.shape[3]) if isinstance(held, Tensor) and held.dim() == 4 else (1, 1)
    return torch.zeros(batch, heads, tokens, width, dtype=hidden.dtype, device=hidden.device)


def _records(model: nn.Module, name: str) -> Iterator[str]:
    """Yield the recorded outputs that a module, or one inside it, gives an entry to."""
    if _CAPTURING not in sys.modules:
        return
    path, holder, start = name.split("."), None, 0
    for depth in range(len(path)):
        parent = model.get_submodule(".".join(path[:depth]))
        if hasattr(type(parent), "_can_record_outputs"):  # the innermost of transformers' models decides
            holder, start = parent, depth
    recorded: Mapping[str, Any] = getattr(holder, "_can_record_outputs", None) or {}
    place = "." + ".".join(path[start:])
    for inner, module in model.get_submodule(name).named_modules(prefix=place):
        for key, recorders in recorded.items():
            for recorder in recorders if isinstance(recorders, list) else [recorders]:
                if _records_at(recorder, module, inner):
                    yield key


def _records_at(recorder: Any, module: nn.Module, place: str) -> bool:
    """Say whether transformers records at this module; a recorder is a class, a name's end, or an OutputRecorder."""
    target = recorder if isinstance(recorder, type) else getattr(recorder, "target_class", None)
    ending = recorder if isinstance(recorder, str) else getattr(recorder, "class_name", None)
    layer = getattr(recorder, "layer_name", None)
    matches = (target is not None and isinstance(module, target)) or (ending is not None and place.endswith(ending))
    return matches and (layer is None or f".{layer.strip('.')}." in place + ".")


def _keep_places(records: tuple[str, ...]) -> None:
    """Put None where the module's entry would have been, so that the others keep their positions."""
    capturing = sys.modules.get(_CAPTURING) if records else None
    collected = capturing._active_collector.get() if capturing is not None else None
    for key in records:
        if collected is not None and key in collected:
            collected[key].append(None)
