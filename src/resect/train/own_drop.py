"""Layer dropping that a model brings along: found, so that it never acts beside a method unnoticed."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, Literal

from torch import nn

from resect.errors import AttachError

OwnDrop = Literal["refuse", "replace"]

# How a class's name ends -> the attribute with its probability: timm, transformers (SwinDropPath), torchvision, others.
_MODULES = {"DropPath": "drop_prob", "StochasticDepth": "p", "DropPath2d": "drop_prob", "LayerDrop": "p"}
_CONFIG = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")

Found = list[tuple[str, Any, str, float]]
"""(where, object, attribute, probability) of everything that drops"""


def find_own_drop(model: nn.Module) -> Found:
    """Return every module or setting of the model that drops branches or layers in train mode."""
    found: Found = []
    configs: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        wanted = [attribute for end, attribute in _MODULES.items() if type(module).__name__.endswith(end)]
        for attribute in [*wanted, "layerdrop"]:
            value = getattr(module, attribute, None)
            if isinstance(value, float) and value > 0:
                found.append((f"{name}.{attribute}" if name else attribute, module, attribute, value))
        config = getattr(module, "config", None)
        if config is not None and not isinstance(config, (dict, nn.Module)):
            configs.setdefault(id(config), (f"{name}.config" if name else "config", config))
    for where, config in configs.values():
        for attribute in _CONFIG:
            value = getattr(config, attribute, None)
            if isinstance(value, float) and value > 0:
                found.append((f"{where}.{attribute}", config, attribute, value))
    return found


_off: dict[tuple[int, str], list[Any]] = {}
"""What is switched off now: (id of the object, attribute) -> object, probability, number of methods that want it so."""


def take_over(model: nn.Module, own_drop: OwnDrop, name: str, undo: ExitStack) -> None:
    """Refuse a model that drops branches itself, or switch that off until ``undo``; the last method gives it back."""
    found = find_own_drop(model)
    if found and own_drop == "refuse":
        where, _, _, value = found[-1]
        raise AttachError(
            f"This model drops branches of its own ({len(found)} places, for instance {where} = {value:g}), and {name} "
            "would act on top of that. Pass own_drop='replace' to switch the model's own off while the method is "
            "attached, or build the model without (timm: drop_path_rate=0)."
        )
    for _, holder, attribute, value in found:
        _off.setdefault((id(holder), attribute), [holder, value, 0])[1] = value
        setattr(holder, attribute, 0.0)
    mine = {id(module) for module in model.modules()} | {id(getattr(m, "config", None)) for m in model.modules()}
    for key, entry in list(_off.items()):
        if key[0] in mine:
            entry[2] += 1
            undo.callback(_give_back, key)


def _give_back(key: tuple[int, str]) -> None:
    entry = _off[key]
    entry[2] -= 1
    if not entry[2]:
        setattr(entry[0], key[1], entry[1])
        del _off[key]
