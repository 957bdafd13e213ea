"""What deleting a layer does to a net without shortcuts (Veit et al. 2016, section 4.1: its VGG)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from resect.blocks.example import device_of, forward_batch, to_device
from resect.blocks.metrics import mean_of, metric_named
from resect.blocks.modes import kept_modes
from resect.errors import InputError
from resect.lab.models import CifarResNet

Layers = dict[str, list[str]]
"""Per layer of a net the modules that make it up, the first of which names it."""


def delete_each_layer(
    model: nn.Module,
    batches: Sequence[Any],
    metric: str = "top1",
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Replace each layer that keeps its input's shape by the identity, one at a time, and measure.

    A layer is a convolution or linear map with the normalisation and the activation that follow it in its
    ``Sequential``; of the lab's own nets, a child of a stage. Returns rows as a lesion study's: index (in the order of
    the layers), label, stage, value, baseline. ``batches`` are (inputs, target).

    Raises ``InputError`` where no layer keeps its input's shape.
    """
    layers, kept = list(_layers(model).items()), layers_to_delete(model, batches[0])
    baseline, rows = _measure(model, batches, metric), []
    for index, (name, modules) in enumerate(layers):
        if name in kept:
            with _without(model, modules):
                value = _measure(model, batches, metric)
            rows.append(
                {"study": "layers", "metric": metric, "k": 1, "closed": " ".join(modules), "label": name,
                 "value": value, "baseline": baseline, "change": value - baseline, "index": index,
                 "stage": name.rpartition(".")[0], "part": "layer", "shortcut": None}
            )  # fmt: skip
        if progress:
            progress(index + 1, len(layers))
    return rows


def layers_to_delete(model: nn.Module, batch: Any) -> list[str]:
    """Return the layers that keep the shape of their input; raises ``InputError`` where there is none."""
    layers = _layers(model)
    kept = list(compress(layers, _keeping_shape(model, list(layers.values()), batch)))
    if not kept:
        raise InputError(f"No layer of this {type(model).__name__} keeps its input's shape, so none can be deleted.")
    return kept


def _layers(model: nn.Module) -> Layers:
    if isinstance(model, CifarResNet):
        stages = [(name, stage) for name, stage in model.named_children() if name.startswith("layer")]
        return {f"{name}.{child}": [f"{name}.{child}"] for name, stage in stages for child, _ in stage.named_children()}
    layers: Layers = {}
    for path, parent in model.named_modules():
        if isinstance(parent, nn.Sequential):
            last = None
            for child, module in parent.named_children():
                name = f"{path}.{child}".lstrip(".")
                if isinstance(module, (_ConvNd, nn.Linear)):
                    layers[name], last = [name], name
                elif last and (isinstance(module, (_BatchNorm, nn.GroupNorm, nn.LayerNorm)) or _activates(module)):
                    layers[last].append(name)
                else:
                    last = None
    return layers


def _activates(module: nn.Module) -> bool:
    return type(module).__module__ == activation.__name__


def _keeping_shape(model: nn.Module, layers: list[list[str]], batch: Any) -> list[bool]:
    """Whether each layer gives what it is given a value of the same shape of."""
    shapes: dict[str, tuple[Any, Any]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: shapes.update({name: (args[0].shape, output.shape)})
        )
        for modules in layers
        for name in (modules[0], modules[-1])
    ]
    try:
        with kept_modes(model), torch.no_grad():
            forward_batch(model.eval(), batch)
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise InputError(f"This {type(model).__name__} cannot run on these samples: {said}") from error
    finally:
        for hook in hooks:
            hook.remove()
    none: tuple[Any, Any] = (None, 0)
    return [shapes.get(first, none)[0] == shapes.get(last, none)[1] for first, *_, last in (m * 2 for m in layers)]


@contextmanager
def _without(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    before = [parent._modules[child] for parent, child in places]
    try:
        for parent, child in places:
            parent._modules[child] = nn.Identity()
        yield
    finally:
        for (parent, child), module in zip(places, before, strict=True):
            parent._modules[child] = module


def _measure(model: nn.Module, batches: Sequence[Any], metric: str) -> float:
    measure, total, count = metric_named(metric), 0.0, 0
    device = device_of(model)
    with kept_modes(model), torch.no_grad():
        model.eval()
        for batch in batches:
            batch = to_device(batch, device)
            values: Tensor = measure(forward_batch(model, batch), batch)
            total, count = total + float(values.sum()), count + values.numel()
    return mean_of(measure, total, count)
