"""torch.nn: the transformer modules that come with PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import resect

from .family import Family, lively

WIDTH, HEADS = 16, 2


def _seeded(make: Callable[[], tuple[nn.Module, Any]]) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        model, example = make()
        return lively(model), example

    return build


def _words(first: bool = True) -> Tensor:
    return torch.randn(2, 5, WIDTH) if first else torch.randn(5, 2, WIDTH)


def _layer(kind: type[nn.Module], norm_first: bool = False, batch_first: bool = True) -> nn.Module:
    return kind(WIDTH, HEADS, 32, norm_first=norm_first, batch_first=batch_first)


def _encoder(norm_first: bool, batch_first: bool = True) -> tuple[nn.Module, Any]:
    layer = _layer(nn.TransformerEncoderLayer, norm_first, batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), _words(batch_first)  # type: ignore[arg-type]


def _masked() -> tuple[nn.Module, Any]:
    hidden = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    return _encoder(False)[0], resect.Example((_words(),), {"src_key_padding_mask": hidden})


def _decoder(norm_first: bool) -> tuple[nn.Module, Any]:
    return nn.TransformerDecoder(_layer(nn.TransformerDecoderLayer, norm_first), 2), (_words(), _words())  # type: ignore[arg-type]


def _whole(norm_first: bool) -> tuple[nn.Module, Any]:
    return nn.Transformer(WIDTH, HEADS, 2, 2, 32, norm_first=norm_first, batch_first=True), (_words(), _words())


def _second(example: Any) -> Any:
    return example.repeat(1, 2, 1)


FAMILIES: tuple[Family, ...] = (
    Family("torch", "Transformer", _seeded(lambda: _whole(False)), 10,
           "Vaswani et al. 2017, Figure 1: 2 x 2 + 2 x 3", weight="high"),
    Family("torch", "Transformer, norm first", _seeded(lambda: _whole(True)), 10, "2 x 2 + 2 x 3", weight="high"),
    Family("torch", "TransformerEncoder", _seeded(lambda: _encoder(False)), 4, "2 layers x 2", weight="high"),
    Family("torch", "TransformerEncoder, norm first", _seeded(lambda: _encoder(True)), 4, "2 layers x 2",
           weight="high"),
    Family("torch", "TransformerEncoder, batch second", _seeded(lambda: _encoder(True, False)), 4, "2 layers x 2",
           batch=_second),
    Family("torch", "TransformerEncoder, padded", _seeded(_masked), 4, "2 layers x 2", weight="middle"),
    Family("torch", "TransformerDecoder", _seeded(lambda: _decoder(False)), 6, "2 layers x 3", weight="middle"),
    Family("torch", "TransformerDecoder, norm first", _seeded(lambda: _decoder(True)), 6, "2 layers x 3"),
    Family("torch", "TransformerEncoderLayer", _seeded(lambda: (_layer(nn.TransformerEncoderLayer), _words())), 2,
           "1 layer x 2"),
)  # fmt: skip
