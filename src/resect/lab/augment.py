"""Augmentation of a whole batch at once, on the device that holds it: random shift and horizontal flip."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def draw(count: int, shift: int, flip: bool, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Random choices for ``count`` images, on the generator's device.

    Returns:
        rows, columns: int64 (count,), each uniform in 0 … 2·shift; ``shift`` means "not moved".
        flipped: bool (count,), each True with probability ½ if ``flip``, else all False.
    """
    where = generator.device
    offsets = torch.randint(0, 2 * shift + 1, (2, count), generator=generator, device=where)
    coin = torch.randint(0, 2 if flip else 1, (count,), generator=generator, device=where)
    return offsets[0], offsets[1], coin.bool()


def apply(images: Tensor, shift: int, rows: Tensor, columns: Tensor, flipped: Tensor) -> Tensor:
    """Crop every image at its own place out of a border of ``shift`` zero pixels, then flip some.

    Args:
        images: (N, C, H, W), any dtype.
        shift: width of the border in pixels.
        rows, columns, flipped: (N,), from `draw`.

    Returns:
        (N, C, H, W), dtype and device of ``images``.
    """
    _, _, height, width = images.shape
    device = images.device
    if shift:
        windows = F.pad(images, (shift,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view: every crop
        images = windows[torch.arange(len(images), device=device), :, rows.to(device), columns.to(device)]
    if flipped.any():
        images = torch.where(flipped.to(device)[:, None, None, None], images.flip(3), images)
    return images


def augment(images: Tensor, *, shift: int = 0, flip: bool = False, generator: torch.Generator) -> Tensor:
    """Each image (N, C, H, W) moved by up to ``shift`` pixels (zeros come in) and flipped at random.

    The draws come from ``generator`` alone; a CPU generator gives the same draws on every device.
    """
    if not shift and not flip:
        return images
    return apply(images, shift, *draw(len(images), shift, flip, generator))
