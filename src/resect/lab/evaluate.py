"""Top-1 error, leaving the model as it was; gates that are attached stay attached and act."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resect.blocks.modes import kept_modes
from resect.errors import InputError
from resect.lab.data import in_batches


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """`error_on` these images, ``batch_size`` at a time. The ε-gate looks at whole batches: it depends on this."""
    return error_on(model, in_batches(images, labels, batch_size))


def error_on(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Top-1 error in percent, 0 … 100.

    Args:
        model: gives logits (N, classes); may be on another device than the images.
        batches: normalised images float32 (N, C, H, W), and labels int64 (N,).
    """
    device = next(model.parameters()).device
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    seen = 0
    with kept_modes(model), torch.no_grad():
        model.eval()
        for images, labels in batches:
            wrong += (model(images.to(device)).argmax(1) != labels.to(device)).sum()
            seen += len(labels)
    return 100 * int(wrong) / seen


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
