"""A data set resident in memory, and how its pixels become a net's input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """``images`` uint8 (N, C, H, W) and their ``labels`` int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class ImageData:
    """One data set: its two splits, and the names of its classes in the order of the labels."""

    name: str
    train: Split
    test: Split
    classes: tuple[str, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of every image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def stats(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation per channel in pixel units, of the training split."""
        return mean_std(self.train)

    def sample(self, which: str, limit: int | None = None) -> tuple[Tensor, Tensor]:
        """The first ``limit`` images of the split "train" or "test", normalised by "train", and their labels."""
        split: Split = getattr(self, which)
        return normalize(split.images[:limit], *self.stats), split.labels[:limit]


def mean_std(split: Split) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel, in pixel units (0 … 255), float32 (C,); exact, from counts."""
    channels = split.images.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.float64)
    for chunk in split.images.split(4096):  # bincount works on int64: eight times the memory
        for channel in range(channels):
            counts[channel] += torch.bincount(chunk[:, channel].flatten().long(), minlength=256).cpu()
    values = torch.arange(256, dtype=torch.float64)
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    std = (share @ values**2 - mean**2).clamp(min=0).sqrt()
    return mean.float(), std.float()


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 (N, C, H, W) to float32, ``mean`` and ``std`` (C,) taken out; a constant channel becomes 0."""
    shape = (1, -1, 1, 1)
    scale = torch.where(std > 0, std, 1.0)
    # uint8 minus float32 converts on the way: one pass over the pixels fewer than float() first.
    return (images - mean.to(images.device).view(shape)).div_(scale.to(images.device).view(shape))


def batches(data: ImageData, split: Split, batch_size: int = 256) -> list[tuple[Tensor, Tensor]]:
    """``split`` in order, as (images float32, labels) batches, normalised by the training split."""
    return in_batches(normalize(split.images, *mean_std(data.train)), split.labels, batch_size)


def in_batches(images: Tensor, labels: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of images and labels, in order: a list, so that a study can go through it again and again."""
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
