"""Image data by name, decoded once into uint8 tensors that stay in memory: ``digits`` and ``cifar10``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resect.errors import check_all, unknown


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


def load(name: str, **options: Any) -> ImageData:
    """The data set ``name``.

    Options: ``folds`` and ``fold`` of `load_digits`, ``path`` of `load_cifar10`.

    Raises:
        InputError: an unknown name or option, with the nearest valid ones, or a value out of range.
        FileError: a file that is missing, damaged, or does not hold such images.
    """
    if name not in LOADERS:
        raise unknown("data", name, LOADERS)
    valid = list(inspect.signature(LOADERS[name]).parameters)
    wrong = [option for option in options if option not in valid]
    check_all((str(unknown("option", option, valid)) for option in wrong), f"Data {name!r}")
    return LOADERS[name](**options)


def load_digits(folds: int = 5, fold: int = 0) -> ImageData:
    """scikit-learn's 1,797 scanned digits of 8x8 pixels, which ship with the package.

    The scans hold whole numbers 0 … 16; the uint8 pixel is that number times 15, so ``image // 15`` is the
    scan again. Of ``folds`` (default 5) stratified parts, always the same ones, part ``fold`` (default 0)
    is the test split.
    """
    whole = all(isinstance(number, int) for number in (folds, fold))
    if not whole or not 2 <= folds <= 100 or not 0 <= fold < folds:
        check_all([f"folds must be 2 … 100 and fold 0 … folds - 1, not folds={folds}, fold={fold}"], "Data 'digits'")
    from sklearn.datasets import load_digits as load_scans
    from sklearn.model_selection import StratifiedKFold

    scans = load_scans()
    images = torch.from_numpy((scans.images * 15).astype("uint8"))[:, None]
    labels = torch.from_numpy(scans.target.astype("int64"))
    parts = StratifiedKFold(folds, shuffle=True, random_state=0).split(scans.images, scans.target)
    train, test = (torch.from_numpy(part) for part in list(parts)[fold])
    return ImageData(
        "digits",
        Split(images[train].contiguous(), labels[train]),
        Split(images[test].contiguous(), labels[test]),
        tuple("0123456789"),
    )


CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load_cifar10(path: str | None = None) -> ImageData:
    """CIFAR-10: 50,000 and 10,000 images of 3x32x32.

    ``path`` is a folder that holds train.parquet and test.parquet with columns img and label, as the hub
    has them; without it (default) the `datasets` library fetches ``uoft-cs/cifar10`` once and keeps it.
    """
    from resect.lab import parquet

    splits = parquet.read_folder(path) if path is not None else parquet.read_hub("uoft-cs/cifar10")
    train, test = (
        Split(*parquet.decode(rows, shape=(3, 32, 32), classes=len(CIFAR10), place=place)) for rows, place in splits
    )
    return ImageData("cifar10", train, test, CIFAR10)


LOADERS: dict[str, Callable[..., ImageData]] = {"digits": load_digits, "cifar10": load_cifar10}


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
    return (images.float() - mean.to(images.device).view(shape)) / scale.to(images.device).view(shape)


def batches(data: ImageData, split: Split, batch_size: int = 256) -> list[tuple[Tensor, Tensor]]:
    """``split`` in order, as (images float32, labels) batches, normalised by the training split."""
    return in_batches(normalize(split.images, *mean_std(data.train)), split.labels, batch_size)


def in_batches(images: Tensor, labels: Tensor, batch_size: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of images and labels, in order: a list, so that a study can go through it again and again."""
    return list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
