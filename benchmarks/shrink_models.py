"""The models that `shrink.py` cuts, with random weights: what they cost needs no training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model, and a batch of what it takes."""

    name: str
    model: nn.Module
    example: Callable[[int], Tensor]


def images(size: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, 3, size, size)


def llama(layers: int, width: int, length: int) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=1024,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=length,
            use_cache=False,
        )
    )


def cases(quick: bool) -> list[Case]:
    """ResNet-50, ResNet-18 at 64 px, ViT-S and a 12-layer language model; ``quick``: all smaller, no ResNet-18."""
    torch.manual_seed(0)
    size, patches, width, length = (64, 96, 192, 32) if quick else (224, 224, 384, 128)
    kind = "vit_tiny" if quick else "vit_small"
    vit = timm.create_model(f"{kind}_patch16_224", img_size=patches)
    made = [
        Case("resnet50", torchvision.models.resnet50(), images(size)),
        Case("resnet18 at 64 px", torchvision.models.resnet18(), images(64)),
        Case(kind, vit, images(patches)),
        Case("llama of 12 layers", llama(12, width, length), lambda batch: torch.randint(0, 1024, (batch, length))),
    ]
    for case in made:
        settle(case)
    return [case for case in made if not (quick and "resnet18" in case.name)]


def settle(case: Case) -> None:
    """Fit BatchNorms to one batch, so that activations keep the size that they have in a trained net."""
    for module in case.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    with torch.no_grad():
        case.model.train()(case.example(8))
    case.model.eval()


def twins() -> list[tuple[str, nn.Module, list[str], nn.Module, Tensor]]:
    """Models, the layers to cut, and the model built without them: they must do the same."""
    x = torch.randn(2, 3, 64, 64)

    def vit(depth: int) -> nn.Module:
        return timm.create_model("vit_small_patch16_224", img_size=64, depth=depth)

    return [
        ("timm resnet50, layers 2 3 4 2", timm.create_model("resnet50"), ["layer1.2", "layer2.3", "layer3.4",
         "layer3.5", "layer4.2"], timm.create_model("resnet50", layers=[2, 3, 4, 2]), x),
        ("timm vit_small, depth 8", vit(12), [f"blocks.{i}" for i in (3, 5, 6, 10)], vit(8), x),
        ("transformers Llama, 9 layers", llama(12, 64, 16), [f"model.layers.{i}" for i in (4, 7, 8)],
         llama(9, 64, 16), torch.randint(0, 1024, (2, 16))),
    ]  # fmt: skip
