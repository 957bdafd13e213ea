"""The model families of the tests: name -> (model, example batch), small and with visible branches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nets import Net
from torch import Tensor, nn


def visible(model: nn.Module) -> nn.Module:
    """Give every norm and scale values of order 1, so that closing any branch changes the output."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)) and module.weight is not None:
                module.weight.uniform_(0.5, 1.0, generator=generator)
                module.bias.uniform_(-0.2, 0.2, generator=generator)
            if isinstance(module, nn.Linear) and not module.weight.any():
                module.weight.normal_(generator=generator)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.1, 0.1, generator=generator)
                module.running_var.uniform_(0.8, 1.2, generator=generator)
        for name, parameter in model.named_parameters():
            if name.endswith("gamma"):
                parameter.uniform_(0.5, 1.0, generator=generator)
    return model


def _vision(build: Callable[[], nn.Module], size: int = 32, channels: int = 3) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return visible(build()).eval(), torch.randn(2, channels, size, size)


def _timm(name: str, size: int = 32, **options: object) -> tuple[nn.Module, Tensor]:
    import timm

    return _vision(lambda: timm.create_model(name, **options), size)


def _torchvision(name: str, size: int = 64, **options: object) -> tuple[nn.Module, Tensor]:
    import torchvision

    return _vision(lambda: torchvision.models.get_model(name, **options), size)


def _small_torchvision_vit() -> tuple[nn.Module, Tensor]:
    from torchvision.models import VisionTransformer

    return _vision(lambda: VisionTransformer(32, 8, 4, 4, 32, 64, num_classes=10))


def _cifar(preactivation: bool, shortcut: str) -> tuple[nn.Module, Tensor]:
    from resect.lab.models import cifar_resnet

    return _vision(lambda: cifar_resnet(20, preactivation=preactivation, shortcut=shortcut, widths=(4, 8, 16)), size=16)


def _handwritten(parallel: tuple[bool, ...]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net(parallel).eval(), torch.randn(3, 5)


CORE: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "handwritten": lambda: _handwritten((False, False, False)),
    "parallel": lambda: _handwritten((True, False, True)),
}
FAMILIES: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = CORE | {
    "cifar-post-A": lambda: _cifar(False, "A"),
    "cifar-post-B": lambda: _cifar(False, "B"),
    "cifar-pre-A": lambda: _cifar(True, "A"),
    "cifar-pre-B": lambda: _cifar(True, "B"),
    "torchvision-resnet18": lambda: _torchvision("resnet18"),
    "torchvision-resnet50": lambda: _torchvision("resnet50", width_per_group=8),
    "torchvision-vit": _small_torchvision_vit,
    "timm-resnet18": lambda: _timm("resnet18"),
    "timm-resnet50d": lambda: _timm("resnet50d", size=64, channels=(8, 16, 32, 64), stem_width=8),
    "timm-vit": lambda: _timm("vit_tiny_patch16_224", size=32, img_size=32, depth=4, drop_path_rate=0.1),
    "timm-convnext": lambda: _timm("convnext_atto", size=64),
}
# Published numbers of blocks: what the search must find, from the architectures, not from the search.
COUNTS = {
    "handwritten": {"identity": 3},
    "parallel": {"identity": 5},
    "cifar-post-A": {"identity": 7, "reshape": 2},
    "cifar-post-B": {"identity": 7, "projection": 2},
    "cifar-pre-A": {"identity": 7, "reshape": 2},
    "cifar-pre-B": {"identity": 7, "projection": 2},
    "torchvision-resnet18": {"identity": 5, "projection": 3},
    "torchvision-resnet50": {"identity": 12, "projection": 4},
    "torchvision-vit": {"identity": 8},
    "timm-resnet18": {"identity": 5, "projection": 3},
    "timm-resnet50d": {"identity": 12, "projection": 4},
    "timm-vit": {"identity": 8},
    "timm-convnext": {"identity": 12},
}


def family_params() -> list[object]:
    """Return every family as a pytest parameter, the hand-written ones marked as core."""
    import pytest

    return [pytest.param(name, marks=pytest.mark.core if name in CORE else ()) for name in FAMILIES]
