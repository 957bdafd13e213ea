"""Layer dropping that a model brings along: found, so that it never acts beside a method unnoticed."""

from __future__ import annotations

from typing import Any

from torch import nn

from resect.errors import AttachError

# Class -> the attribute with its probability: timm and transformers, torchvision, other spellings.
_MODULES = {"DropPath": "drop_prob", "StochasticDepth": "p", "DropPath2d": "drop_prob", "LayerDrop": "p"}
_CONFIG = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")

Found = list[tuple[str, Any, str, float]]
"""(where, object, attribute, probability) of everything that drops"""


def find_own_drop(model: nn.Module) -> Found:
    """Return every module or setting of the model that drops branches or layers in train mode."""
    found: Found = []
    configs: dict[int, tuple[str, Any]] = {}
    for name, module in model.named_modules():
        wanted = [_MODULES[type(module).__name__]] if type(module).__name__ in _MODULES else []
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


class SwitchedOff:
    """The model's own dropping, off until ``restore()``."""

    def __init__(self, found: Found) -> None:
        self.found = found
        for _, holder, attribute, _ in found:
            setattr(holder, attribute, 0.0)

    def restore(self) -> None:
        """Give everything its probability back."""
        for _, holder, attribute, value in self.found:
            setattr(holder, attribute, value)


def refuse(found: Found, name: str) -> None:
    """Raise ``AttachError`` if the model drops branches itself."""
    if found:
        where, _, _, value = found[-1]
        raise AttachError(
            f"This model drops branches of its own ({len(found)} places, for instance {where} = {value:g}), and {name} "
            "would drop on top of that. Pass own_drop='replace' to switch the model's own off while the method is "
            "attached, or build the model without (timm: drop_path_rate=0)."
        )
