"""What deleting a layer does to a net without shortcuts (Veit et al. 2016, section 4.1: its VGG)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resect.lab.evaluate import evaluate
from resect.lab.models import CifarResNet


def delete_each_layer(model: CifarResNet, images: Tensor, labels: Tensor) -> list[dict[str, Any]]:
    """Replace each layer that keeps its input's shape by the identity, one at a time, and measure.

    Returns per layer: index, name, stage, and the top-1 error in %. ``images`` are normalised.
    """
    rows = []
    for index, (name, layer) in enumerate(_layers(model)):
        if not _keeps_shape(model, name, images[:1]):
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
        try:
            error = evaluate(model, images, labels)
        finally:
            setattr(model.get_submodule(parent), child, layer)
        rows.append({"index": index, "name": name, "stage": parent, "error": error})
    return rows


def _layers(model: CifarResNet) -> list[tuple[str, nn.Module]]:
    stages = [(name, stage) for name, stage in model.named_children() if name.startswith("layer")]
    return [(f"{name}.{child}", layer) for name, stage in stages for child, layer in stage.named_children()]


def _keeps_shape(model: nn.Module, name: str, image: Tensor) -> bool:
    shapes: list[bool] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_hook(lambda _, args, output: shapes.append(args[0].shape == output.shape))
    try:
        with torch.no_grad():
            model(image)
    finally:
        hook.remove()
    return shapes[0]
