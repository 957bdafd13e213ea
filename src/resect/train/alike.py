"""Whether two runs of a model, forward and backward, come to the same but for rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from resect.blocks.hooks import accumulating_in_silence

GRADIENT = "gradient of"


def gradients(model: nn.Module, values: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """Return, per parameter that learns, the gradient of ``values`` weighed unevenly; None: none flows.

    What a training has accumulated in ``.grad`` stays as it is.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    flowing = [value for value in values if value.requires_grad]
    if not (named and flowing):
        return {}
    loss = torch.stack([(value.float() * _uneven(value)).sum() for value in flowing]).sum()
    before = [(parameter, parameter.grad) for parameter in named.values()]
    try:
        for parameter in named.values():
            parameter.grad = None
        with accumulating_in_silence(model):
            loss.backward()  # autograd.grad() is not for reentrant checkpointing
        return {name: parameter.grad for name, parameter in named.items()}
    finally:
        for parameter, gradient in before:
            parameter.grad = gradient


def _uneven(value: Tensor) -> Tensor:
    """Return weights for a value: no norm makes their sum over it a constant."""
    places = torch.arange(value.numel(), dtype=torch.float32, device=value.device)
    return ((places * 1.7).sin() / max(1, value.numel()) ** 0.5).view(value.shape)


def difference(expected: dict[str, list[Tensor | None]], found: dict[str, list[Tensor | None]]) -> str:
    """Say where two runs differ by more than rounding, "" if nowhere; NaN equals nothing.

    The tensors of one entry are of one scale: what lies far below the largest of them is nothing but rounding (the
    gradient of a bias before a softmax).
    """
    if list(expected) != list(found):
        return "other values come out"
    for name, group in expected.items():
        largest = max((_size(one) for one in group if one is not None), default=0.0)
        for one, other in zip(group, found[name], strict=True):
            if one is None or other is None or one.shape != other.shape:
                if one is not other:
                    return f"{name} is not there, or of another shape"
                continue
            relative, absolute = _allowed(name, one.dtype)
            apart = _size(one - other)
            if not apart <= relative * _size(one) + absolute * largest:
                return f"{name} is off by {apart / max(_size(one), 1e-30):.2g} of its size"
    return ""


def _allowed(name: str, dtype: torch.dtype) -> tuple[float, float]:
    """Return the rounding to expect, of a tensor's own size and of its group's; gradients have come further."""
    if dtype not in (torch.float32, torch.float64):
        return 0.05, 0.01
    return (1e-2, 1e-5) if name.startswith(GRADIENT) else (1e-3, 1e-5)


def _size(value: Tensor) -> float:
    value = value if value.is_floating_point() else value.double()
    return float(torch.linalg.vector_norm(value, dtype=torch.float64))
