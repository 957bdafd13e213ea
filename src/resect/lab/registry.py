"""Models by name: ``cifar-resnet-110``, ``cifar-preresnet-56``, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from resect.errors import InputError, check_all, unknown
from resect.lab.huggingface import build_transformers, example_for
from resect.lab.models import CifarResNet, cifar_resnet, depth_problem

# Offered as nearest names; any other depth 6n+2 works as well.
CIFAR_DEPTHS = (8, 14, 20, 26, 32, 38, 44, 50, 56, 110, 164, 200, 302, 500, 752, 1202)
CIFAR_FAMILIES = ("cifar-resnet", "cifar-preresnet")
CIFAR_NAMES = [f"{family}-{depth}" for family in CIFAR_FAMILIES for depth in CIFAR_DEPTHS]


def build(name: str, **options: Any) -> nn.Module:
    """A new model, with random weights unless ``pretrained=True`` (not for the CIFAR ResNets).

    ``options`` go to `cifar_resnet`, ``timm.create_model``, ``torchvision.models.get_model`` or the configuration of
    transformers.

    Raises:
        InputError: an unknown model or option, with the nearest valid ones, or a value the model refuses.
    """
    library, _, rest = name.partition(":")
    if library == "timm" and rest:
        return _build_timm(rest, options)
    if library == "torchvision" and rest:
        return _build_torchvision(rest, options)
    if library == "hf" and rest:
        return build_transformers(rest, options)
    return _build_cifar(name, options)


def example(name: str, model: nn.Module, size: int | None = None) -> Tensor | dict[str, Tensor]:
    """What ``model``, built by name, is called with: an image batch (2, C, H, W) of noise, or keyword arguments.

    ``size`` replaces the height and width of images; raises ``InputError`` where the model says its input itself.
    """
    if name.startswith("hf:"):
        if size is not None:
            raise InputError(f"{name!r} says itself how large its input is: change -o image_size=… instead of --size.")
        return example_for(model)
    channels, height, width = input_size(name, model)
    return torch.randn(2, channels, size or height, size or width, generator=torch.Generator().manual_seed(0))


def fit_options(name: str, channels: int, classes: int) -> dict[str, Any]:
    """The options that make model ``name`` take ``channels`` image channels and give ``classes`` logits."""
    if name.startswith("timm:"):
        return {"in_chans": channels, "num_classes": classes}
    if name.startswith("torchvision:"):
        return {"num_classes": classes}
    if name.startswith("hf:"):
        raise InputError(
            f"{name!r} takes no images here, as timm and torchvision do. For a language model: --data text:FILE."
        )
    return {"in_channels": channels, "num_classes": classes}


def input_size(name: str, model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of an image that ``model``, built by name, takes by default."""
    if isinstance(model, CifarResNet):
        return (model.conv1.in_channels, 32, 32)
    config = getattr(model, "pretrained_cfg", None)  # timm
    if config:
        return tuple(config["input_size"])
    side = 299 if name == "torchvision:inception_v3" else getattr(model, "image_size", 224)
    return (3, side, side)


def _build_cifar(name: str, options: dict[str, Any]) -> nn.Module:
    family, _, depth = name.rpartition("-")
    if family not in CIFAR_FAMILIES or not depth.isdecimal():
        _suggest_library(name)
        raise unknown("model", name, ["timm:NAME", "torchvision:NAME", "hf:NAME", *CIFAR_NAMES])
    check_all(filter(None, [depth_problem(int(depth))]), f"Model {name!r}")
    fixed = ("depth", "preactivation")  # both are in the name
    valid = [option for option in inspect.signature(cifar_resnet).parameters if option not in fixed]
    wrong = [option for option in options if option not in valid]
    check_all((str(unknown("option", option, valid)) for option in wrong), f"Model {name!r}")
    return cifar_resnet(int(depth), preactivation=family == "cifar-preresnet", **options)


def _suggest_library(name: str) -> None:
    """Raise with the right prefix if ``name`` is a model of timm or torchvision without it, or with it misspelt."""
    import timm
    from torchvision import models

    bare = name.rpartition(":")[2]
    known = [f"torchvision:{bare}"] * (bare in models.list_models()) + [f"timm:{bare}"] * timm.is_model(bare)
    if known:
        raise InputError(f"Unknown model {name!r}. Did you mean {' or '.join(map(repr, known))}?")


def _build_timm(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    if not timm.is_model(name):
        raise unknown("model", f"timm:{name}", [f"timm:{known}" for known in timm.list_models()])
    return _call(f"timm:{name}", lambda **chosen: timm.create_model(name, **chosen), options)


def _build_torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise unknown("model", f"torchvision:{name}", [f"torchvision:{known}" for known in models.list_models()])

    def make(pretrained: bool = False, **chosen: Any) -> nn.Module:
        return models.get_model(name, weights="DEFAULT" if pretrained else None, **chosen)

    return _call(f"torchvision:{name}", make, options)


def _call(name: str, make: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    """``make(**options)``; what it refuses becomes one sentence, an unknown option with its nearest."""
    try:
        return make(**options)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        # Both libraries pass options on to the class, which alone knows their names.
        valid = {"pretrained", *inspect.signature(type(make())).parameters} - {"kwargs"}
        wrong = [option for option in options if option not in valid and f"'{option}'" in str(error)]
        check_all((str(unknown("option", option, valid)) for option in wrong), f"Model {name!r}")
        said = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"Model {name!r} cannot be built with {options}: {said}") from error
    except OSError as error:
        raise InputError(
            f"Model {name!r}: its pretrained weights could not be fetched ({type(error).__name__}). "
            "Check the network, or leave pretrained out."
        ) from error
