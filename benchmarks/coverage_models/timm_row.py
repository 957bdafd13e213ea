"""How one row of the timm table becomes a small model."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from .family import Family, Weight, lively

_CLASSES = ("block", "block_fn", "block_layer", "conv_layer", "mlp_layer", "norm_layer", "norm_layers", "token_mixers")
_SLOW = {"botnet26t_256", "halonet26t", "bat_resnext26ts", "sam2_hiera_tiny", "hieradet_small", "tresnet_m", "vgg11_bn"}
_NOT_TRAINED = {"volo_d1_224": "in training its mix-token draws from NumPy's generator"}


def _build(model: str, size: int, cls: str | None, options: dict[str, Any]) -> tuple[nn.Module, Tensor]:
    import timm
    from timm.models._registry import _model_to_module

    home = importlib.import_module("timm.models." + (cls.split(".")[0] if cls else _model_to_module[model]))
    options = {k: _named(home, v) if k in _CLASSES else v for k, v in options.items()}
    torch.manual_seed(0)
    if isinstance(options.get("cfg"), dict):
        net: nn.Module = home.MultiScaleVit(**{**options, "cfg": home.MultiScaleVitCfg(**options["cfg"])})
    else:
        net = getattr(home, cls.split(".")[1])(**options) if cls else timm.create_model(model, **options)
    return lively(net), torch.randn(2, 3, size, size)


def _named(home: Any, value: Any) -> Any:
    if isinstance(value, list):
        return [_named(home, item) for item in value]
    return getattr(home, value) if isinstance(value, str) else value


def _sums(where: str) -> dict[str, int]:
    """Read ``2 x 3 A + 4 B`` as ``{"A": 6, "B": 4}``."""
    found: Counter[str] = Counter()
    for count, each, name in re.findall(r"(\d+)(?: x (\d+))? ([A-Z]\w+)", where):
        found[name] += int(count) * int(each or 1)
    return found


def row(
    name: str,
    size: int,
    published: int,
    where: str,
    *,
    weight: Weight = "low",
    cls: str | None = None,
    model: str | None = None,
    **options: Any,
) -> Family:
    """One family: its name, the side of its pictures, its blocks, and how it is made small.

    ``cls`` is a class of ``timm.models`` to build where the named model takes no smaller sizes.
    """
    return Family(
        "timm",
        name,
        lambda: _build(model or name, size, cls, dict(options)),
        published,
        where,
        residual=published > 0,
        weight=weight,
        sums=_sums(where) if where.startswith("counted") else {},
        trains=_NOT_TRAINED.get(name, ""),
        slow=name in _SLOW,
    )
