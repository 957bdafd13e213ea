"""Top-1 error, leaving the model as it was; gates that are attached stay attached and act."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resect.blocks.modes import kept_modes
from resect.errors import InputError
from resect.lab.data import normalize


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int = 256,
    *,
    stats: tuple[Tensor, Tensor] | None = None,
) -> float:
    """Top-1 error in percent, 0 … 100.

    Args:
        model: gives logits (N, classes); may be on another device than the images.
        images: (N, C, H, W), normalised float32; or uint8, with ``stats`` = (mean, std) of `data.mean_std`.
        labels: int64 (N,).
        batch_size: images per forward pass. The ε-gate looks at whole batches: its result depends on this.
        stats: taken out of the images batch by batch (default: the images are normalised already).
    """
    device = next(model.parameters()).device
    wrong = 0
    with kept_modes(model), torch.no_grad():
        model.eval()
        for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
            x = x.to(device)
            logits = model(x if stats is None else normalize(x, *stats))
            wrong += int((logits.argmax(1) != y.to(device)).sum())
    return 100 * wrong / len(labels)


def check_fit(model: nn.Module, example: Tensor, classes: int, name: str) -> None:
    """Raise `InputError` unless ``model`` gives at least ``classes`` logits for each image of ``example``."""
    shape = tuple(example.shape[1:])
    try:
        with kept_modes(model), torch.no_grad():
            model.eval()
            logits = model(example)
    except (RuntimeError, AssertionError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise InputError(
            f"Model {name!r} does not take images of shape {shape}: {said}. Set model.options or choose other data."
        ) from error
    if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[1] < classes:
        got = tuple(logits.shape[1:]) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            f"Model {name!r} gives {got} per image, not {classes} logits. Set the number of classes in model.options."
        )
